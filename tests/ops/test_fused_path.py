"""Path fused of the sharded GEMMs, on emulated devices and on GPUs: asked for, explained, the plain program."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.ops import assert_within, check_forward, check_gradient, run_at
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.comm.paths import open_with_paths
from tpkernels.errors import RankMismatchError
from tpkernels.layers import ColumnParallelLinear, RowParallelLinear
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
    assert "not fused: shards of the ranks are not known to be of one size" in found.reason or not group.is_cpu, found
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


def check_the_rule(group: Group) -> None:
    """Nobody asks: what was measured decides where it is there, else the model."""
    from tpkernels._native import _C

    emulated: Any = _C
    s = Sizes(R=group.world_size, M=8, N=16, K=8 * group.world_size, dtype=torch.bfloat16, integers=True)
    sizes = {"M": 8, "N": 16, "K": 8, "dtype": torch.bfloat16}
    call = ("gemm_all_reduce", "bfloat16", "none", 8, 16, 8, False)
    measured = group._communicator.add_measured_path

    def kernels_taken() -> int:
        group.barrier()
        before = emulated.encoded_maps()
        group.barrier()
        check_forward(GEMM_ALL_REDUCE, s, group)
        group.barrier()
        return emulated.encoded_maps() - before

    measured(*call, 1.0, 2.0)
    assert "not known to be of one size" in group.explain("gemm_all_reduce", **sizes).reason
    assert kernels_taken() == 0, "a rank that has this size does not know that the others do"
    group.note_shards(True)
    found = group.explain("gemm_all_reduce", **sizes)
    assert found.path == "fused" and "measured us: fused 1, otherwise 2" in found.reason, found
    assert kernels_taken() > 0
    measured(*call, 3.0, 2.0)
    assert "not fused: measured us: fused 3, otherwise 2" in group.explain("gemm_all_reduce", **sizes).reason
    assert kernels_taken() == 0
    for op, rows in (("gemm_reduce_scatter", 9), ("all_gather_gemm", 9), ("replicated_gemm", 9)):
        found = group.explain(op, M=rows, N=16, K=8, dtype=torch.bfloat16)
        assert "expected us (a model, not measured): fused " in found.reason and found.path == "unfused", found
    group.note_shards(False)
    measured(*call, 1.0, 2.0)
    group.note_shards(True)
    assert group.explain("gemm_all_reduce", **sizes).path == "unfused", "an uneven shard is not forgotten"
    with pytest.raises(ValueError, match="op must be a GEMM that sends, got replicated_gemm"):
        measured("replicated_gemm", *call[1:], 1.0, 2.0)
    with pytest.raises(ValueError, match="times must be positive, got 0 and 2"):
        measured(*call, 0.0, 2.0)


def check_even_promise(group: Group) -> None:
    """Sizes that were noted as even and are not: all ranks raise the same error at once, and the group goes on."""
    group.note_shards(True)
    group._communicator.add_measured_path("gemm_all_reduce", "bfloat16", "none", 8, 16, 8, False, 1.0, 2.0)
    K = 8 if group.rank == 0 else 16
    with pytest.raises(RankMismatchError, match="gemm_all_reduce"):
        ops.gemm_all_reduce(torch.ones(8, K).bfloat16(), torch.ones(16, K).bfloat16(), group=group)
        group.check()
    group.barrier()
    check_forward(ALL_REDUCE, Sizes(R=group.world_size, M=5, N=16, K=8, dtype=torch.bfloat16), group)


def check_layers(group: Group) -> None:
    """Parallel linears note whether their shards are even."""
    R = group.world_size

    def is_known() -> bool:
        reason = group.explain("gemm_all_reduce", M=8, N=8, K=8, dtype=torch.bfloat16).reason
        return "not known to be of one size" not in reason

    assert not is_known()
    layer = RowParallelLinear(8 * R, 8, group=group)
    assert is_known()
    layer.requires_grad_(False)
    ColumnParallelLinear(8, 24 * R, unit=8, group=group)
    assert is_known()
    RowParallelLinear(8 * (R + 1), 8, unit=8, group=group)
    assert not is_known()
    RowParallelLinear(8 * R, 8, group=group)
    assert not is_known()


def check_tuned(group: Group, folder: str) -> None:
    """The times are used and kept, those of paths that cannot be taken are not; a group that opens reads them."""
    os.environ |= {"XDG_CACHE_HOME": folder, "TPKERNELS_PROFILE": "auto"}  # of all ranks, which are threads
    try:
        check_tuned_in(group, folder)
    finally:
        os.environ["TPKERNELS_PROFILE"] = "off"


def check_tuned_in(group: Group, folder: str) -> None:
    communicator = group._communicator
    sizes = {"M": 8, "N": 16, "K": 8, "dtype": torch.bfloat16}
    assert group.explain("gemm_all_reduce", tune=True, **sizes).measured == {}, "sizes of the others are not known"
    group.note_shards(True)
    assert open_with_paths(communicator, "emulated") is None
    for op in ("gemm_all_reduce", "gemm_reduce_scatter", "all_gather_gemm", "replicated_gemm"):
        found = group.explain(op, tune=True, **sizes)
        ways = (op != "replicated_gemm") * ["fused", "others"]
        ways += (op != "gemm_all_reduce") * ["backward fused", "backward others"]
        assert sorted(found.measured) == sorted(ways), found
        for way in ("", "backward ")[op == "replicated_gemm" : 1 + (op != "gemm_all_reduce")]:
            fused = found.measured[f"{way}fused"] < found.measured[f"{way}others"]
            reason = found.reason.partition("; backward: ")[2 if way else 0]
            assert "measured us: fused " in reason, found
            assert (reason.startswith("fused") if way else found.path == "fused") == fused, found
        assert group.all_gather_ints(hash(found.reason)) == [hash(found.reason)] * group.world_size
    assert group.explain("gemm_all_reduce", tune=True, **{**sizes, "N": 60}).measured == {}
    group.barrier()
    (file,) = Path(folder).rglob("paths-*.json")
    assert len(json.loads(file.read_text())["paths"]) == 6
    assert open_with_paths(communicator, "emulated") == file
    group.barrier()  # nobody switches the profile off before all have read it


def check_unlike_gradients(group: Group, op: str, unlike: str) -> None:
    """Rank 1 wants one gradient less: it is of no concern to the others, or all ranks raise the same error."""
    case = {c.name: c for c in (REPLICATED_GEMM, GEMM_REDUCE_SCATTER, ALL_GATHER_GEMM)}[op]
    ask(group)
    s = Sizes(R=group.world_size, M=10, N=16, K=24, dtype=torch.bfloat16, integers=True)
    arguments = case.arguments(s, group.rank)
    for x, name in zip(arguments, "xwb", strict=True):
        assert x is not None
        x.requires_grad_(group.rank == 0 or name != unlike)
    dy, wanted, bounds = case.gradients(s, group.rank)
    y = case.call(s, arguments, group)
    group.barrier()
    if (op, unlike) in (("replicated_gemm", "w"), ("gemm_reduce_scatter", "w")):
        y.backward(dy)
        for x, want, bound in zip(arguments, wanted, bounds, strict=True):
            assert x is not None and want is not None and bound is not None
            assert (x.grad is None) == (not x.requires_grad)
            if x.grad is not None:
                assert_within(x.grad, want, bound, f"{op} without {unlike}")
        return group.barrier()

    def calls() -> None:
        y.backward(dy)
        if group.rank == 1 and (op, unlike) != ("gemm_reduce_scatter", "x"):  # its next call meets what it left out
            group.barrier()
        group.check()

    with pytest.raises((RankMismatchError, TimeoutError)) as error:
        calls()
    # A rank that finds out inside its backward makes no more calls; the other then waits for one until the deadline.
    assert (op, unlike) == ("all_gather_gemm", "x") or error.type is RankMismatchError, error


def test_nobody_asks_and_the_rule_decides() -> None:
    run_at("emu", check_the_rule, 2)


def test_shards_that_are_not_as_noted_are_an_error_of_all_ranks() -> None:
    run_at("emu", check_even_promise, 2)


def test_parallel_linears_note_even_shards() -> None:
    run_at("emu", check_layers, 3)


def test_paths_are_measured_on_request_and_kept(tmp_path: Path) -> None:
    run_at("emu", check_tuned, 2, str(tmp_path))


@pytest.mark.parametrize("unlike", ["x", "w"])
@pytest.mark.parametrize("op", ["replicated_gemm", "gemm_reduce_scatter", "all_gather_gemm"])
def test_ranks_that_want_unlike_gradients_are_right_or_find_out(op: str, unlike: str) -> None:
    run_at("emu", check_unlike_gradients, 2, op, unlike, faulty=True, timeout_s=3.0)


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
