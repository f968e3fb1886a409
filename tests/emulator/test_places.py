"""Bits and paths of ops where ranks are devices: emulated ones here, GPUs where there are some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness.ops import FLOATS, INTEGERS, check_forward, digest, is_device, run_at, there
from tests.harness.places import PLACES, open_beside
from tests.harness.ranks import DEVICES, nightly
from tpkernels import PeerLostError, ops
from tpkernels.comm.group import Group
from tpkernels.shard import part
from tpkernels.testing.case import Case, Sizes
from tpkernels.testing.cases import (
    ALL_GATHER,
    ALL_REDUCE,
    COLLECTIVES,
    GEMM_ALL_REDUCE,
    GEMM_REDUCE_SCATTER,
    GEMMS,
    REDUCE_SCATTER,
    VOCAB_EMBEDDING,
)

ON_DEVICES = pytest.mark.parametrize("place", DEVICES)

# --- bits


def results(case: Case, s: Sizes, group: Group) -> list[Tensor]:
    """The op's result and gradients on this rank."""
    leaves = there(group, case.arguments(s, group.rank))
    for x in leaves:
        if x is not None and x.is_floating_point():
            x.requires_grad_()
    y = case.call(s, leaves, group)
    if not y.requires_grad:
        return [y]
    dy = case.upstream(s, group.rank)
    y.backward(dy.to(y.device))
    return [y.detach(), *(x.grad for x in leaves if x is not None and x.grad is not None)]


def bits(group: Group, integers: bool, path: str = "") -> dict[str, str]:
    """Digests of what this rank gets. What multiplies is another one on each device, so GEMMs take integers."""
    if path:
        group._communicator.force(path=path)
    found = {}
    for s in (
        Sizes(R=group.world_size, M=7, N=5, K=11),
        Sizes(R=group.world_size, M=3, N=9, K=40, batch=(2,), dim=1),
        Sizes(R=group.world_size, M=130, N=301, K=65, V=1201),
    ):
        for case in (*COLLECTIVES, VOCAB_EMBEDDING) if not integers else GEMMS:
            for dtype in FLOATS:
                for codec in ("none", "fp16", "bf16"):
                    if codec == "none" or (dtype != torch.float64 and "codec" in case.options(s)):
                        chosen = replace(s, dtype=dtype, codec=codec, integers=integers)
                        found[f"{case.name} {chosen}"] = digest(*results(case, chosen, group))
            for dtype in INTEGERS if case in (ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER) else ():
                chosen = replace(s, dtype=dtype)
                y = case.call(chosen, there(group, case.arguments(chosen, group.rank)), group)
                found[f"{case.name} {chosen}"] = digest(y)
    return found


def assert_same_bits(got: list[dict[str, str]], want: list[dict[str, str]]) -> None:
    for rank, (here, there_) in enumerate(zip(got, want, strict=True)):
        assert len(here) == len(there_) > 50
        different = [name for name, bits_ in here.items() if there_[name] != bits_]
        assert not different, f"rank {rank}: {different}"


@pytest.fixture(scope="module")
def of_processes() -> Callable[[int, bool], list[dict[str, str]]]:
    """What the cpu place gets, once for each number of ranks."""
    known: dict[tuple[int, bool], list[dict[str, str]]] = {}

    def find(R: int, integers: bool) -> list[dict[str, str]]:
        if (R, integers) not in known:
            known[R, integers] = PLACES["cpu"].run(bits, R, integers)
        return known[R, integers]

    return find


@ON_DEVICES
@pytest.mark.parametrize("R", [2, 3, 4])
@pytest.mark.parametrize("integers", [False, True], ids=["collectives", "gemms"])
def test_devices_and_processes_get_the_same_bits(
    integers: bool, R: int, place: str, of_processes: Callable[[int, bool], list[dict[str, str]]]
) -> None:
    assert_same_bits(run_at(place, bits, R, integers), of_processes(R, integers))


@pytest.mark.parametrize("place", ["emu", "virtual"])
@pytest.mark.parametrize("path", ["one_shot", "two_shot"])
def test_every_path_gives_the_same_bits(
    path: str, place: str, of_processes: Callable[[int, bool], list[dict[str, str]]]
) -> None:
    assert_same_bits(run_at(place, bits, 3, False, path), of_processes(3, False))


@pytest.mark.parametrize("seed", [1, *nightly(2, 3)])
def test_the_order_of_blocks_and_threads_changes_no_bit(
    seed: int, of_processes: Callable[[int, bool], list[dict[str, str]]]
) -> None:
    assert_same_bits(run_at("emu", bits, 2, False, seed=seed), of_processes(2, False))


# --- what only devices have


