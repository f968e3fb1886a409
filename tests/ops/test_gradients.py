"""Gradients against numbers: perturb one value of one rank, call on all ranks, compare; first and second derivatives.

torch's gradcheck sees one process. Here the function is the one that all ranks compute together: its inputs are the
unsharded tensors, its value is the scalar sum of dy * y over the unsharded output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.harness.ranks import Run, on_processes, on_ranks
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.ops.gradients import copy_to
from tpkernels.testing import run_ranks
from tpkernels.testing.case import PARTIAL, Case, Sizes, present, shard
from tpkernels.testing.cases import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_REDUCE_ADD_RMS_NORM,
    CASES,
    GEMM_ALL_REDUCE,
    GEMMS,
    REDUCE_SCATTER,
    VOCAB_CROSS_ENTROPY,
)

STEP = 1e-5
# Central differences: STEP^2 of the third derivative, and rounding over STEP.
TOLERANCE = 1e-7

# What follows differs over the ranks: each has its own dy for the whole y.
ALL_GATHER_REDUCE = replace(
    ALL_GATHER,
    name="all_gather, grad='reduce'",
    program=lambda s, x: x.unsqueeze(0).expand(s.R, *x.shape).clone(),
    output_cut=lambda s: PARTIAL,
    options=lambda s: {"dim": s.dim, "codec": s.codec},
)

Tensors = dict[str, Tensor | None]


def total(x: Tensor) -> Tensor:
    """The sum over the ranks."""
    dist.all_reduce(x)
    return x


def pairing(cut: object, a: Tensor, b: Tensor, group: Group) -> Tensor:
    """The inner product of two unsharded tensors, of which each rank has its shard, or all have the whole."""
    mine = (a * b).sum().detach().clone()
    return mine if cut is None else total(mine)


class Function:
    """A case as a scalar function of its unsharded inputs and of dy, evaluated by all ranks together."""

    def __init__(self, case: Case, s: Sizes, group: Group) -> None:
        self.case, self.s, self.group = case, s, group
        self.cuts = dict(case.cuts(s), dy=case.output_cut(s))
        self.whole: Tensors = dict(case.inputs(s))
        self.whole["dy"] = s.randn("dy", *case.run(s).shape)
        self.names = [name for name, x in self.whole.items() if x is not None and x.is_floating_point()]
        self.directions = {name: s.randn(f"direction {name}", *present(self.whole[name]).shape) for name in self.names}

    def mine(self, whole: Tensors, grad: bool) -> Tensors:
        """This rank's shards, as leaves."""
        found = {name: shard(x, self.cuts[name], self.s, self.group.rank) for name, x in whole.items()}
        for name in self.names if grad else []:
            present(found[name]).requires_grad_()
        return found

    def output(self, mine: Tensors) -> Tensor:
        return self.case.call(self.s, [x for name, x in mine.items() if name != "dy"], self.group)

    def value(self, whole: Tensors) -> Tensor:
        """Sum of dy * y."""
        mine = self.mine(whole, grad=False)
        return pairing(self.cuts["dy"], self.output(mine), present(mine["dy"]), self.group)

    def gradients(self, mine: Tensors, again: bool) -> dict[str, Tensor]:
        """This rank's gradients by autograd, of the inputs without dy."""
        names = [name for name in self.names if name != "dy"]
        leaves = [present(mine[name]) for name in names]
        found = torch.autograd.grad(self.output(mine), leaves, present(mine["dy"]), create_graph=again)
        return dict(zip(names, found, strict=True))

    def slope(self, whole: Tensors) -> Tensor:
        """The derivative of `value` along the directions: the scalar whose gradient is a second derivative."""
        mine, along = self.mine(whole, grad=True), self.mine(dict(self.directions), grad=False)
        parts = self.gradients(mine, again=False)
        return sum((pairing(self.cuts[n], g, present(along[n]), self.group) for n, g in parts.items()), torch.zeros(()))

    def second_gradients(self) -> Tensors:
        """This rank's gradients of `slope`, by autograd twice."""
        mine, along = self.mine(self.whole, grad=True), self.mine(dict(self.directions), grad=False)
        first = self.gradients(mine, again=True)
        used = {name: g for name, g in first.items() if g.requires_grad}
        leaves = [present(mine[name]) for name in self.names]
        found = torch.autograd.grad(
            list(used.values()), leaves, [present(along[name]) for name in used], allow_unused=True
        )
        return {
            name: torch.zeros_like(leaf) if g is None else g
            for name, leaf, g in zip(self.names, leaves, found, strict=True)
        }


