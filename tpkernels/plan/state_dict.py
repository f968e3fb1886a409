"""A cut model's whole state dict, save_pretrained of a cut model and of adapters on it, and whole values in and out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.comm.objects import raise_together
from tpkernels.errors import CheckpointError, PlanError
from tpkernels.layers.base import mark_shards
from tpkernels.plan.styles.modules import group_of
from tpkernels.shard import ShardInfo, shard_info


@torch.no_grad()
def full_state_dict(
    model: nn.Module, group: Group, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Return the state dict of the unsharded model, on the CPU, on rank 0; empty on the others. Collective.

    Args:
        model: cut over `group`.
        group: over which.
        wanted: says by their names which tensors to take.
    """
    mark_shards(model)
    found: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not wanted(name):
            continue
        info = shard_info(value)
        if id(value) not in done:
            whole = value.detach()
            if info is not None:
                parts = _parts(whole, info, group)
                whole = info.assemble(parts) if group.rank == 0 else whole
            done[id(value)] = whole.cpu()
        if group.rank == 0:
            found[name] = done[id(value)]
    return found


def _parts(value: Tensor, info: ShardInfo, group: Group) -> tuple[Tensor, ...]:
    return torch.split(ops.all_gather(value, info.dim, group=group), info.sizes, info.dim)


class SavePretrained:
    """What `save_pretrained` of a cut model does, and of adapters on one: it saves the unsharded one.

    Every rank must call it; rank 0 writes to the folder that it was given.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._model, self._group = [model], group  # in a list: a reference, and no child of anything

    @property
    def group(self) -> Group:
        """That of the model's layers."""
        return group_of(self._model[0], self._group)

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Gather, and save on rank 0. Where that fails, all ranks raise."""
        model, group = self._model[0], self.group
        state = kwargs.pop("state_dict", None)
        if state is not None and _is_of_parts(state, model):
            raise ValueError("save_pretrained: state_dict holds this rank's parts only; leave it out")
        if kwargs.get("path_initial_model_for_weight_conversion") is not None:
            raise ValueError(
                "save_pretrained: path_initial_model_for_weight_conversion does not work on a cut model: save as it "
                "is, load into an uncut model, and convert there"
            )
        group.barrier()  # a rank that calls alone must not find out only when its file is written
        state = state or full_state_dict(model, group, _to_save(model))
        with raise_together(group, CheckpointError, f"save_pretrained {save_directory}"):
            if group.rank == 0:
                save: Any = type(model).save_pretrained  # type: ignore[attr-defined]
                save(model, save_directory, *args, state_dict=state, **kwargs)


def _to_save(model: nn.Module) -> Callable[[str], bool]:
    """Which tensors of a model are saved: those of adapters, where it has any."""
    if type(model).__module__.startswith("peft.") or getattr(model, "_hf_peft_config_loaded", False):
        return of_adapters(model)
    return lambda name: True


def of_adapters(model: nn.Module) -> Callable[[str], bool]:
    """What peft may save of a model, by name: all but the weights of the layers below adapters.

    Biases may be trained beside adapters, and tables of ids are saved with adapters on them.
    """
    tables = [getattr(model, get, lambda: None)() for get in ("get_input_embeddings", "get_output_embeddings")]
    base = {id(getattr(table, "base_layer", table)) for table in tables}
    own: dict[str, bool] = {}

    def visit(module: nn.Module, prefix: str, adapter: bool) -> None:
        saved = adapter or id(module) in base
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            own[prefix + name] = saved or (tensor is not None and tensor.dim() < 2)
        wraps = hasattr(module, "base_layer") or hasattr(module, "original_module")
        for name, child in module._modules.items():
            if child is not None:
                inner = wraps and name not in ("base_layer", "original_module")
                visit(child, f"{prefix}{name}.", (adapter or inner) and name != "base_layer")

    visit(model, "", False)
    return lambda name: own.get(name, True)


def _is_of_parts(state: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether a state dict has parts where the unsharded model has whole tensors."""
    cut = ((state.get(name), p, shard_info(p)) for name, p in model.named_parameters())
    return any(
        value is not None and info is not None and value.shape != info.full_shape(p) and value.shape == p.shape
        for value, p, info in cut
    )


def give_whole(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Behind state_dict of a cut model: what peft asks for to save adapters is gathered, on every rank. Collective.

    get_peft_model_state_dict asks by a plain state_dict(), so that only its frame tells that it is who asks; hotswap,
    which would put whole matrices in the place of parts, too.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name == "state_dict":
        frame = frame.f_back
    if frame.f_code.co_name == "hotswap_adapter_from_state_dict":
        raise PlanError(
            "hotswap of an adapter does not work on a cut model, whose parts it would replace by whole matrices: load "
            "it under another name, or put its values into this one by peft's set_peft_model_state_dict"
        )
    if frame.f_code.co_name != "get_peft_model_state_dict":
        return
    wanted = of_adapters(module)
    group: Group = module.tpk_plan.group  # type: ignore[union-attr, assignment]
    for name, parameter in module.named_parameters(remove_duplicate=False):
        info = shard_info(parameter)
        if info is None or prefix + name not in state:
            continue
        if wanted(name):
            state[prefix + name] = info.assemble(_parts(parameter.detach(), info, group))
        else:
            del state[prefix + name]  # a part must not be taken for the whole