def check_parts(group: Group) -> None:
    """GEMMs in parts, of which one travels while the next is multiplied."""
    force, R = group._communicator.force, group.world_size
    for s in (Sizes(R=R, M=13, N=10, K=12, integers=True), Sizes(R=R, M=300, N=70, K=8, integers=True)):
        for dtype in FLOATS:
            for codec in ("none", "fp16") if dtype != torch.float64 else ("none",):
                chosen = replace(s, dtype=dtype, codec=codec)
                for case in GEMMS:
                    force()
                    whole = results(case, chosen, group)
                    for parts in (2, 3, 64):
                        force(parts=parts)
                        for a, b in zip(results(case, chosen, group), whole, strict=True):
                            assert torch.equal(a, b), (case.name, chosen, parts)
                        check_forward(case, chosen, group)
                    force()
    path = group.explain("gemm_all_reduce", M=1 << 14, N=1 << 13, K=1 << 10, dtype=torch.bfloat16).path
    assert path.startswith("chunked") or group.transport != "peer" or R == 1


@ON_DEVICES
@pytest.mark.parametrize("R", [1, 3, *nightly(2)])
def test_gemms_in_parts_give_the_bits_of_whole_ones(R: int, place: str) -> None:
    run_at(place, check_parts, R)


def check_room(group: Group) -> None:
    """A product leaves multiprocessors to what is sent beside it: the first of three parts has nothing beside it."""
    from tpkernels._native import _C

    emulated: Any = _C
    x, w = torch.ones(9, 8), torch.ones(6, 8)
    for parts, limits in ((1, []), (3, [48, 0, 48, 0])):
        group._communicator.force(parts=parts)
        emulated.take_product_limits()
        ops.gemm_all_reduce(x, w, group=group)
        assert emulated.take_product_limits() == limits, parts


def test_products_leave_room_for_what_is_sent_beside_them() -> None:
    run_at("emu", check_room, 2)


def check_blocks_and_pieces(group: Group) -> None:
    R, rank = group.world_size, group.rank
    for blocks in (1, 3, 64):
        for path in ("one_shot", "two_shot"):
            group._communicator.force(path=path, blocks=blocks)
            for n in (1, 5, 4097, 200_003):
                x = (torch.arange(n) % 1013).float() + rank
                want = (torch.arange(n) % 1013).float() * R + R * (R - 1) // 2
                assert torch.equal(ops.all_reduce(x, group=group), want), (blocks, path, n)
                assert torch.equal(ops.reduce_scatter(x, group=group), part(want, 0, R, rank)), (blocks, path, n)
                mine = part(want, 0, R, rank)
                assert torch.equal(ops.all_gather(mine, group=group, dim_size=n), want), (blocks, path, n)


@ON_DEVICES
@pytest.mark.parametrize("R", [3, *nightly(2)])
def test_any_number_of_blocks_and_pieces_gives_the_same_sum(R: int, place: str) -> None:
    run_at(place, check_blocks_and_pieces, R, arena_bytes=1 << 18)


def check_a_shared_device(group: Group) -> None:
    """Ranks whose blocks wait for each other on one device must all fit on it."""

    def blocks() -> int:
        return int(group.explain("all_reduce", numel=1 << 24).reason.split()[-2])

    alone, R = blocks(), group.world_size
    group._communicator.share_device(R)
    assert 1 <= blocks() <= alone // 2
    x = torch.arange(1 << 16).float() + group.rank
    assert torch.equal(ops.all_reduce(x, group=group), torch.arange(1 << 16) * float(R) + R * (R - 1) / 2)
    for ranks in (0, R + 1):
        with pytest.raises(ValueError, match=rf"share_device: ranks must be in \[1, {R}\], got {ranks}"):
            group._communicator.share_device(ranks)


@pytest.mark.parametrize("R", [2, 8])
def test_ranks_that_share_a_device_take_their_share_of_it(R: int) -> None:
    run_at("emu", check_a_shared_device, R)


def check_the_switch_sums(group: Group) -> None:
    group._communicator.force(path="multicast")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((3, 5), (128, 257)):
            s = Sizes(R=group.world_size, M=shape[0], N=shape[1], dtype=dtype, integers=True)
            check_forward(ALL_REDUCE, s, group)
    assert group.explain("all_reduce", numel=1 << 20).path == "multicast"


@pytest.mark.parametrize("place", ["emu", "real"])
@pytest.mark.parametrize("R", [2, 4])
def test_sums_of_the_switch_are_right_where_they_are_asked_for(R: int, place: str) -> None:
    run_at(place, check_the_switch_sums, R, multicast=True)