def assert_gradient(f: Function, value: Callable[[Tensors], Tensor], gradients: Tensors, names: list[str]) -> None:
    """Compare this rank's gradients with differences of `value` in every element of the unsharded inputs."""
    for name in names:
        x = present(f.whole[name])
        numbers = torch.zeros_like(x)
        for i in range(x.numel()):
            step = torch.zeros(x.numel(), dtype=x.dtype)
            step[i] = STEP
            above, below = (value({**f.whole, name: x + sign * step.view_as(x)}) for sign in (1, -1))
            numbers.view(-1)[i] = (above - below) / (2 * STEP)
        want = present(shard(numbers, f.cuts[name], f.s, f.group.rank))
        error = (present(gradients[name]) - want).abs()
        bound = TOLERANCE * (1 + float(numbers.abs().max()) if numbers.numel() else 1)
        assert not error.numel() or float(error.max()) <= bound, (
            f"{f.case.name} {f.s}: gradient of {name} is {gradients[name]}, differences say {want}"
        )


def variants(case: Case, R: int) -> list[Sizes]:
    """Small sizes, even and uneven, with batch dimensions and without."""
    base = Sizes(R=R, M=3, N=2, K=3, V=5, dtype=torch.float64)
    found = [base]
    if case in GEMMS:
        found += [replace(base, bias=False, M=2), replace(base, batch=(2,), dim=1, M=3), replace(base, batch=(3,), M=1)]
    if case in (ALL_REDUCE, REDUCE_SCATTER):
        found += [replace(base, op=op) for op in ("avg", "max", "min")] + [replace(base, dim=1)]
    if case in (ALL_GATHER, ALL_GATHER_REDUCE):
        found += [replace(base, dim=1), replace(base, batch=(2,), dim=0)]
    if case is ALL_REDUCE_ADD_RMS_NORM:
        found += [replace(base, batch=(2,), M=2, N=3)]
    if case is VOCAB_CROSS_ENTROPY:
        found += [replace(base, smoothing=0.0), replace(base, batch=(2,), M=2)]
    return found


@on_ranks(1, 2, 3)
def check_first_derivatives(group: Group) -> None:
    for case in (*CASES, ALL_GATHER_REDUCE):
        for s in variants(case, group.world_size):
            f = Function(case, s, group)
            mine = f.mine(f.whole, grad=True)
            gradients: Tensors = {**f.gradients(mine, again=False)}
            assert_gradient(f, f.value, gradients, list(gradients))


@on_ranks(1, 2, 3)
def check_second_derivatives(group: Group) -> None:
    for case in (*CASES, ALL_GATHER_REDUCE):
        for s in variants(case, group.world_size):
            f = Function(case, s, group)
            assert_gradient(f, f.slope, f.second_gradients(), f.names)


@on_ranks(1)
def check_torch_gradcheck_on_one_rank(group: Group) -> None:
    """With one rank torch's own check applies, of first and second derivatives."""
    for case in CASES:
        for s in variants(case, 1):
            arguments = case.arguments(s, 0)
            floats = [x.requires_grad_() for x in arguments if x is not None and x.is_floating_point()]

            def call(*_: Tensor, case: Case = case, s: Sizes = s, arguments: list[Tensor | None] = arguments) -> Tensor:
                return case.call(s, arguments, group)

            assert torch.autograd.gradcheck(call, floats)
            assert torch.autograd.gradgradcheck(call, floats)


