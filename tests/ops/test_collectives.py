"""all_reduce, reduce_scatter and all_gather against their unsharded programs, on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.harness.ops import FLOATS, INTEGERS, assert_same_on_all_ranks, assert_within, check_forward, raised
from tests.harness.ranks import BOTH_TRANSPORTS, Run, on_devices, on_processes, on_ranks
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.shard import part, part_sizes
from tpkernels.testing import run_ranks
from tpkernels.testing.case import Sizes, unit
from tpkernels.testing.cases import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER

RANKS = pytest.mark.parametrize("R", [1, 2, 3, 4])
TRANSPORTS = ("shm", "group")
SHAPES = {  # M, N, batch, dim
    "even": (12, 8, (), 0),
    "uneven": (7, 5, (), 0),
    "inner dim": (5, 7, (), 1),
    "batch": (6, 4, (3, 2), 2),
    "one element": (1, 1, (), 0),
    "no tokens": (0, 5, (), 0),
    "no columns": (5, 0, (), 0),
    "many pieces": (211, 1027, (), 0),
}


def sizes(R: int, shape: str) -> Sizes:
    """Sizes of that name."""
    M, N, batch, dim = SHAPES[shape]
    return Sizes(R=R, M=M, N=N, batch=batch, dim=dim)


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(1, 3))
def check_every_dtype_and_op(group: Group) -> None:
    for shape in SHAPES:
        s = sizes(group.world_size, shape)
        large = shape == "many pieces"
        for dtype in (torch.float32, torch.bfloat16, torch.int32) if large else FLOATS + INTEGERS:
            for op in ("sum", "max") if large else ("sum", "avg", "max", "min"):
                if op == "avg" and not dtype.is_floating_point:
                    continue
                for case in (ALL_REDUCE, REDUCE_SCATTER):
                    check_forward(case, replace(s, dtype=dtype, op=op), group)
            check_forward(ALL_GATHER, replace(s, dtype=dtype), group)


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(2, 4), exchanging=(3,))
def check_integers_in_floats_are_exact(group: Group) -> None:
    for shape in SHAPES:
        for dtype in FLOATS:
            for case in (ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER):
                check_forward(case, replace(sizes(group.world_size, shape), dtype=dtype, integers=True), group)


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(2, 3), exchanging=(3,))
def check_codecs_stay_within_their_bound(group: Group) -> None:
    for shape in SHAPES:
        for codec in ("fp16", "bf16"):
            for dtype in (torch.float32,) if shape == "many pieces" else FLOATS[:3]:
                s = replace(sizes(group.world_size, shape), dtype=dtype, codec=codec)
                for case in (ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER):
                    y = check_forward(case, s, group)
                    if case.output_cut(s) is None:
                        assert_same_on_all_ranks(group, f"{case.name} {s}", y)
                check_forward(ALL_REDUCE, replace(s, op="avg"), group)
                check_forward(REDUCE_SCATTER, replace(s, op="avg"), group)


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(2, 3))
def check_any_strides(group: Group) -> None:
    R, rank = group.world_size, group.rank
    whole = torch.arange(R * 6 * 10, dtype=torch.float32).reshape(R, 6, 10)
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda x: x.t().contiguous().t(),
        "every second": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
        "expanded": lambda x: x[:1].expand(6, 10),
        "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(6, 10),
    }
    for name, layout in layouts.items():
        views = [layout(x) for x in whole]
        x, total = views[rank], torch.stack([v.clone() for v in views]).sum(0)
        assert torch.equal(ops.all_reduce(x, group=group), total), name
        for dim in (0, 1, -1):
            mine = ops.reduce_scatter(x, dim, group=group)
            assert torch.equal(mine, part(total, dim % 2, R, rank)), (name, dim)
            assert torch.equal(ops.all_gather(x, dim, group=group), torch.cat(views, dim)), (name, dim)


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(2, 3, 4))
def check_what_lies_in_the_arena(group: Group) -> None:
    R, rank = group.world_size, group.rank
    make = group.empty if group.transport in ("shm", "peer") else torch.empty
    for shape in ((5,), (301, 1000)):
        x = make(shape, dtype=torch.float32)
        x.copy_(torch.arange(x.numel()).reshape(shape) % 97 + rank)
        want = torch.stack([torch.arange(x.numel()).reshape(shape) % 97 + r for r in range(R)]).sum(0).float()
        assert torch.equal(ops.all_reduce(x, group=group), want)
        assert torch.equal(ops.reduce_scatter(x, group=group), part(want, 0, R, rank))
        view = x[1:]
        assert torch.equal(ops.all_reduce(view, group=group), want[1:])
        assert ops.all_reduce_(x, group=group) is x
        assert torch.equal(x, want)


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(1, 3))
def check_in_place(group: Group) -> None:
    R, rank = group.world_size, group.rank
    for dtype in (*FLOATS, torch.int32):
        for shape in ((), (1,), (0,), (7, 3), (300, 700)):
            x = torch.full(shape, rank + 1, dtype=dtype)
            before = x._version
            assert ops.all_reduce_(x, group=group) is x
            assert torch.equal(x, torch.full(shape, R * (R + 1) // 2, dtype=dtype))
            assert x._version > before, "autograd must see that x changed"
    base = torch.zeros(4, 6)
    base[:, ::2] = rank + 1
    ops.all_reduce_(base[:, ::2], group=group, op="max")
    assert torch.equal(base[:, ::2], torch.full((4, 3), float(R)))
    assert torch.equal(base[:, 1::2], torch.zeros(4, 3)), "only the view may change"


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(1, 2, 4), exchanging=(3,))
def check_gather_of_any_sizes_and_dtypes(group: Group) -> None:
    R, rank = group.world_size, group.rank
    dtypes = (torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.int16, torch.float64)
    for dtype in dtypes:
        parts = [(torch.arange(3 * (r + 1)) % 2 + r % 2).reshape(r + 1, 3).to(dtype) for r in range(R)]
        got = ops.all_gather(parts[rank], group=group)
        want = torch.cat(parts).view(torch.uint8) if dtype.itemsize == 1 else torch.cat(parts)
        assert torch.equal(got.view(torch.uint8) if dtype.itemsize == 1 else got, want), dtype
    z = torch.complex(torch.ones(2), torch.full((2,), float(rank)))
    got = ops.all_gather(z.conj(), group=group)
    assert torch.equal(got, torch.cat([torch.complex(torch.ones(2), torch.full((2,), -float(r))) for r in range(R)]))
    assert torch.equal(ops.all_reduce(z.conj().imag, group=group), torch.full((2,), -R * (R - 1) / 2.0))
    n = 2 * R + 1
    mine = part_sizes(n, R)[rank]
    assert ops.all_gather(torch.ones(mine, 2), group=group, dim_size=n).shape == (n, 2)


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(2,))
def check_nan_and_infinity_are_never_hidden(group: Group) -> None:
    last = group.world_size - 1
    for n in (5, 200_000):
        for dtype in FLOATS:
            for op in ("sum", "avg", "max", "min"):
                x = torch.full((n,), float(group.rank), dtype=dtype)
                if group.rank == last:
                    x[3], x[4] = float("nan"), float("inf")
                y = ops.all_reduce(x, group=group, op=op)
                assert y[3].isnan(), (n, dtype, op)
                assert y[:3].isfinite().all()
                assert y[4].isinf() or op == "min"
        for codec in ("fp16", "bf16"):
            for bad in (float("nan"), float("inf"), float("-inf")):
                x = torch.ones(n)
                if group.rank == last:
                    x[3] = bad
                assert not ops.all_reduce(x, group=group, codec=codec)[3].isfinite() or group.world_size == 1


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(1, 3))
def check_codecs_keep_large_and_small_values(group: Group) -> None:
    for value in (333_824.0, 1e-6, 1e30, 3e-38):
        for codec, error in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):
            x = torch.full((3000,), value)
            y = ops.all_reduce(x, group=group, codec=codec, op="avg")
            bound = torch.full_like(y, (2 * error + 8 * unit(torch.float32)) * value, dtype=torch.float64)
            assert_within(y, x.double(), bound, f"{codec} {value}")


@on_processes(globals())
def test_collectives_equal_their_unsharded_program(run: Run) -> None:
    run()


@on_devices(globals())
def test_collectives_of_devices_equal_their_unsharded_program(run: Run) -> None:
    run()


def check_a_hundred_megabytes() -> None:
    with Group.open() as group:
        R, rank = group.world_size, group.rank
        x = (torch.arange(25_000_000, dtype=torch.int64) % 1013).float() + rank
        want = (torch.arange(25_000_000, dtype=torch.int64) % 1013).float() * R + R * (R - 1) // 2
        assert torch.equal(ops.all_reduce(x, group=group), want)
        mine = ops.reduce_scatter(x, group=group)
        assert torch.equal(mine, part(want, 0, R, rank))
        assert torch.equal(ops.all_gather(mine, group=group), want)


@pytest.mark.parametrize("R", [2, 3])
def test_messages_of_a_hundred_megabytes_run_in_pieces(R: int) -> None:
    run_ranks(check_a_hundred_megabytes, R)


def check_two_groups_interleaved() -> None:
    R = dist.get_world_size()
    with Group.open() as first, Group.open(transport="group" if R > 2 else "auto") as second:
        for i in range(1000):
            n = 1 + (i * 37) % 5000
            group = first if i % 3 else second
            y = ops.all_reduce(torch.full((n,), float(i + group.rank)), group=group)
            assert torch.equal(y, torch.full((n,), float(R * i + R * (R - 1) // 2))), i
            if i % 10 == 0:
                assert ops.all_gather(torch.tensor([group.rank]), group=second).tolist() == list(range(R))
        assert first.stats()["by_op"]["all_reduce"]["calls"] + second.stats()["by_op"]["all_reduce"]["calls"] == 1000


@pytest.mark.parametrize("R", [2, 4])
def test_a_thousand_calls_on_two_groups_interleaved_stay_apart(R: int) -> None:
    run_ranks(check_two_groups_interleaved, R)


def check_subgroups() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    subgroups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = subgroups[rank // 2]
    with Group.open(mine) as pair, Group.open() as everyone:
        for _ in range(20):
            assert ops.all_reduce(torch.tensor([rank]), group=pair).item() == (1 if rank < 2 else 5)
            assert ops.all_reduce(torch.tensor([rank]), group=everyone).item() == world * (world - 1) // 2
            assert ops.all_gather(torch.tensor([rank]), group=pair).tolist() == ([0, 1] if rank < 2 else [2, 3])
    odd = dist.new_group([3, 0, 1])
    if rank == 2:
        assert "does not belong" in raised(lambda: Group.open(odd), ValueError)
    else:
        with Group.open(odd) as group:
            assert group.world_size == 3
            members = dist.get_process_group_ranks(odd)
            assert ops.all_gather(torch.tensor([rank]), group=group).tolist() == members


def check_mesh() -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    rank = dist.get_rank()
    with Group.open((mesh, "tensor")) as tensor, Group.open((mesh, 0)) as data, Group.open(mesh["tensor"]) as again:
        assert (tensor.world_size, tensor.rank) == (2, rank % 2)
        assert (data.world_size, data.rank) == (2, rank // 2)
        row = rank // 2 * 2
        assert ops.all_gather(torch.tensor([rank]), group=tensor).tolist() == [row, row + 1]
        assert ops.all_gather(torch.tensor([rank]), group=data).tolist() == [rank % 2, rank % 2 + 2]
        assert ops.all_gather(torch.tensor([rank]), group=again).tolist() == [row, row + 1]
    assert "needs a dimension" in raised(lambda: Group.open(mesh), ValueError)


@pytest.mark.parametrize("check", [check_subgroups, check_mesh], ids=["subgroups", "mesh"])
def test_groups_of_some_ranks_reduce_over_these_only(check: Callable[[], None]) -> None:
    run_ranks(check, 4)


def check_wire_bytes() -> None:
    for transport in TRANSPORTS:
        with Group.open(transport=transport) as group:
            s = Sizes(R=group.world_size, M=512, N=1024)
            sent = {}
            for codec in ("none", "fp16", "bf16"):
                for case in (ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER):
                    group.reset_stats()
                    check_forward(case, replace(s, codec=codec), group)
                    stats = group.stats()
                    found = sent[case.name, codec] = stats["by_op"][case.name]["wire_bytes"]
                    least = case.wire_bytes(replace(s, codec=codec))
                    assert least * 0.99 <= found, (transport, case.name, codec, found, least)
                    # Through a process group the ranks exchange their call with the data.
                    assert found <= least * 1.05 + 4096, (transport, case.name, codec, found, least)
                    assert stats["seconds"] >= stats["wait_seconds"] >= 0.0
            assert sent["all_reduce", "fp16"] < 0.52 * sent["all_reduce", "none"]
            assert sent["all_reduce", "bf16"] <= 0.5 * sent["all_reduce", "none"] + 4096


@pytest.mark.parametrize("R", [2, 3])
def test_no_more_bytes_are_sent_than_the_collective_needs(R: int) -> None:
    run_ranks(check_wire_bytes, R)


def check_default_group() -> None:
    R = dist.get_world_size()
    assert ops.all_reduce(torch.ones(3)).tolist() == [float(R)] * 3
    assert ops.reduce_scatter(torch.ones(R)).tolist() == [float(R)]
    assert ops.all_gather(torch.ones(1)).tolist() == [1.0] * R
    assert ops.all_reduce_(torch.ones(3)).tolist() == [float(R)] * 3


@RANKS
def test_without_a_group_all_ranks_take_part(R: int) -> None:
    run_ranks(check_default_group, R)


def test_without_torch_distributed_a_group_has_one_rank() -> None:
    x = torch.randn(4, 3)
    assert torch.equal(ops.all_reduce(x), x)
    assert torch.equal(ops.all_gather(x), x)
    assert torch.equal(ops.reduce_scatter(x, 1), x)
