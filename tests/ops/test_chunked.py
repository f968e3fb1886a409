"""Fused GEMMs between hosts, in chunks: the same bits in any number of chunks, and errors on every rank."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness.hosts import Hosts, open_group, two_hosts
from tests.harness.ops import assert_same_on_all_ranks, check_forward, check_gradient, on_cpu, raised
from tests.harness.ranks import nightly
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.errors import RankMismatchError
from tpkernels.testing import run_ranks, run_ranks_outcomes
from tpkernels.testing.case import Case, Sizes
from tpkernels.testing.cases import ALL_GATHER_GEMM, GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER, GEMMS
from tpkernels.testing.faults import come_late, kill_myself, stop_myself

CHUNKS = (1, 2, 3, 7)
SIZES = [
    Sizes(R=0, M=301, N=96, K=70),
    Sizes(R=0, M=83, N=1536, K=40),  # panels of columns, of whole blocks of every codec
    Sizes(R=0, M=60, N=96, K=512),  # the same in the backward, whose weights are transposed
    Sizes(R=0, M=137, N=250, K=48, batch=(1,), dim=1, bias=False),
    Sizes(R=0, M=11, N=40, K=24, batch=(30,), dim=0),
    Sizes(R=0, M=40, N=64, K=24, batch=(9,), dim=1),  # cut across the rows: never in chunks
]
PLACES: dict[str, Hosts | None] = {  # the hosts of transport `hierarchical`; None: `group`
    "group of 3": None,
    "2+2": two_hosts(4),
    "2+1": two_hosts(3),
    "3+1": [[0, 1, 2], [3]],
    "in turns": [[0, 2], [1, 3]],
    "2+2+2": [[0, 1], [2, 3], [4, 5]],
}
OPENINGS = 64  # bytes of a rank's in a call; over `hierarchical` those of a host go with its first sum, or before it
NOTICED_S = 5.0  # after its death a rank must be named by the others


def force(group: Group, chunks: int) -> None:
    """Let every fused GEMM run in so many chunks, where it has the rows; 0: as the rule says."""
    group._communicator.force_chunks(chunks)


def results(case: Case, s: Sizes, group: Group) -> list[Tensor]:
    """The op's result and gradients on this rank.

    Of integers every product is exact, in any number of rows: an engine's bits depend on it. Sums over the ranks are
    not, and so depend on their order: the weights and the bias of each rank are multiples of another power of two.
    """
    x, *others = case.arguments(s, group.rank)
    scaled = [other if other is None else other * 2.0 ** (-11 * group.rank) for other in others]
    leaves = [leaf if leaf is None else leaf.requires_grad_() for leaf in (x, *scaled)]
    y = case.call(s, leaves, group)
    dy, _, _ = case.gradients(s, group.rank)
    y.backward(dy)
    return [y.detach(), *(x.grad for x in leaves if x is not None and x.grad is not None)]


def sent_by_all(group: Group) -> int:
    """Bytes that all ranks have sent since the last time."""
    sent = group.stats()["wire_bytes"]
    group.reset_stats()
    total = sum(group.all_gather_ints(int(sent)))
    group.reset_stats()
    return total


def at(place: str, body: Callable[..., None], *args: Any) -> None:
    """body(group, *args) on ranks of these hosts."""
    hosts = PLACES[place]
    if hosts is None:
        on_cpu(body, 3, "group", *args)
    else:
        run_ranks(on_hosts, sum(map(len, hosts)), hosts, body, *args)


def on_hosts(hosts: Hosts, body: Callable[..., None], *args: Any) -> None:
    with open_group(hosts=hosts, transport="hierarchical") as group:
        group._communicator.set_link(1e9, 1e-12)  # sums that are there are no single exchange, which has more bytes
        body(group, *args)


def check_bits(group: Group, dtype: torch.dtype) -> None:
    around = 0 if group.transport == "group" else 3 * OPENINGS * group.world_size
    for case in GEMMS:
        for s in SIZES:
            for codec in ("none",) if dtype == torch.float64 else ("none", "fp16", "int8"):
                sized = replace(s, R=group.world_size, dtype=dtype, codec=codec, integers=True)
                force(group, 1)
                group.reset_stats()
                want = results(case, sized, group)
                sent = sent_by_all(group)
                for chunks in CHUNKS[1:]:
                    force(group, chunks)
                    found = results(case, sized, group)
                    for i, (a, b) in enumerate(zip(found, want, strict=True)):
                        assert torch.equal(a, b), f"{case.name} {sized}: tensor {i} in {chunks} chunks"
                    assert 0 <= sent_by_all(group) - sent <= around, f"{case.name} {sized} in {chunks} chunks"
                if case.output_cut(sized) is None:
                    assert_same_on_all_ranks(group, f"{case.name} {sized}", found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("place", ["group of 3", "2+2", "3+1", *nightly("2+1", "in turns", "2+2+2")])
def test_any_number_of_chunks_gives_the_same_bits_and_sends_the_same_bytes(place: str, dtype: torch.dtype) -> None:
    at(place, check_bits, dtype)


def check_references(group: Group) -> None:
    force(group, 3)
    for case in GEMMS:
        for s in SIZES:
            for dtype in (torch.float32, torch.float64, torch.float16):
                sized = replace(s, R=group.world_size, dtype=dtype)
                check_forward(case, sized, group)
                check_gradient(case, sized, group)


@pytest.mark.parametrize("place", ["group of 3", "2+2", *nightly("3+1", "in turns")])
def test_chunks_give_the_product_of_the_unsharded_program(place: str) -> None:
    at(place, check_references)


def check_rule(group: Group) -> None:
    """By the rule: large products in chunks, as explain reports; small ones, and those over a slow dim, in one."""
    R = group.world_size
    group._communicator.set_link(1e10)
    for op in ("gemm_all_reduce", "gemm_reduce_scatter", "all_gather_gemm"):
        assert group.explain(op, M=512, N=512, K=512).path == "unfused", op
    group._communicator.set_link(1e8)
    assert " over a link of 100 MB/s;" in group.explain("gemm_all_reduce", M=512, N=512, K=16).reason
    big, small = Sizes(R=R, M=512, N=1024, K=16), Sizes(R=R, M=16, N=512, K=16)
    for case, chunks in ((GEMM_ALL_REDUCE, 11), (GEMM_REDUCE_SCATTER, 6), (ALL_GATHER_GEMM, 2)):
        gathers = case is ALL_GATHER_GEMM
        for s, count in ((big, chunks), (small, 1)):
            sized = replace(s, N=s.N if s is big else s.K, K=s.N) if gathers else s  # a product that the link hides
            sizes = {"M": s.M // R if gathers else s.M, "N": sized.N, "K": sized.K}
            path = group.explain(case.name, **sizes).path
            if gathers and s is big:  # how many depends on the measured time of the product, too
                assert re.fullmatch(r"chunked\([2-9]\)", path), path
            else:
                assert path == ("unfused" if count == 1 else f"chunked({count})"), (case.name, path)
            assert group.explain(case.name, **sizes, dim=1).path == "unfused"
            group.reset_stats()
            check_forward(case, sized, group)
            row = group.stats()["by_op"][case.name]
            assert row["calls"] == 1
            assert row["wire_bytes"] >= case.wire_bytes(sized)


def test_explain_names_the_chunks_of_the_rule() -> None:
    on_cpu(check_rule, 2, "group")


def check_rule_on_hosts(group: Group, even: bool) -> None:
    """Products whose rows stay on this rank or go to it are cut only where every rank has connections."""
    calls = {"gemm_all_reduce": GEMM_ALL_REDUCE, "gemm_reduce_scatter": GEMM_REDUCE_SCATTER}
    for rate, hop in ((1e12, 1e-4), (1e7, 1e-4), (1e7, 10.0)):
        group._communicator.set_link(rate, hop)
        for op, case in {**calls, "all_gather_gemm": ALL_GATHER_GEMM}.items():
            gathers = case is ALL_GATHER_GEMM
            s = Sizes(R=group.world_size, M=512, N=1024, K=1024 if gathers else 16)
            path = group.explain(op, M=s.M // group.world_size if gathers else s.M, N=s.N, K=s.K).path
            cut = rate == 1e7 and (even or op == "gemm_all_reduce") and (hop < 1 or op == "gemm_reduce_scatter")
            assert path.startswith("chunked(") == cut, (op, rate, hop, path)
            group.reset_stats()
            check_forward(case, s, group)
            assert group.stats()["by_op"][op]["calls"] == 1


@pytest.mark.parametrize("place", ["2+2", "3+1"])
def test_the_rule_on_hosts_of_several_ranks(place: str) -> None:
    at(place, check_rule_on_hosts, place == "2+2")


def check_compiled(group: Group) -> None:
    force(group, 3)
    torch.manual_seed(group.rank)
    x, w = torch.randn(200, 48, requires_grad=True), torch.randn(64, 48, requires_grad=True)

    def layer(x: Tensor, w: Tensor) -> Tensor:
        return ops.gemm_all_reduce(ops.replicated_gemm(x, w, group=group).relu(), w.t(), group=group, codec="fp16")

    found = []
    for program in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        y = program(x, w)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, w))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiled_programs_take_chunks_too() -> None:
    on_cpu(check_compiled, 2, "group")


# --- faults


def check_disagreement(group: Group) -> None:
    odd = group.rank == 1
    w = torch.ones(64, 8)
    for chunks in CHUNKS:
        force(group, chunks)
        for call in (
            lambda: ops.gemm_all_reduce(torch.ones(200 + odd, 8), w, group=group),
            lambda: ops.gemm_reduce_scatter(torch.ones(200, 8), w[odd:], group=group),
            lambda: ops.all_gather_gemm(torch.ones(100, 8 + odd), torch.ones(9, 8 + odd), group=group, dim_size=200),
            lambda: (ops.gemm_reduce_scatter if odd else ops.gemm_all_reduce)(torch.ones(200, 8), w, group=group),
        ):
            assert "the ranks disagree" in raised(call, RankMismatchError)
            y = ops.gemm_all_reduce(torch.ones(200, 8), w, group=group)
            assert torch.equal(y, torch.full((200, 64), 8.0 * group.world_size)), "the group is usable"


@pytest.mark.parametrize("place", ["group of 3", "2+2", "3+1"])
def test_ranks_that_disagree_all_get_an_error_and_go_on(place: str) -> None:
    at(place, check_disagreement)


def fail_in_chunks(op: str, fault: str, victim: int, hosts: Hosts | None) -> tuple[str, str, float, str]:
    """All ranks call without a pause while the victim dies, stops, or stays away."""
    transport = "group" if hosts is None else "hierarchical"
    group = open_group(hosts=hosts, transport=transport, timeout_s=1.5 if fault != "dead" else 20.0)
    force(group, 3)
    R = group.world_size
    x = torch.ones(2000 // R if op == "all_gather_gemm" else 2000, 64)
    w = torch.ones(700, 64)
    options = {"dim_size": x.shape[0] * R} if op == "all_gather_gemm" else {}
    group.barrier()
    if group.rank == victim and fault == "dead":
        kill_myself(0.3)
    if group.rank == victim and fault == "stopped":
        stop_myself(0.3)
    start = time.monotonic()
    try:
        while True:
            getattr(ops, op)(x, w, group=group, **options)
            if group.rank == victim and fault == "late":
                come_late(3.0)
    except (RuntimeError, TimeoutError) as error:
        took = time.monotonic() - start
        return type(error).__name__, str(error), took, raised(group.barrier, RuntimeError)


@pytest.mark.parametrize(
    ("place", "op", "fault"),
    [
        *(("group of 3", op, "dead") for op in ("gemm_all_reduce", "gemm_reduce_scatter", "all_gather_gemm")),
        ("group of 3", "gemm_all_reduce", "stopped"),
        ("group of 3", "all_gather_gemm", "late"),
        ("2+2", "gemm_all_reduce", "dead"),
        ("3+1", "gemm_all_reduce", "late"),
        *nightly(*(("group of 3", op, "stopped") for op in ("gemm_reduce_scatter", "all_gather_gemm"))),
        *nightly(*(("group of 3", op, "late") for op in ("gemm_all_reduce", "gemm_reduce_scatter"))),
        *nightly(*(("2+2", op, "dead") for op in ("gemm_reduce_scatter", "all_gather_gemm"))),
        *nightly(("2+2", "gemm_reduce_scatter", "stopped"), ("2+2", "all_gather_gemm", "late")),
        *nightly(("3+1", "gemm_all_reduce", "dead"), ("3+1", "gemm_all_reduce", "stopped")),
    ],
)
def test_a_rank_that_is_lost_during_a_chunk_is_named_in_bounded_time(place: str, op: str, fault: str) -> None:
    hosts = PLACES[place]
    R = 3 if hosts is None else sum(map(len, hosts))
    outcomes = run_ranks_outcomes(fail_in_chunks, R, op, fault, 1, hosts, timeout=60.0, stopped_for_good=True)
    for outcome in (outcomes[0], *outcomes[2:]):
        assert outcome.finished, outcome.error
        kind, text, took, later = outcome.value
        assert kind == ("PeerLostError" if fault == "dead" else "TimeoutError"), text
        assert re.search(r"ranks? \[?1\b", text), text
        assert op in text and "call " in text, text
        assert took < 0.3 + (20.0 if fault != "dead" else NOTICED_S), took
        assert "broken" in later, later


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def comes_to(threads: int) -> bool:
    """Whether there are so many threads, within 5 s: those that ask a store live for a moment."""
    until = time.monotonic() + 5.0
    while num_threads() != threads and time.monotonic() < until:
        time.sleep(0.01)  # between two looks
    return num_threads() == threads


def check_thread(group: Group) -> None:
    """The thread begins with the first chunk, serves every call, and ends with the group; a forked child has none."""
    x, w = torch.ones(200, 8), torch.ones(64, 8)
    ops.gemm_all_reduce(x, w, group=group)
    before = num_threads()
    with Group.open(group.process_group, transport="group") as other:
        idle = num_threads()
        for chunks in (3, 2, 7):
            force(other, chunks)
            ops.gemm_all_reduce(x, w, group=other)
        assert comes_to(idle + 1)
        pid = os.fork()
        if pid == 0:
            text = raised(lambda: ops.gemm_all_reduce(x, w, group=other), ValueError)
            other.close()
            del other
            os._exit(0 if "forked" in text else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert ops.gemm_all_reduce(x, w, group=other)[0, 0] == 8.0 * group.world_size
    assert comes_to(before)


def test_the_thread_of_a_group_ends_with_it_and_is_not_inherited() -> None:
    on_cpu(check_thread, 2, "group")
