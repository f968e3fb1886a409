"""check_replicas: compares everything that must be equal on the ranks of a group, by one small message if it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves_with_path

from tpkernels.comm.group import Group, resolve
from tpkernels.comm.objects import global_ranks, is_cut_among
from tpkernels.layers.random import rng_state
from tpkernels.shard import shard_info

from .agree import Entry, agreement, entries_of
from .digest import digest

WHO = "check_replicas"


def check_replicas(
    model: nn.Module,
    *,
    group: Group | None = None,
    batch: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    rng: bool | None = None,
    buffers: bool = True,
    step: int = 0,
    every: int = 1,
) -> bool:
    """Raise on all ranks, naming the difference and its ranks, unless a group is equal in all that must be equal.

        for step, batch in enumerate(data):
            check_replicas(model, group=tp, batch=batch, optimizer=optimizer, step=step, every=100)

    Over the group over which the model is cut: replicated parameters, which are trained, modes of modules, the batch,
    random numbers, the optimizer's options, which parameters have them, and its state of replicated ones. Over a
    data-parallel group: every parameter, the optimizer, the scaler; each replica has a batch of its own there, and may
    have random numbers of its own.

    Costs a pass over what is compared (2 GB/s and more on one core) and one message of 8 bytes. Where the ranks differ
    they also gather all digests.

    Args:
        model: compared as by `replicas_agree`.
        group: the ranks; None means all ranks of the default process group. All of them must call this.
        batch: tensors, numbers and texts in dicts and lists that are to be the same on all ranks.
        optimizer: its options, and its state as far as it belongs to parameters that are not cut over this group.
        scaler: its scale, and the steps since that changed: a rank that skipped a step alone has another one.
        rng: compare the states of torch's default generators. None: where a parameter is cut over ranks of this group.
        buffers: compare buffers, too; running statistics differ between replicas.
        step, every: compare only where step is a multiple of every.

    Returns:
        whether it has compared.

    Raises:
        RankMismatchError: they differ; names the first parameter, buffer, part of the batch, generator, field of the
            optimizer or of the scaler, and the ranks.
        ValueError, TimeoutError, PeerLostError: as of `replicas_agree`; every is less than 1.
    """
    if every < 1:
        raise ValueError(f"{WHO}: every must be 1 or more, got {every}")
    if step % every:
        return False
    group = resolve(group)
    mine = entries_of(WHO, model, group, buffers)
    mine += [_plain(f"requires_grad of {name}", p.requires_grad) for name, p in model.named_parameters()]
    mine += [_plain(f"training of {name or 'the model'}", module.training) for name, module in model.named_modules()]
    mine += [
        _plain(f"batch{keystr(path)}", leaf)
        for path, leaf in tree_leaves_with_path(dict(batch) if isinstance(batch, Mapping) else batch)
    ]
    if optimizer is not None:
        mine += _optimizer_entries(model, optimizer, group)
    if scaler is not None:
        mine += [_plain(f"scaler {name}", value) for name, value in scaler.state_dict().items()]
    if rng if rng is not None else _is_cut_over(model, group):
        mine += [_plain(f"random numbers of {device}", state) for device, state in rng_state().items()]
    agreement(WHO, mine, group, "things").check()
    return True


def replicas_callback(every: int = 100, *, group: Group | None = None) -> Any:
    """Make a callback for the Trainer of transformers that calls `check_replicas` after step 1 and every `every` steps.

        trainer.add_callback(replicas_callback(group=tp))

    Args:
        every: steps between two checks.
        group: as of `check_replicas`.
    """
    from transformers import TrainerCallback

    class Check(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            plain = getattr(kwargs.get("optimizer"), "optimizer", kwargs.get("optimizer"))  # as accelerate wraps it
            at = 0 if state.global_step == 1 else state.global_step
            check_replicas(model, group=group, optimizer=plain, step=at, every=every)

    return Check()


def _plain(name: str, value: Any) -> Entry:
    """The entry of a tensor, or of a value by its repr."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return name, f"{dtype} {list(value.shape)}", int(digest(value)) % 2**64
    text = repr(value)
    short = text if len(text) <= 40 else f"{text[:37]}..."
    return name, short, int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _optimizer_entries(model: nn.Module, optimizer: torch.optim.Optimizer, group: Group) -> Iterator[Entry]:
    for i, options in enumerate(optimizer.param_groups):
        for name, value in options.items():
            if name != "params":
                yield _plain(f"optimizer option {name} of group {i}", value)
    ranks = global_ranks(group)
    groups = {id(p): i for i, options in enumerate(optimizer.param_groups) for p in options["params"]}
    for name, parameter in model.named_parameters():
        yield _plain(f"optimizer group of {name}", groups.get(id(parameter)))
        info = shard_info(parameter)
        cut = info is not None and is_cut_among(info, ranks)
        for field, value in optimizer.state.get(parameter, {}).items():
            if not (cut and isinstance(value, Tensor) and value.dim() > 0):
                yield _plain(f"optimizer state {field} of {name}", value)


def _is_cut_over(model: nn.Module, group: Group) -> bool:
    ranks = global_ranks(group)
    infos = (shard_info(p) for p in model.parameters())
    return any(info is not None and is_cut_among(info, ranks) for info in infos)
