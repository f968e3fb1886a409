"""Collectives in compiled graphs that differ between ranks: all are called, in the order of the program."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tests.harness.ranks import nightly
from tpkernels import layers, ops
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks
from tpkernels.testing.spawn import RankError

Step = Callable[..., list[Tensor]]


def leaves(group: Group) -> list[Tensor]:
    R = group.world_size
    x, w, table, logits = torch.randn(2 * R, 6), torch.randn(6, 6), torch.randn(3, 6), torch.randn(2 * R, 5)
    return [t.requires_grad_() for t in (x + group.rank, w, table, logits)]


def in_place(x: Tensor, group: Group) -> Tensor:
    return ops.all_reduce_(x.detach() * 1.0, group=group)


def packed(x: Tensor, group: Group) -> Tensor:
    return ops.all_reduce_packed(ops.compress(x, "fp16"), x.shape, x.dtype, group=group, codec="fp16")


def packed_parts(x: Tensor, group: Group) -> Tensor:
    wire = ops.compress_parts(x, "none", group=group)
    return ops.reduce_scatter_packed(wire, x.numel(), x.dtype, group=group, codec="none")


def every_collective(
    group: Group, scale: float, x: Tensor, w: Tensor, table: Tensor, logits: Tensor
) -> Iterator[Tensor]:
    """One result of each op that communicates, in the forward or the backward; other values for another scale."""
    R, x, w, table, logits = group.world_size, x * scale, w * scale, table * scale, logits * scale
    ids = torch.arange(2 * R)
    yield ops.all_reduce(x, group=group)
    yield ops.all_reduce(x, group=group, op="max")
    yield in_place(x, group)
    yield ops.reduce_scatter(x, group=group)
    yield ops.all_gather(x, group=group)
    yield ops.all_gather(x, group=group, grad="split")
    yield ops.gemm_all_reduce(x, w, group=group)
    yield ops.gemm_reduce_scatter(x, w, group=group)
    yield ops.all_gather_gemm(x, w, group=group)
    yield ops.replicated_gemm(x, w, group=group)
    yield ops.vocab_embedding(ids, table, group=group)
    yield ops.vocab_cross_entropy(logits, ids, group=group)
    yield from ops.all_reduce_add_rms_norm(x, x, w[0], group=group)
    yield packed(x, group)
    yield packed_parts(x, group)


def in_pairs(group: Group, *inputs: Tensor) -> list[Tensor]:
    """Two results of each op, of which the second would pass for the first."""
    pairs = zip(every_collective(group, 1.0, *inputs), every_collective(group, 3.0, *inputs), strict=True)
    return [result for pair in pairs for result in pair]


def one_of_two(group: Group) -> Step:
    """Rank 0 uses the first of each pair, rank 1 the second, and goes through them from behind."""

    def step(*inputs: Tensor) -> list[Tensor]:
        results = in_pairs(group, *(x.detach() for x in inputs))
        return results[group.rank :: 2][:: 1 - 2 * group.rank]

    return step


def all_of_them(group: Group) -> Step:
    """Every rank uses all results; rank 1 from behind, and after large values that could be freed early."""

    def step(*inputs: Tensor) -> list[Tensor]:
        results = in_pairs(group, *inputs)
        if group.rank == 1:
            results = [(torch.ones(500, 1) * r.flatten()).mean(0) for r in reversed(results)]
        return [torch.cat([r.flatten() for r in results]).sum()]

    return step


def in_place_of_parts(group: Group) -> Step:
    def step(x: Tensor, *others: Tensor) -> list[Tensor]:
        a, b = x.detach() * 2, x.detach() * 3
        for y in (a, b, a[0]):
            ops.all_reduce_(y, group=group)
        return [a if group.rank == 0 else b]

    return step


def checkpointed(group: Group, **options: object) -> Step:
    torch.manual_seed(0)
    up, down = layers.ColumnParallelLinear(6, 8, group=group), layers.RowParallelLinear(8, 6, group=group)

    def block(x: Tensor) -> Tensor:
        return down(F.silu(up(x))).sin() + ops.all_reduce(x, group=group).cos()

    def step(x: Tensor, *others: Tensor) -> list[Tensor]:
        for _ in range(2):
            x = checkpoint(block, x, use_reentrant=False, **options)
        return [x.sum() if group.rank == 0 else x.flatten().cumsum(0)[-1]]

    return step


def keep_products() -> object:
    saved = [torch.ops.tpkernels.gemm_all_reduce.default, torch.ops.aten.mm.default]
    policies = {True: CheckpointPolicy.MUST_SAVE, False: CheckpointPolicy.PREFER_RECOMPUTE}
    return create_selective_checkpoint_contexts(lambda context, op, *args, **kwargs: policies[op in saved])


def selectively_checkpointed(group: Group) -> Step:
    return checkpointed(group, context_fn=keep_products)


class Twice(torch.autograd.Function):
    """A function of a user's own, whose forward and backward meet the other ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return ops.all_reduce(x, group=group) * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ops.all_reduce(dy * 3, group=ctx.group), None


