"""Loss scaling where a model is cut: all ranks of the model skip a step, or none does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpkernels import ops
from tpkernels.comm.group import Group


def unscale_(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, *, groups: Group | Sequence[Group]
) -> Tensor:
    """scaler.unscale_(optimizer), and agree over groups whether a gradient is not finite.

    Within a data-parallel group the averages are the same on all ranks, and so is the result of GradScaler. A rank of a
    tensor-parallel group has its own shards only: without agreement it would skip a step that the others make.
    Call it on all ranks in place of scaler.unscale_; clipping, scaler.step and scaler.update follow as usual.

    Args:
        scaler: torch.amp.GradScaler.
        optimizer: whose gradients are scaled.
        groups: over which parameters are cut.

    Returns:
        1 when a gradient is not finite on any rank, else 0: a scalar, fp32.
    """
    if not scaler.is_enabled():
        return torch.zeros(())
    scaler.unscale_(optimizer)
    flags: dict[torch.device, Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return agree_on_overflow(flags, [groups] if isinstance(groups, Group) else groups)


def agree_on_overflow(flags: dict[torch.device, Tensor], groups: Sequence[Group]) -> Tensor:
    """Set all flags to 1 if one of any rank is 1. A collective over each group.

    Args:
        flags: of a GradScaler, by device: 1 where a gradient is not finite. Overwritten.
        groups: over which the model is cut.

    Returns:
        1 or 0: a scalar, fp32.
    """
    anywhere = torch.stack([flag.reshape(()).float().cpu() for flag in flags.values()] or [torch.zeros(())]).max()
    for group in groups:
        anywhere = ops.all_reduce(anywhere.to(group.device), group=group, op="max")
    for flag in flags.values():
        flag.fill_(anywhere.item())
    return anywhere
