"""Checks before gradients are aggregated: of the model, of the arguments, and that they are equal on all ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.comm.objects import gather, global_ranks, is_cut_among
from tpkernels.compress import CODECS, FLOATS, PACKABLE
from tpkernels.ops.checks import names
from tpkernels.shard import shard_info

from .agree import replicas_agree
from .buckets import Member, kind_of
from .sparse import TopK

GRAD_CODECS = (*CODECS, "topk")
GATHERS = ("step", "forward")
LEVELS = (0, 1, 2)  # of zero
MODES = ("sync", "delayed", "local")
WHO = "GradAggregator"


def check_choice(codec: Any, mode: Any, topk: TopK) -> None:
    """Raise ValueError unless codec and mode exist and go together."""
    if codec not in GRAD_CODECS:
        raise ValueError(f"{WHO}: codec must be one of {', '.join(map(repr, GRAD_CODECS))}, got {codec!r}")
    if mode not in MODES:
        raise ValueError(f"{WHO}: mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if codec == "topk" and mode == "local" and topk.momentum:
        raise ValueError(
            f"{WHO}: topk must have momentum 0 in mode 'local', whose outer optimizer has its own, got {topk.momentum}"
        )


def check_zero(zero: Any, codec: str, mode: str, gather: Any) -> None:
    """Raise ValueError unless there is such a level, and codec, mode and gather go with it."""
    if gather not in GATHERS or (gather != GATHERS[0] and not zero):
        raise ValueError(
            f"{WHO}: gather must be 'step', or 'forward' with zero=1 or 2, got {gather!r} with zero={zero}"
        )
    if isinstance(zero, bool) or zero not in LEVELS:
        raise ValueError(f"{WHO}: zero must be one of {', '.join(map(str, LEVELS))}, got {zero!r}")
    if zero and (mode != "sync" or codec == "topk"):
        raise ValueError(
            f"{WHO}: with zero={zero} mode must be 'sync' and codec not 'topk', got {mode!r} and {codec!r}"
        )


def copied_over_stages(model: nn.Module, members: list[Member]) -> frozenset[int]:
    """Indices of the parameters of which other stages of a pipeline have copies: all stages must cut them alike."""
    stages = getattr(model, "tpk_stages", None)
    if stages is None:
        return frozenset()
    named = dict(model.named_parameters(remove_duplicate=False))
    tied = {id(named[n]) for there in stages.split.tied.values() for n in there.values() if n in named}
    return frozenset(member.index for member in members if id(member.parameter) in tied)


def check_counts(**counts: Any) -> None:
    """Raise TypeError or ValueError unless all are integers, warmup_steps 0 or more, the others 1 or more."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{WHO}: {name} must be an int, got {type(value).__name__}")
        least = 0 if name == "warmup_steps" else 1
        if value < least:
            raise ValueError(f"{WHO}: {name} must be {least} or more, got {value}")


def checked_scale(who: str, scale: float) -> float:
    """Return the factor of the loss; raise ValueError unless it is finite and above 0."""
    if not 0.0 < scale < math.inf:
        raise ValueError(f"{who}.set_loss_scale: scale must be finite and above 0, got {scale}")
    return scale


def check_unchanged(model: nn.Module, members: list[Member]) -> None:
    """Raise RuntimeError unless these still are the trained parameters of the model, of the same kinds."""
    for member in members:
        check_kind(member)
    now = [p for p in model.parameters() if p.requires_grad]
    if len(now) == len(members) and all(p is member.parameter for p, member in zip(now, members, strict=True)):
        return
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    new = [name for name, p in named.items() if not any(p is member.parameter for member in members)]
    gone = [member.name for member in members if not any(p is member.parameter for p in now)]
    if new or gone:
        raise RuntimeError(
            f"{WHO}: the trained parameters of the model have changed since it was made: new {new[:5]}, gone or frozen "
            f"{gone[:5]}; make a new {WHO} on all ranks when parameters are added, replaced, frozen or unfrozen"
        )


def check_kind(member: Member) -> None:
    """Raise RuntimeError unless the parameter still has the dtype, shape and device that it had."""
    if (kind := kind_of(member.parameter)) != member.made_as:
        was, now = (
            f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"
            for dtype, shape, device in (member.made_as, kind)
        )
        raise RuntimeError(
            f"{WHO}: parameter {member.name!r} was {was} when it was made, and is {now} now; close it, and make a new "
            f"{WHO} on all ranks after model.to(...) and the like"
        )


def set_gradient_dtype(members: list[Member]) -> None:
    """Let torch make gradients in the dtype of the messages.

    Raises:
        ValueError: a parameter has a gradient of another dtype already.
    """
    for member in members:
        parameter = member.parameter
        if parameter.dtype == member.dtype:
            continue
        if parameter.grad is not None and parameter.grad.dtype != member.dtype:
            raise ValueError(
                f"{WHO}: with gradient_dtype={member.dtype} gradients of other dtypes must be gone, got one of "
                f"{parameter.grad.dtype} for {member.name!r}; call zero_grad() before"
            )
        parameter.grad_dtype = member.dtype


