"""torch's own norm of gradients and GradScaler where a model is cut: over all ranks that hold shards."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from tpkernels.comm.group import Group, find
from tpkernels.data_parallel.clip import total_norm
from tpkernels.data_parallel.flat import parts_have_gradients
from tpkernels.data_parallel.scaling import agree_on_overflow
from tpkernels.layers.base import marked_shards
from tpkernels.shard import ShardInfo, shard_info

_models: WeakSet[nn.Module] = WeakSet()


def count_shards_in_norms() -> None:
    """Make torch's norm of gradients, and so its clip_grad_norm_, count the shards of all ranks."""
    module = torch.nn.utils.clip_grad
    plain = module._get_total_norm

    @functools.wraps(plain)
    def norm_over_ranks(
        tensors: Tensor | Iterable[Tensor],
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if not tensors and parts_have_gradients():
            raise ValueError(
                "torch.nn.utils: the norm of no gradients was requested, and those of an aggregator with zero=1 or 2 "
                "are in parts, of which torch does not know: take tpkernels.data_parallel.clip_grad_norm_"
            )
        shards = {_place(t): shard_info(p) for p in marked_shards() for t in (p, p.grad) if t is not None}
        infos = [shards.get(_place(t)) for t in tensors]
        if not any(infos):
            infos = _infos_of_copies(tensors)
        if not any(infos):
            norm: Tensor = plain(tensors, norm_type, error_if_nonfinite, foreach)
            return norm
        return total_norm(zip(tensors, infos, strict=True), _groups_of(infos), norm_type, error_if_nonfinite)

    module._get_total_norm = norm_over_ranks
    torch.nn.utils.get_total_norm = norm_over_ranks


def watch_copies_of(model: nn.Module) -> None:
    """Let gradients of copies of a cut model's parameters be known by their shapes: of fp32 masters, for one."""
    _models.add(model)


def _infos_of_copies(tensors: list[Tensor]) -> list[ShardInfo | None]:
    """The ShardInfo of tensors with the shapes, one after the other, of all or all trained parameters of a model."""
    shapes, found = [t.shape for t in tensors], []
    for model in list(_models):
        every = list(model.parameters())
        for chosen in (every, [p for p in every if p.requires_grad]):
            if shapes == [p.shape for p in chosen]:
                infos = [shard_info(p) for p in chosen]
                names = sorted({info.group_name for info in infos if info is not None})
                if all(find(name=name) for name in names):
                    found.append((names, infos))
    # The set has another order on each rank.
    return min(found, key=lambda one: one[0])[1] if found else [None] * len(tensors)


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    """What a tensor has in common with those that `detach` and `.data` make of it."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.numel() > 0
    return tensor.data_ptr() if plain else id(tensor), tensor.shape


def skip_together() -> None:
    """Make the ranks of a cut model agree on an overflow, so that a GradScaler skips a step on all or on none.

    And count unscaling as a change of gradients in place, which an aggregator may have sent: torch's op does not.
    """
    plain = getattr(torch.amp.GradScaler, "_unscale_grads_", None)  # private; `unscale_` of data_parallel does the same
    if plain is None:
        return

    @functools.wraps(plain)
    def unscale_together(self: Any, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        found: dict[torch.device, Tensor] = plain(self, optimizer, *args, **kwargs)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.autograd.graph.increment_version([p.grad for p in parameters if type(p.grad) is Tensor])
        names = [name for p in parameters for name in getattr(p, "tpk_groups", ())]  # of parts, over their replicas too
        parts = {name: group for name in names if (group := find(name=name)) is not None}
        groups = list(({g.name: g for g in _groups_of(map(shard_info, parameters))} | parts).values())
        if groups:
            agree_on_overflow(found, groups)
        return found

    torch.amp.GradScaler._unscale_grads_ = unscale_together  # type: ignore[method-assign]


def _groups_of(infos: Iterable[ShardInfo | None]) -> list[Group]:
    found: dict[str, Group] = {}
    for info in infos:
        group = find(name=info.group_name) if info is not None else None
        if info is not None and group is None:
            raise ValueError(
                f"torch.nn.utils: the group {info.group_label!r} over which a parameter is cut is closed; open it anew "
                f"and give it to the model by set_group"
            )
        if group is not None:
            found[group.name] = group
    return list(found.values())
