"""Path fused of the sharded GEMMs, on emulated devices and on GPUs: asked for, explained, the plain program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.harness.ops import check_forward, check_gradient, run_at
from tpkernels.comm.group import Group
from tpkernels.testing.case import Sizes
from tpkernels.testing.cases import ALL_GATHER_GEMM, ALL_REDUCE, GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER, REPLICATED_GEMM

FUSED = (GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER, ALL_GATHER_GEMM)


def ask(group: Group, blocks: int = 1) -> None:
    """Take path fused where it can be taken, in a grid that several ranks fit beside each other."""
    grid = 4 if group.is_cpu else torch.cuda.get_device_properties(0).multi_processor_count // group.world_size
    group._communicator.force(path="fused", blocks=blocks, grid=grid)


def check_fused(group: Group) -> None:
    R = group.world_size
    ask(group)
    for s in (
        Sizes(R=R, M=7, N=16, K=24, dtype=torch.bfloat16, integers=True),
        Sizes(R=R, M=140 * R - 1, N=24, K=72, dtype=torch.float16),
        Sizes(R=R, M=3, N=8, K=5 * R + 1, batch=(3,), dtype=torch.bfloat16, bias=False),  # own K, own N: padded
    ):
        for case in FUSED:
            check_forward(case, s, group)
            check_gradient(case, replace(s, M=5), group)
        check_forward(ALL_REDUCE, replace(s, M=5), group)  # other calls go on between


def check_backward(group: Group) -> None:
    """Autograd calls one kernel, too: nothing else makes tensor maps. It reads w transposed, as a forward may."""
    from tpkernels._native import _C

    emulated: Any = _C
    R = group.world_size
    ask(group)
    for case in (REPLICATED_GEMM, GEMM_REDUCE_SCATTER, ALL_GATHER_GEMM):
        for s in (
            Sizes(R=R, M=11, N=24, K=16, dtype=torch.bfloat16, integers=True),
            Sizes(R=R, M=7, N=8 * R + 8, K=40, dtype=torch.float16, batch=(2,)),
        ):
            arguments = case.arguments(s, group.rank)
            for x in arguments:
                assert x is not None
                x.requires_grad_()
            y = case.call(s, arguments, group)
            group.barrier()
            before = emulated.encoded_maps()
            group.barrier()
            y.backward(torch.ones_like(y))
            group.barrier()
            assert emulated.encoded_maps() > before, (case.name, s)
            check_gradient(case, s, group)
            if s.integers:  # the same of differentiable ops
                again = torch.autograd.grad(case.call(s, arguments, group).sum(), arguments[:2], create_graph=True)
                assert all(torch.equal(g, x.grad) for g, x in zip(again, arguments[:2], strict=True)), case.name
            x, w, *bias = (a.detach() for a in arguments if a is not None)
            assert torch.equal(case.call(s, [x, w.t().contiguous().t(), *bias], group), y), (case.name, s)


def check_codecs(group: Group) -> None:
    """Packed in the kernel: integers, whose products are the same on both paths, have the bits of path unfused."""
    R = group.world_size
    for codec, dtype, N in (
        ("fp16", torch.bfloat16, 512),
        ("bf16", torch.float16, 24),
        ("int8", torch.float16, 288),
        ("fp8", torch.bfloat16, 160),
    ):
        s = Sizes(R=R, M=20 * R - 1, N=N, K=24, dtype=dtype, codec=codec, integers=True)
        for case in (GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER):
            ask(group)
            found = group.explain(case.name, M=s.M, N=N, K=24, dtype=dtype, codec=codec)
            assert found.path == "fused" and f"codec {codec} sends" in found.reason, found
            group.reset_stats()
            fused = check_forward(case, s, group)
            sent, least = group.stats()["by_op"][case.name]["wire_bytes"], case.wire_bytes(s)
            assert 0.9 * least <= sent <= 1.15 * least + 512, (case.name, codec, sent, least)
            group._communicator.force()
            assert torch.equal(check_forward(case, s, group), fused), (case.name, codec)
        ask(group)
        backward = replace(s, N=8 * R, K=N)  # whose dx = dy @ w, and whose x, are as wide as that y
        found = group.explain("all_gather_gemm", M=20, N=8, K=N, dtype=dtype, codec=codec)
        assert found.path == "fused" and f"codec {codec} sends" in found.reason, found
        check_forward(ALL_GATHER_GEMM, backward, group)
        check_gradient(ALL_GATHER_GEMM, backward, group)
        found = group.explain("replicated_gemm", M=s.M, N=8, K=N, dtype=dtype, codec=codec)
        assert found.reason.endswith("; backward: fused"), found
        check_gradient(REPLICATED_GEMM, backward, group)


def check_pieces(group: Group) -> None:
    """More rows than a slot holds: several launches of one call, counted as one.

    The bytes of gemm_all_reduce are those of no other path: with three ranks one_shot sends half as much again.
    """
    s = Sizes(R=group.world_size, M=600, N=64, K=264, dtype=torch.bfloat16)
    ask(group)
    for case in FUSED:
        group.reset_stats()
        check_forward(case, s, group)
        sent, least = group.stats()["by_op"][case.name], case.wire_bytes(s)
        assert sent["calls"] == 1
        assert 0.99 * least <= sent["wire_bytes"] <= 1.05 * least + 4096, (case.name, sent, least)
        check_gradient(case, s, group)
    found = group.explain("gemm_reduce_scatter", M=600, N=64, K=88, dtype=torch.bfloat16)
    assert "2 pieces" in found.reason or not group.is_cpu, found


def check_explained(group: Group) -> None:
    sizes = {"M": 64, "N": 64, "K": 64}
    found = group.explain("gemm_all_reduce", **sizes, dtype=torch.bfloat16)
    assert found.path == "unfused"
    assert "fused only when asked for" in found.reason
    ask(group)
    assert group.explain("gemm_all_reduce", **sizes, dtype=torch.bfloat16).path == "fused"
    for op, forward, backward in (
        ("gemm_all_reduce", "fused", "nothing is sent"),
        ("gemm_reduce_scatter", "fused", "fused"),
        ("all_gather_gemm", "fused", "fused"),
        ("replicated_gemm", "unfused", "fused"),
    ):
        found = group.explain(op, **sizes, dtype=torch.bfloat16)
        assert found.path == forward and found.reason.endswith(f"; backward: {backward}"), found
    found = group.explain("replicated_gemm", **{**sizes, "K": 60}, dtype=torch.bfloat16)
    assert found.reason.endswith("; backward: unfused (fused was asked for, but it needs a K that is a multiple of 8)")
    for change, why in (
        ({"dtype": torch.float32}, "bfloat16 and float16 only"),
        ({"dtype": torch.bfloat16, "codec": "fp16"}, "codec fp16 needs an N that is a multiple of 512"),
        ({"dtype": torch.bfloat16, "codec": "int8", "N": 72}, "int8 and fp8 need an N that is a multiple of 32"),
        ({"dtype": torch.bfloat16, "N": 60}, "N that is a multiple of 8"),
    ):
        found = group.explain("gemm_all_reduce", **{**sizes, **change})
        assert found.path == "unfused"
        assert "fused was asked for, but " in found.reason and why in found.reason, found
    with pytest.raises(ValueError, match="path must be '', one_shot, two_shot, multicast or fused, got 'magic'"):
        group._communicator.force(path="magic")
    # What cannot be fused goes the other way and is right.
    check_forward(GEMM_ALL_REDUCE, Sizes(R=group.world_size, M=9, N=12, K=8), group)


@pytest.mark.parametrize("place", ["emu", "virtual"])
@pytest.mark.parametrize("R", [2, 3])
def test_a_fused_gemm_is_its_plain_program(R: int, place: str) -> None:
    run_at(place, check_fused, R)


def test_the_backward_of_a_fused_gemm_is_fused() -> None:
    run_at("emu", check_backward, 3)


@pytest.mark.parametrize("place", ["emu", "virtual"])
def test_a_fused_gemm_packs_what_it_sends(place: str) -> None:
    run_at(place, check_codecs, 3)


@pytest.mark.parametrize("place", ["emu", "virtual"])
def test_a_fused_gemm_larger_than_a_slot_goes_in_pieces(place: str) -> None:
    run_at(place, check_pieces, 3, arena_bytes=320 << 10)


@pytest.mark.parametrize("place", ["emu", "virtual"])
def test_explain_says_why_a_gemm_is_not_fused(place: str) -> None:
    run_at(place, check_explained, 2)