def members_of(
    model: nn.Module, group: Group, codec: str, gradient_dtype: torch.dtype | None, mode: str
) -> list[Member]:
    """The trained parameters of a model, each once, checked.

    Args:
        model, group, codec, gradient_dtype, mode: the arguments of GradAggregator.

    Raises:
        TypeError, ValueError: the model, or a parameter that cannot be aggregated (says which, expected, got).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{WHO}: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ValueError(f"{WHO}: gradients must be dense, got {name!r} with sparse=True; set it to False")
    if gradient_dtype not in (None, torch.float32):
        raise ValueError(f"{WHO}: gradient_dtype must be None or torch.float32, got {gradient_dtype}")
    found = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not found:
        raise ValueError(f"{WHO}: model must have a parameter that requires a gradient, got none")
    ranks = global_ranks(group)
    for name, parameter in found:
        _check_parameter(name, parameter, group, codec)
        info = shard_info(parameter)
        if info is not None and is_cut_among(info, ranks):
            raise ValueError(
                f"{WHO}: parameter {name!r} is cut over group {info.group_label!r}, and ranks of group {group.label!r} "
                f"hold several of its parts, which cannot be averaged: give group= the ranks that hold the same part "
                f"of each replica"
            )
    return [
        Member(i, name, parameter, _message_dtype(parameter.dtype, gradient_dtype, mode), kind_of(parameter))
        for i, (name, parameter) in enumerate(found)
    ]


def _message_dtype(dtype: torch.dtype, gradient_dtype: torch.dtype | None, mode: str) -> torch.dtype:
    if dtype == torch.float64:
        return dtype
    return torch.float32 if mode == "local" else gradient_dtype or dtype


def _check_parameter(name: str, parameter: nn.Parameter, group: Group, codec: str) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"{WHO}: parameter {name!r} has no shape yet; run the model once before")
    dtype = names([parameter.dtype])
    if parameter.dtype not in FLOATS:
        raise ValueError(f"{WHO}: parameter {name!r} must have a dtype of {names(FLOATS)}, got {dtype}")
    if codec != "none" and parameter.dtype not in PACKABLE:
        raise ValueError(
            f"{WHO}: codec {codec!r} needs a dtype of {names(PACKABLE)}, got {dtype} of parameter "
            f"{name!r}; take codec 'none'"
        )
    if parameter.layout != torch.strided:
        raise ValueError(f"{WHO}: parameter {name!r} must be dense (strided), got layout {parameter.layout}")
    if parameter.device != group.device:
        raise ValueError(
            f"{WHO}: parameter {name!r} must be on {group.device}, where group {group.label!r} works, got device "
            f"{parameter.device}"
        )


def check_ranks(members: list[Member], settings: dict[str, Any], group: Group) -> None:
    """Raise ValueError on all ranks unless they have the same settings and the same parameters by name and shape."""
    mine = [(m.name, list(m.parameter.shape), str(m.parameter.dtype)) for m in members]
    every: list[tuple[dict[str, Any], list[Any]]] = gather((settings, mine), group)
    first_settings, first = every[0]
    for rank, (theirs, parameters) in enumerate(every):
        for key, value in first_settings.items():
            if theirs[key] != value:
                raise ValueError(
                    f"{WHO}: {key} must be the same on all ranks of group {group.label!r}, got {value!r} on rank 0 and "
                    f"{theirs[key]!r} on rank {rank}"
                )
        for i in range(max(len(first), len(parameters))):
            zero, other = (found[i] if i < len(found) else None for found in (first, parameters))
            if zero != other:
                raise ValueError(
                    f"{WHO}: the trained parameters must be the same on all ranks of group {group.label!r}, but number "
                    f"{i} is {_describe(zero)} on rank 0 and {_describe(other)} on rank {rank}"
                )


def _describe(parameter: tuple[str, list[int], str] | None) -> str:
    if parameter is None:
        return "missing"
    name, shape, dtype = parameter
    return f"{name!r} ({dtype.removeprefix('torch.')}, shape {shape})"


def check_same_values(model: nn.Module, group: Group) -> None:
    """Raise ValueError on all ranks, naming the first parameter whose bits differ between ranks of the group."""
    found = replicas_agree(model, group=group, buffers=False)
    if not found:
        raise ValueError(
            f"{WHO}: parameters must hold the same values on all ranks of group {group.label!r} at the start, but "
            f"{found.first!r} differs on ranks {list(found.ranks)}; pass sync_parameters=True to take rank 0's"
        )


@torch.no_grad()
def copy_from_first(model: nn.Module, group: Group) -> None:
    """Copy the parameters of rank 0 to all ranks, frozen ones too; a collective over the group."""
    for parameter in model.parameters():
        values = parameter.detach().contiguous()
        bits = values.reshape(-1).view(torch.uint8)
        found = ops.all_reduce(bits if group.rank == 0 else torch.zeros_like(bits), group=group, op="max")
        parameter.detach().copy_(found.view(values.dtype).view(values.shape))
