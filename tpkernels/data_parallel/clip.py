"""The norm of the gradients of a model whose parameters are partly cut, partly replicated, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpkernels import ops
from tpkernels.comm.group import Group, resolve
from tpkernels.layers.base import mark_shards
from tpkernels.shard import ShardInfo, shard_info

from .flat import FlatShard, MeshRanks, flat_shard, local_of, stepped

RUN = 1024  # elements that are summed in fp32; see _norm


class _Gradient(NamedTuple):
    """A gradient that counts: how its parameter is cut over a group and over the replicas, and the shape of that."""

    values: Tensor
    info: ShardInfo | None
    flat: FlatShard | None
    shape: torch.Size

    @classmethod
    def of(cls, gradient: Tensor, info: ShardInfo | None, parameter: Tensor) -> _Gradient:
        """That of a parameter, or of the gradient itself where that is all there is."""
        return cls(local_of(gradient), info, flat_shard(parameter), parameter.shape)

    def owned(self) -> list[Tensor]:
        """The values that this rank counts: of indices that several ranks hold the first of them counts each."""
        if self.info is None:
            return [self.values]
        stretches = self.info.owned_by(self.info.rank)
        if self.flat is None:
            return [self.values.narrow(self.info.dim, *stretch) for stretch in stretches]
        if not self.info.shared:
            return [self.values]
        mine = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        for stretch in stretches:
            mine.narrow(self.info.dim, *stretch).fill_(True)
        return [self.values.reshape(-1)[self.flat.part(mine)]]


@torch.no_grad()
def clip_grad_norm_(
    model_or_params: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    *,
    groups: Group | Sequence[Group] | None,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    pipeline: Group | None = None,
    tied: Iterable[Tensor] = (),
) -> Tensor:
    """Scale all gradients so that their norm, taken over the unsharded parameters, is max_norm at most.

    Equal to torch.nn.utils.clip_grad_norm_ on the unsharded model: a cut parameter counts with the parts of all ranks,
    a replicated one once, not once for every rank, and a parameter that occurs twice (tied weights) once. Of an
    aggregator with zero=1 or 2, and of torch's fully_shard, the parts of all replicas count; their group need not be
    given.

        stage = sum over cut p of all_reduce(|grad|^n) + sum over replicated p of |grad|^n
        total = (sum of stage over the pipeline) ^ (1 / n)               # stage itself without a pipeline
        grad *= min(1, max_norm / (total + 1e-6))

    Args:
        model_or_params: a module, its parameters, or one of them. Parameters without a gradient do not count.
        max_norm: the largest norm to leave.
        groups: the group or groups over which parameters are cut; None means all ranks, with a pipeline none. A
            data-parallel group may be among them: gradients that are averaged already count once. Every rank of them
            must make this call. One collective of two numbers for each.
        norm_type: n > 0, or inf for the largest absolute value.
        error_if_nonfinite: raise, on all ranks, when the norm is NaN or infinite. Otherwise torch's rule holds: NaN
            makes all gradients NaN, an infinity makes them zero or NaN, and the returned norm shows it.
        pipeline: the ranks that hold the stages of one model, each its own parameters, all of which count. Not among
            `groups`. One more collective of two numbers.
        tied: parameters of this stage that are copies of one that another stage counts, with the same gradient (an
            output layer tied to the embedding of the first stage). They are scaled, but do not count here.

    Returns:
        the norm before clipping, a scalar with the same bits on all ranks, fp32 unless a gradient is fp64. Summed in
        fp64, other norms than the second one over runs of 1024 elements.

    Raises:
        ValueError: max_norm is negative or NaN, norm_type is not above 0, a gradient is sparse, a parameter is cut over
            a group that is not in `groups`, `pipeline` is one of `groups`, or `tied` has others than the
            parameters, or no pipeline.
        RuntimeError: the norm is not finite and error_if_nonfinite is set.

    Source: the counting rule of Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
    """
    max_norm, norm_type = float(max_norm), _checked(norm_type)
    if not max_norm >= 0.0:
        raise ValueError(f"clip_grad_norm_: max_norm must be 0 or more, got {max_norm}")
    over = [] if groups is None and pipeline is not None else _as_groups(groups)
    parameters, copies = _split_tied(_parameters(model_or_params), list(tied), pipeline)
    replicas = _replicas_of(flat_shard(p) for p in (*parameters, *copies))
    cuts = _with_cuts(parameters), _with_cuts(copies)
    total = _root(*_counted(*cuts, over, pipeline, norm_type, replicas), norm_type)
    _check_finite(total, norm_type, error_if_nonfinite)
    gradients = [gradient.values for some in cuts for gradient in some]
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    if scale.device.type != "cpu" or float(scale) != 1.0:  # NaN is not 1: it multiplies the gradients
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.device))
    return total


@torch.no_grad()
def total_norm(
    gradients: Iterable[tuple[Tensor, ShardInfo | None]],
    groups: Sequence[Group],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Return the norm of gradients over the unsharded parameters; a collective over the groups.

    Args:
        gradients: each with the shard information of its parameter, None where that is replicated.
        groups, norm_type, error_if_nonfinite: as for `clip_grad_norm_`.

    Raises:
        ValueError, RuntimeError: as `clip_grad_norm_`.
    """
    norm_type = _checked(norm_type)
    counting = [_Gradient.of(gradient, info, gradient) for gradient, info in gradients]
    replicas = _replicas_of(gradient.flat for gradient in counting)
    total = _root(*_counted(counting, [], list(groups), None, norm_type, replicas), norm_type)
    _check_finite(total, norm_type, error_if_nonfinite)
    return total