def in_a_function(group: Group) -> Step:
    return lambda x, w, *others: [torch.cat([Twice.apply(x, group), Twice.apply(w, group)]).square().sum()]


def with_memory_of_the_group(group: Group) -> Step:
    def step(x: Tensor, *others: Tensor) -> list[Tensor]:
        inside, residual = group.empty(x.shape), torch.zeros_like(x.detach())
        ops.all_reduce_(inside.copy_(x.detach()), group=group)
        return [inside, ops.compress_with_feedback(x, residual, "int8"), residual]

    return step


def outcome(step: Step, inputs: list[Tensor]) -> list[Tensor]:
    """Results and gradients."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    results = step(*inputs)
    if len(results) == 1 and results[0].requires_grad:
        results[0].backward()
    return [r.detach() for r in results] + [x.grad for x in inputs if x.grad is not None]


def check_order(make: Callable[[Group], Step], backend: str, dynamic: bool | None = None, times: int = 1) -> None:
    with Group.open(timeout_s=200.0) as group:
        step, inputs = make(group), leaves(group)
        want = outcome(step, inputs)
        for _ in range(times):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)
            torch.testing.assert_close(outcome(compiled, inputs), want, rtol=1e-4, atol=1e-4)


def check_steps(backend: str, *steps: Callable[[Group], Step]) -> None:
    for make in steps:
        check_order(make, backend)


def check_dynamic() -> None:
    check_order(all_of_them, "aot_eager", dynamic=True)


def check_with_a_cache(folder: str) -> int:
    """How many graphs, forward and backward, the second of two compilations found in the cache."""
    config = torch._inductor.config.patch(fx_graph_cache=True, force_disable_caches=False)
    with mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder}), config:
        check_order(all_of_them, "inductor", times=2)
        found: int = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
        return found


def check_without_effects() -> None:
    for name in ("all_reduce", "gemm_all_reduce"):
        torch.library._register_effectful_op(f"tpkernels::{name}", None)
    check_order(one_of_two, "aot_eager")


def check_every_op_that_has_a_group_is_ordered() -> None:
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("tpkernels::")]
    with_group = {s.name.split("::")[1] for s in schemas if any(a.name == "group" for a in s.arguments)}
    makes_tensors = {"arena_empty", "device_arena_empty", "exchange_sizes"}
    found = torch._higher_order_ops.effects._get_effect
    ordered = {name for name in with_group if found(f"tpkernels::{name}") is not None}
    sends_nothing = {"replicated_gemm", "linear_backward"}
    assert with_group - ordered == makes_tensors | {"all_reduce_"} | sends_nothing


# Inductor compiles slowly: the steps with gradients run there at night, in the test of the cache.
@pytest.mark.parametrize(
    ("backend", "steps"),
    [("aot_eager", (one_of_two, all_of_them, in_place_of_parts)), ("inductor", (one_of_two, in_place_of_parts))],
)
def test_ranks_that_use_other_results_still_call_every_collective_in_one_order(
    backend: str, steps: tuple[Callable[[Group], Step], ...]
) -> None:
    run_ranks(check_steps, 2, backend, *steps, timeout=300.0)


def test_a_whole_graph_may_use_memory_of_the_group_and_functions_of_ones_own() -> None:
    run_ranks(check_steps, 2, "aot_eager", in_a_function, with_memory_of_the_group)


def test_the_order_holds_with_dynamic_shapes() -> None:
    run_ranks(check_dynamic, 2)


@pytest.mark.parametrize(
    ("backend", "steps"),
    [("aot_eager", (checkpointed, selectively_checkpointed)), *nightly(("inductor", (checkpointed,)))],
)
def test_checkpointed_regions_keep_the_results_of_collectives(
    backend: str, steps: tuple[Callable[[Group], Step], ...]
) -> None:
    run_ranks(check_steps, 2, backend, *steps, timeout=300.0)


@pytest.mark.nightly
def test_graphs_from_a_cache_that_ranks_share_keep_the_order(tmp_path: Path) -> None:
    assert run_ranks(check_with_a_cache, 2, str(tmp_path), timeout=300.0) == [2, 2], "the cache was not used"


def test_without_effects_the_order_is_lost() -> None:
    with pytest.raises(RankError, match=r"Tensor-likes are not close|RankMismatchError"):
        run_ranks(check_without_effects, 2, fresh=True)


def test_every_op_that_meets_other_ranks_is_ordered() -> None:
    check_every_op_that_has_a_group_is_ordered()