@on_ranks(3)
def check_ties_share_the_gradient(group: Group) -> None:
    R, rank = group.world_size, group.rank
    for op in ("max", "min"):
        x = torch.tensor([1.0, float(rank), float(rank // 2)], requires_grad=True)
        ops.all_reduce(x, group=group, op=op).backward(torch.tensor([6.0, 6.0, 6.0]))
        extreme = R - 1 if op == "max" else 0
        ties = [r for r in range(R) if r // 2 == extreme // 2]
        want = [6.0 / R, 6.0 * (rank == extreme), 6.0 / len(ties) * (rank in ties)]
        assert x.grad.tolist() == want, (op, x.grad, want)
        x = torch.full((2 * R,), float("nan") if rank == 1 else 0.0, requires_grad=True)
        ops.reduce_scatter(x, group=group, op=op).sum().backward()
        assert x.grad.tolist() == [float(rank == 1)] * 2 * R, "the NaN is what came out"


@on_ranks(3)
def check_backwards_keep_the_codec(group: Group) -> None:
    for case in (REDUCE_SCATTER, ALL_GATHER_REDUCE, *GEMMS):
        sent = {}
        for codec in ("none", "fp16"):
            s = Sizes(R=group.world_size, M=256, N=256, K=256, codec=codec)
            arguments = [x if x is None else x.requires_grad_() for x in case.arguments(s, group.rank)]
            y = case.call(s, arguments, group)
            group.reset_stats()
            y.sum().backward()
            sent[codec] = group.stats()["wire_bytes"]
        if case is GEMM_ALL_REDUCE:
            assert sent == {"none": 0, "fp16": 0}, "the backward is local"
        else:
            assert 0 < sent["fp16"] < 0.55 * sent["none"], (case.name, sent)


@on_ranks(3)
def check_gradients_accumulate_and_graphs_are_reusable(group: Group) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = ops.all_reduce(x * 2, group=group)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 4.0))
    with torch.no_grad():
        assert not ops.all_reduce(x, group=group).requires_grad
    with torch.inference_mode():
        assert ops.all_reduce(x, group=group).is_inference()
        assert ops.all_reduce_(torch.ones(3), group=group).is_inference()


@on_ranks(3)
def check_replicated(group: Group) -> None:
    """The identity whose gradient is summed over the ranks."""
    R, rank = group.world_size, group.rank
    x = torch.ones(3, requires_grad=True)
    y = copy_to(x, group.name, R)
    assert torch.equal(y, x)
    (y * (rank + 1)).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), R * (R + 1) / 2))


@on_ranks(3)
def check_uneven_cuts_that_no_gradient_has(group: Group) -> None:
    """Sizes that are not the cut of the rule gather, but with a gradient every rank raises the same error."""
    R, rank = group.world_size, group.rank
    part = torch.ones(1 + 3 * rank, 2)
    assert ops.all_gather(part, group=group).shape == (R + 3 * R * (R - 1) // 2, 2)
    for op, arguments in ((ops.all_gather, ()), (ops.all_gather_gemm, (torch.ones(4, 2),))):
        with pytest.raises(ValueError, match=r"the sizes of dim 0 must be \[.*\] over the ranks, got \[1, 4"):
            op(part.clone().requires_grad_(), *arguments, group=group)


@on_processes(globals())
def test_derivatives_over_the_ranks(run: Run) -> None:
    run()


def check_a_saved_tensor_changed_in_place_is_noticed() -> None:
    w = torch.ones(3, requires_grad=True)
    x = torch.ones(3)
    y = w * x
    ops.all_reduce_(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_saved_tensor_changed_in_place_is_noticed() -> None:
    run_ranks(check_a_saved_tensor_changed_in_place_is_noticed, 2)


def test_all_cases_of_one_op_are_one_op() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    packing = {"compress", "compress_parts", "compress_with_feedback", "decompress"}
    without = {"all_reduce_", "all_reduce_packed", "reduce_scatter_packed", "squared_norm", *packing}  # a gradient
    assert {case.op.__name__ for case in CASES} | without == set(ops.__all__)
    assert ALL_REDUCE in CASES