def _checked(norm_type: float) -> float:
    norm_type = float(norm_type)
    if not norm_type > 0.0:
        raise ValueError(f"clip_grad_norm_: norm_type must be above 0 (inf: the largest value), got {norm_type}")
    return norm_type


def _check_finite(total: Tensor, norm_type: float, error_if_nonfinite: bool) -> None:
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"clip_grad_norm_: the norm (norm_type={norm_type}) of all gradients is {total.item()}, so they cannot be "
            f"clipped; pass error_if_nonfinite=False to go on"
        )


def _root(total: Tensor, wide: bool, norm_type: float) -> Tensor:
    total = total if math.isinf(norm_type) else total.pow(1.0 / norm_type)
    return total.to(torch.float64 if wide else torch.float32)


def _with_cuts(parameters: list[Tensor]) -> list[_Gradient]:
    return [_Gradient.of(gradient, shard_info(p), p) for p in parameters if (gradient := stepped(p).grad) is not None]


def _counted(
    counting: list[_Gradient],
    uncounted: list[_Gradient],
    groups: list[Group],
    pipeline: Group | None,
    norm_type: float,
    replicas: Sequence[Group | MeshRanks],
) -> tuple[Tensor, bool]:
    """Return the sum of powers (the maximum for inf) over everything, and whether any gradient is fp64."""
    for gradient in (one.values for one in (*counting, *uncounted)):
        if gradient.layout != torch.strided:
            raise ValueError(f"clip_grad_norm_: gradients must be dense, got one of layout {gradient.layout}")
        if type(gradient) not in (Tensor, nn.Parameter):
            raise TypeError(
                f"clip_grad_norm_: gradients must be plain tensors or those of fully_shard, got a "
                f"{type(gradient).__name__}"
            )
    replicated, cut = _sort(counting, groups)
    total = _combine(replicated, cut, [gradient.values for gradient in uncounted], groups, norm_type, replicas)
    wide = any(gradient.values.dtype == torch.float64 for gradient in (*counting, *uncounted))
    return (total, wide) if pipeline is None else _over_stages(total, wide, pipeline, groups, norm_type)


def _as_groups(groups: Group | Sequence[Group] | None) -> list[Group]:
    if groups is None or isinstance(groups, Group):
        return [resolve(groups)]
    return list({g.name: g for g in groups}.values())


