"""A cut model's whole state dict, and save_pretrained of a cut model."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels import ops
from tpkernels.ckpt_files import CheckpointError
from tpkernels.group import Group
from tpkernels.layers.base import mark_shards
from tpkernels.plan_layers import group_of
from tpkernels.ranks import raise_together
from tpkernels.shard import shard_info


@torch.no_grad()
def full_state_dict(model: nn.Module, group: Group) -> dict[str, Tensor]:
    """Return the state dict of the unsharded model, on the CPU, on rank 0; empty on the others. Collective.

    Args:
        model: cut over `group`.
        group: over which.
    """
    mark_shards(model)
    found: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        info = shard_info(value)
        if id(value) not in done:
            whole = value.detach()
            if info is not None:
                parts = torch.split(ops.all_gather(whole, info.dim, group=group), info.sizes, info.dim)
                whole = info.assemble(parts) if group.rank == 0 else whole
            done[id(value)] = whole.cpu()
        if group.rank == 0:
            found[name] = done[id(value)]
    return found


class SavePretrained:
    """What `save_pretrained` of a cut model does: it saves the unsharded one. Every rank must call it."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._model, self._group = [model], group  # in a list: a reference, and no child of anything

    @property
    def group(self) -> Group:
        """That of the model's layers."""
        return group_of(self._model[0], self._group)

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Gather, and save on rank 0."""
        model = self._model[0]
        state = kwargs.pop("state_dict", None)
        if state is not None and _is_of_parts(state, model):
            raise ValueError("save_pretrained: state_dict holds this rank's parts only; leave it out")
        group = self.group
        state = state or full_state_dict(model, group)
        with raise_together(group, CheckpointError, f"save_pretrained {save_directory}"):
            if group.rank == 0:
                save: Any = type(model).save_pretrained  # type: ignore[attr-defined]
                save(model, save_directory, *args, state_dict=state, **kwargs)


def _is_of_parts(state: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether a state dict has parts where the unsharded model has whole tensors."""
    cut = ((state.get(name), p, shard_info(p)) for name, p in model.named_parameters())
    return any(
        value is not None and info is not None and value.shape != info.full_shape(p) and value.shape == p.shape
        for value, p, info in cut
    )