def check_several_groups(group: Group) -> None:
    R = group.world_size
    with open_beside(group) as second, open_beside(group, transport="group") as third:
        groups = (group, second, third)
        for i in range(60):
            here = groups[i % 3]
            n = 1 + (i * 37) % 5000
            y = ops.all_reduce(torch.full((n,), float(i + here.rank)), group=here)
            assert torch.equal(y, torch.full((n,), float(R * i + R * (R - 1) // 2))), i
        assert [g.stats()["by_op"]["all_reduce"]["calls"] for g in groups] == [20, 20, 20]
        for other in (second, third):
            other.barrier()


@pytest.mark.parametrize("place", ["emu", "real"])
@pytest.mark.parametrize("R", [2, 3])
def test_several_groups_of_devices_stay_apart(R: int, place: str) -> None:
    run_at(place, check_several_groups, R)


def check_stats(group: Group) -> None:
    s = Sizes(R=group.world_size, M=512, N=256)
    for codec in ("none", "fp16", "bf16"):
        for case in (ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER):
            group.reset_stats()
            group._communicator.force(path="two_shot")
            check_forward(case, replace(s, codec=codec), group)
            sent, least = group.stats()["by_op"][case.name], case.wire_bytes(replace(s, codec=codec))
            assert sent["calls"] == 1
            assert 0.99 * least <= sent["wire_bytes"] <= 1.05 * least + 4096, (case.name, codec, sent, least)


@ON_DEVICES
def test_the_bytes_that_devices_send_are_counted(place: str) -> None:
    run_at(place, check_stats, 3)


def check_explain_and_rest(group: Group) -> None:
    R = group.world_size
    assert is_device(group)
    assert group.explain().path == group.transport
    for op in ("all_reduce", "reduce_scatter", "all_gather"):
        found = group.explain(op, numel=1000, dtype=torch.bfloat16)
        assert found.path in ("one_shot", "two_shot", "direct", "local", "exchange"), found
        assert found.reason
    for case in (GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER):
        assert group.explain(case.name, M=64, N=64, K=64).path == "unfused"
    for op, dtype in (("all_reduce", torch.int32), ("reduce_scatter", torch.uint8), ("all_gather", torch.bool)):
        assert group.explain(op, numel=3, dtype=dtype).reason
    with pytest.raises(ValueError, match="explain: all_reduce takes no int32 with codec fp16"):
        group.explain("all_reduce", numel=3, dtype=torch.int32, codec="fp16")
    with pytest.raises(ValueError, match=r"explain: codec must be one of none, .*, got 'zip'"):
        group.explain("all_reduce", numel=3, codec="zip")
    with pytest.raises(ValueError, match="explain: dtype must be one of"):
        group.explain("gemm_all_reduce", M=3, N=3, K=3, dtype=torch.int32)
    assert group.all_gather_ints(7 * group.rank) == [7 * r for r in range(R)]
    group.barrier()
    group.check()
    with pytest.raises(ValueError, match=r"do not fit into the arena's heap|has no arena"):
        group.empty(1 << 30)


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize("R", [1, 3])
def test_groups_of_devices_answer_as_others_do(R: int, place: str) -> None:
    run_at(place, check_explain_and_rest, R)


def check_a_closed_group_is_refused(group: Group) -> None:
    x, w = there(group, [torch.ones(4, 6), torch.ones(3, 6)])
    w.requires_grad_()
    with open_beside(group) as short:
        y = ops.replicated_gemm(x, w, group=short)
        group.barrier()
    for call in (
        lambda: ops.all_reduce(x, group=short),
        lambda: ops.gemm_all_reduce(x, w, group=short),
        lambda: ops.replicated_gemm(x, w, group=short),
        lambda: y.sum().backward(),
    ):
        with pytest.raises(PeerLostError, match=r"is not open in this process|this rank closed the group"):
            call()


@pytest.mark.parametrize("place", ["cpu", *DEVICES])
def test_a_closed_group_is_refused_alike_by_all_ops(place: str) -> None:
    run_at(place, check_a_closed_group_is_refused, 2)


def check_a_tensor_of_the_arena_outlives_its_group(group: Group) -> None:
    for _ in range(3):
        with open_beside(group) as short:
            x = short.empty((100, 3)).fill_(group.rank)
            y = ops.all_reduce(x, group=short)
            group.barrier()
        assert torch.equal(x, torch.full((100, 3), float(group.rank)))
        assert torch.equal(y, torch.full((100, 3), group.world_size * (group.world_size - 1) / 2))
        del x


@pytest.mark.parametrize("place", ["emu", "real"])
def test_a_tensor_of_the_arena_outlives_its_group(place: str) -> None:
    run_at(place, check_a_tensor_of_the_arena_outlives_its_group, 2)