def _parameters(model_or_params: nn.Module | Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(model_or_params, nn.Module):
        mark_shards(model_or_params)
        return list(model_or_params.parameters())
    if isinstance(model_or_params, Tensor):
        return [model_or_params]
    return list({id(p): p for p in model_or_params}.values())


def _split_tied(
    parameters: list[Tensor], tied: list[Tensor], pipeline: Group | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters that count here, and the copies of some that count on another stage."""
    copies = {id(p) for p in tied}
    if copies and pipeline is None:
        raise ValueError(
            "clip_grad_norm_: tied names parameters that another stage counts and needs a pipeline, got None"
        )
    if missing := copies - {id(p) for p in parameters}:
        raise ValueError(f"clip_grad_norm_: tied must be among the parameters, got {len(missing)} that are not")
    return [p for p in parameters if id(p) not in copies], [p for p in parameters if id(p) in copies]


def _sort(gradients: list[_Gradient], groups: list[Group]) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Return the gradients that this rank counts: of replicated parameters and, by group name, of cut ones."""
    replicated: list[Tensor] = []
    cut: dict[str, list[Tensor]] = {g.name: [] for g in groups}
    for gradient in gradients:
        counted = replicated if gradient.info is None else cut[_group_of(gradient.info, groups).name]
        counted += gradient.owned()
    return replicated, cut


def _group_of(info: ShardInfo, groups: list[Group]) -> Group:
    by_name = [g for g in groups if g.name == info.group_name]
    by_label = [g for g in groups if (g.label, g.world_size) == (info.group_label, info.world_size)]
    found = by_name or by_label
    if not found:
        raise ValueError(
            f"clip_grad_norm_: groups must have all groups over which parameters are cut; one is cut over "
            f"{info.group_label!r} of {info.world_size} ranks, got {[g.label for g in groups]}"
        )
    return found[0]


def _combine(
    replicated: list[Tensor],
    cut: dict[str, list[Tensor]],
    uncounted: list[Tensor],
    groups: list[Group],
    norm_type: float,
    replicas: Sequence[Group | MeshRanks],
) -> Tensor:
    """Return the sum of powers over everything (the maximum for inf) in fp64, the same bits on all ranks of all groups.

    Over replicas that have parts of the gradients all sums are added up first. The message of each group is [own parts,
    total so far]. The second number should be the same on all its ranks already; that of rank 0 is taken. A rank whose
    total is NaN or infinite sends it too, so that it shows in the result, as do copies that are not finite and count
    on another stage.
    """
    is_max = math.isinf(norm_type)
    sums = [_power_sum(some, norm_type) for some in (replicated, uncounted, *cut.values())]
    for group in replicas:
        sums = list(_over_replicas(torch.stack([s.to(sums[0].device) for s in sums]), group, is_max=is_max))
    total, copies, *of_cuts = sums
    total = torch.where(copies.to(total.device).isfinite(), total, total + copies.to(total.device))
    for group, parts in zip(groups, of_cuts, strict=True):
        counted = total if group.rank == 0 else torch.where(total.isfinite(), 0.0, total)
        message = torch.stack([parts, counted.to(parts.device)]).to(group.device)
        message = ops.all_reduce(message, group=group, op="max" if is_max else "sum")
        total = message.max() if is_max else message.sum()
    return total


def _replicas_of(flats: Iterable[FlatShard | None]) -> list[Group | MeshRanks]:
    return list({flat.group.name: flat.group for flat in flats if flat is not None}.values())


def _over_replicas(sums: Tensor, group: Group | MeshRanks, *, is_max: bool) -> Tensor:
    if isinstance(group, Group):
        return ops.all_reduce(sums.to(group.device), group=group, op="max" if is_max else "sum")
    dist.all_reduce(sums, dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM, group=group.process_group)
    return sums


def _over_stages(
    stage: Tensor, wide: bool, pipeline: Group, groups: list[Group], norm_type: float
) -> tuple[Tensor, bool]:
    """Return the sum (the maximum for inf) over the stages, and whether any of them has fp64 gradients."""
    if any(group.name == pipeline.name for group in groups):
        raise ValueError(f"clip_grad_norm_: pipeline must not be one of groups, got {pipeline.label!r} in both")
    message = torch.stack([stage, torch.full_like(stage, float(wide))]).to(pipeline.device)
    total, wides = ops.all_reduce(message, group=pipeline, op="max" if math.isinf(norm_type) else "sum")
    return total, bool(wides > 0)


def _power_sum(gradients: list[Tensor], norm_type: float) -> Tensor:
    """Return the sum of |g|^norm_type over all elements in fp64; their largest absolute value for inf."""
    filled = [g for g in gradients if g.numel() > 0]
    device = gradients[0].device if gradients else torch.device("cpu")
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=device)
    if norm_type == 2.0:
        by_device: dict[torch.device, list[Tensor]] = {}
        for g in filled:
            by_device.setdefault(g.device, []).append(g)
        return torch.stack([ops.squared_norm(some).to(device) for some in by_device.values()]).sum()
    stacked = torch.stack([_norm(g, norm_type).to(device) for g in filled])
    return stacked.max() if math.isinf(norm_type) else stacked.pow(norm_type).sum()


def _norm(gradient: Tensor, norm_type: float) -> Tensor:
    """Return the norm of one gradient in fp64.

    On the CPU torch's norm with fp64 sums takes 30 times as long as with fp32 sums, and those are wrong in the fourth
    digit for a few million elements. Rows of fp32 sums, summed up in fp64, are as fast and right to eight digits.
    """
    if gradient.device.type == "cpu" and gradient.dtype != torch.float64 and gradient.numel() >= RUN:
        flat = gradient.reshape(-1).float()
        runs = flat[: flat.numel() // RUN * RUN].view(-1, RUN)
        rest = torch.linalg.vector_norm(flat[runs.numel() :].double(), norm_type) if flat.numel() % RUN else None
        norms = torch.linalg.vector_norm(runs, norm_type, dim=1).double()
        norm: Tensor = torch.linalg.vector_norm(
            norms if rest is None else torch.cat([norms, rest.reshape(1)]), norm_type
        )
        # Powers leave the range of fp32, cubes above 1e12 and below 1e-15: then fp64, as for NaN and infinity.
        if 1e-15 < float(norm) < math.inf or not bool(gradient.any()):
            return norm
    exact: Tensor = torch.linalg.vector_norm(gradient, norm_type, dtype=torch.float64)
    return exact
