"""Every collective of back end tpk against what it should be, computed in fp64 from the inputs of all ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.harness.c10d import new_group
from tests.harness.ranks import BOTH_TRANSPORTS, Run, on_processes, on_ranks
from tpkernels import c10d
from tpkernels.testing import run_ranks

pytestmark = pytest.mark.usefixtures("nothing_is_left_in_shared_memory")

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
COMPLEX = (torch.complex64, torch.complex128)
MOVED = (torch.bool, torch.float8_e4m3fn, torch.uint16, torch.uint32, torch.complex32)
# One-shot, two-shot, several pieces; none, and one for fewer values than ranks.
SIZES = (0, 1, 7, 1000, 300_001)
RESULT = {
    "sum": lambda all: all.sum(0),
    "avg": lambda all: all.sum(0) / len(all),
    "product": lambda all: all.prod(0),
    "min": lambda all: all.amin(0),
    "max": lambda all: all.amax(0),
}
OPS = {
    "sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.AVG, "product": dist.ReduceOp.PRODUCT, "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX, "band": dist.ReduceOp.BAND, "bor": dist.ReduceOp.BOR, "bxor": dist.ReduceOp.BXOR,
}  # fmt: skip
BITWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}


def values(n: int | tuple[int, ...], dtype: torch.dtype, rank: int) -> Tensor:
    """Those of a rank, the same wherever they are computed."""
    made = torch.Generator().manual_seed(1000 + rank)
    if dtype == torch.bool:
        return torch.rand(n, generator=made) < 0.5
    if dtype.is_complex:
        return torch.complex(*(torch.randn(n, generator=made, dtype=torch.float64) for _ in range(2))).to(dtype)
    if dtype.is_floating_point:
        return torch.randn(n, generator=made, dtype=torch.float64).to(dtype)
    return torch.randint(0, 100, n if isinstance(n, tuple) else (n,), generator=made).to(dtype)


def reduced(op: str, n: int | tuple[int, ...], dtype: torch.dtype, R: int) -> Tensor:
    """The reduction of all ranks' values: exact for integers, else in fp64."""
    every = [values(n, dtype, r) for r in range(R)]
    if op in BITWISE:
        result = every[0]
        for other in every[1:]:
            result = BITWISE[op](result, other)
        return result
    if dtype == torch.bool:
        together = torch.stack(every)
        return together.any(0) if op in ("sum", "max") else together.all(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    return RESULT[op](torch.stack([one.to(wide) for one in every])).to(wide)


def assert_reduced(got: Tensor, op: str, want: Tensor, R: int, what: str) -> None:
    dtype = got.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        assert torch.equal(got, want.to(dtype)), what
        return
    # R - 1 steps in fp32 (fp64), and one rounding to the dtype; terms of a sum are below 6.
    eps = torch.finfo(dtype).eps + (R - 1) * torch.finfo(torch.float64 if dtype.itemsize >= 8 else torch.float32).eps
    scale = torch.maximum(want.abs(), torch.tensor(1.0)) * (6.0 * R if op in ("sum", "avg") else 2.0)
    assert bool(((got.to(want.dtype) - want).abs() <= eps * scale).all()), what


@on_ranks(1, 2, 3, transports=BOTH_TRANSPORTS)
def check_reductions(transport: str) -> None:
    group = new_group(transport)
    rank, R = dist.get_rank(), dist.get_world_size()
    for dtype in (*FLOATS, *INTEGERS, *COMPLEX, torch.bool):
        linear = ("sum", "avg") if dtype.is_floating_point or dtype.is_complex else ("sum",)
        ordered = () if dtype.is_complex else ("product", "min", "max")
        bitwise = () if dtype.is_floating_point or dtype.is_complex else tuple(BITWISE)
        for op in (*linear, *ordered, *bitwise):
            for n in SIZES if op == "sum" else (1000,):
                x = values(n, dtype, rank)
                dist.all_reduce(x, OPS[op], group)
                assert_reduced(x, op, reduced(op, n, dtype, R), R, f"all_reduce {op} of {n} {dtype}")


@on_ranks(1, 2, 3, transports=BOTH_TRANSPORTS)
def check_sums_that_end_elsewhere(transport: str) -> None:
    """reduce, reduce_scatter in each of its forms, and the coalesced ones."""
    group = new_group(transport)
    rank, R = dist.get_rank(), dist.get_world_size()
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.complex64):
        for n in (0, 5, 200_003):
            want = reduced("sum", (R, n), dtype, R)
            for root in range(R):
                x = values((R, n), dtype, rank)
                dist.reduce(x, root, group=group)
                expected = want if rank == root else values((R, n), dtype, rank).to(want.dtype)
                assert_reduced(x, "sum", expected, R, f"reduce to {root} of {n} {dtype}")
            x, out = values((R, n), dtype, rank), torch.empty(n, dtype=dtype)
            dist.reduce_scatter_tensor(out, x, group=group)
            assert_reduced(out, "sum", want[rank], R, f"reduce_scatter_tensor of {n} {dtype}")
            apart = [row.clone() for row in x]
            dist.reduce_scatter(out.fill_(0), apart, group=group)
            assert_reduced(out, "sum", want[rank], R, f"reduce_scatter of {n} {dtype}")
            # In place: the output is this rank's part of the input.
            dist.reduce_scatter_tensor(x[rank], x, group=group)
            assert_reduced(x[rank], "sum", want[rank], R, f"reduce_scatter_tensor in place of {n} {dtype}")
    uneven = [torch.full((r + 1,), float(rank + 1)) for r in range(R)]
    out = torch.empty(rank + 1)
    dist.reduce_scatter(out, uneven, group=group)
    assert torch.equal(out, torch.full_like(out, R * (R + 1) / 2))
    tensors = [values(n, torch.float32, rank) for n in (3, 0, 70_000)]
    with dist._coalescing_manager(group):
        for x in tensors:
            dist.all_reduce(x, group=group)
    for x, n in zip(tensors, (3, 0, 70_000), strict=True):
        assert_reduced(x, "sum", reduced("sum", n, torch.float32, R), R, f"coalesced all_reduce of {n}")
    factor = dist._make_nccl_premul_sum(0.5)
    x = torch.full((10,), 2.0 * (rank + 1))
    dist.all_reduce(x, factor, group)
    assert torch.equal(x, torch.full((10,), R * (R + 1) / 2))


@on_ranks(1, 2, 3, transports=BOTH_TRANSPORTS)
def check_moves(transport: str) -> None:
    """broadcast, gathers, scatter and all-to-all: bits arrive as they are."""
    group = new_group(transport)
    rank, R = dist.get_rank(), dist.get_world_size()
    for dtype in (torch.float32, torch.bfloat16, torch.int64, *MOVED, torch.complex128):
        for n in (0, 1, 33, 100_003) if dtype in (torch.float32, torch.bool) else (33,):
            every = [movable(n, dtype, r) for r in range(R)]
            mine = every[rank]
            for root in range(R):
                x = mine.clone()
                dist.broadcast(x, root, group)
                assert_same([x], [every[root]], f"broadcast from {root} of {n} {dtype}")
                parts = [torch.zeros_like(mine) for _ in range(R)] if rank == root else None
                dist.gather(mine, parts, root, group)
                assert_same(parts or [], every if parts else [], f"gather to {root} of {n} {dtype}")
                x = torch.zeros_like(mine)
                dist.scatter(x, every if rank == root else None, root, group)
                assert_same([x], [mine], f"scatter from {root} of {n} {dtype}")
            out = [torch.zeros_like(mine) for _ in range(R)]
            dist.all_gather(out, mine, group)
            assert_same(out, every, f"all_gather of {n} {dtype}")
            flat = torch.zeros(R * n, dtype=torch.uint8).to(dtype)
            dist.all_gather_into_tensor(flat, mine, group)
            assert_same(list(flat.view(R, n)), every, f"all_gather_into_tensor of {n} {dtype}")
            out = [torch.zeros_like(mine) for _ in range(R)]
            dist.all_to_all(out, [mine.roll(r) for r in range(R)], group)
            assert_same(out, [one.roll(rank) for one in every], f"all_to_all of {n} {dtype}")
            out = torch.zeros_like(flat)
            dist.all_to_all_single(out, torch.cat([bits(mine).roll(r) for r in range(R)]).view(dtype), group=group)
            assert_same([out], [torch.cat([bits(one).roll(rank) for one in every]).view(dtype)], f"single {n} {dtype}")


def bits(x: Tensor) -> Tensor:
    """The same memory as integers, which have every operation."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(torch.complex128 if x.element_size() == 16 else sizes[x.element_size()])


def movable(n: int, dtype: torch.dtype, rank: int) -> Tensor:
    plain = values(n, torch.complex128, rank) if dtype == torch.complex128 else values(n, torch.uint8, rank)
    if dtype == torch.bool:
        return plain > 50
    return plain.to(torch.float32).to(dtype) if dtype != torch.complex128 else plain


def assert_same(got: list[Tensor], want: list[Tensor], what: str) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(bits(one), bits(other)), what


@on_ranks(1, 2, 3, transports=BOTH_TRANSPORTS)
def check_uneven_parts(transport: str) -> None:
    """all_to_all with other sizes for each pair, zeros among them, small and of several pieces."""
    group = new_group(transport)
    rank, R = dist.get_rank(), dist.get_world_size()
    for scale in (1, 40_000):
        sizes = [[(3 * s + 5 * r) % 4 * scale for r in range(R)] for s in range(R)]  # from s to r
        send, receive = sizes[rank], [sizes[s][rank] for s in range(R)]
        x = torch.cat([torch.full((send[r], 3), 100.0 * rank + r) for r in range(R)])
        out = torch.empty(sum(receive), 3)
        dist.all_to_all_single(out, x, receive, send, group)
        assert torch.equal(out, torch.cat([torch.full((receive[s], 3), 100.0 * s + rank) for s in range(R)]))
        parts = [torch.empty(n, 3) for n in receive]
        dist.all_to_all(parts, list(x.split(send)), group)
        assert torch.equal(torch.cat(parts), out)
    parts = [torch.empty(r + 1) for r in range(R)]
    dist.all_gather(parts, torch.full((rank + 1,), float(rank)), group)
    assert all(torch.equal(part, torch.full((r + 1,), float(r))) for r, part in enumerate(parts))


@on_ranks(1, 2, 3, transports=BOTH_TRANSPORTS)
def check_any_strides(transport: str) -> None:
    """Transposed and stepped inputs; outputs with strides; a tensor that needs a gradient."""
    group = new_group(transport)
    rank, R = dist.get_rank(), dist.get_world_size()
    base = values((6, 8), torch.float32, rank)
    want = reduced("sum", (6, 8), torch.float32, R)
    stepped = torch.zeros(6, 16)[:, ::2]
    for x, expected in ((base.t().contiguous().t(), want), (stepped.copy_(base), want)):
        assert not x.is_contiguous()
        dist.all_reduce(x, group=group)
        assert_reduced(x, "sum", expected, R, "all_reduce of strides")
        out = torch.zeros(8, 6 * R).t()
        dist.all_gather_into_tensor(out, x, group)
        assert torch.equal(out, torch.cat([x] * R))
    # Strides differ between ranks: the values are what counts.
    x = base.t().contiguous().t() if rank == 0 else base.clone()
    dist.all_reduce(x, group=group)
    assert_reduced(x, "sum", want, R, "all_reduce of unlike strides")
    leaf = torch.full((4,), float(rank), requires_grad=True)
    dist.broadcast(leaf, 0, group)
    assert torch.equal(leaf, torch.zeros(4)) and leaf.is_leaf
    with torch.inference_mode():
        frozen = torch.full((3, 2), float(rank)).t()
    dist.all_reduce(frozen, group=group)
    work = dist.all_reduce(frozen, group=group, async_op=True)
    work.wait()
    assert torch.equal(frozen, torch.full((2, 3), float(R * R * (R - 1) / 2)))


@on_ranks(2, 3, transports=BOTH_TRANSPORTS)
def check_outputs_that_share_memory_with_inputs(transport: str) -> None:
    """In place, by half a part, by another rank's part: what the call on copies gives."""
    group = new_group(transport)
    rank, R = dist.get_rank(), dist.get_world_size()
    for n in (4, 300_000):  # in one piece and in several
        for shift in (0, n // 2, n, rank * n, R * n - n // 2):
            every = [values(2 * R * n, torch.int32, r) for r in range(R)]
            parts = [x[:n].clone() for x in every]  # of gathers
            sums = [sum(x[r * n : (r + 1) * n] for x in every) for r in range(R)]
            sent = [x[rank * n : (rank + 1) * n].clone() for x in every]  # to this rank

            def fresh(every: list[Tensor] = every) -> Tensor:
                return every[rank].clone()

            x = fresh()
            moved = x[shift : shift + n].copy_(parts[rank])
            dist.all_gather_into_tensor(x[: R * n], moved, group)
            assert torch.equal(x[: R * n], torch.cat(parts)), f"all_gather_into_tensor {n} {shift}"
            x = fresh()
            moved = x[shift : shift + n].copy_(parts[rank])
            dist.all_gather(list(x[: R * n].split(n)), moved, group)
            assert torch.equal(x[: R * n], torch.cat(parts)), f"all_gather {n} {shift}"
            for call in ("reduce_scatter", "reduce_scatter_tensor"):
                x = fresh()
                whole, out = x[: R * n], x[shift : shift + n]
                getattr(dist, call)(out, whole if call.endswith("tensor") else list(whole.split(n)), group=group)
                assert torch.equal(out, sums[rank]), f"{call} {n} {shift}"
            x = fresh()
            out = x[shift : shift + R * n]
            dist.all_to_all_single(out, x[: R * n], group=group)
            assert torch.equal(out, torch.cat(sent)), f"all_to_all_single {n} {shift}"
            x = fresh()
            out = x[shift : shift + R * n]
            dist.all_to_all(list(out.split(n)), list(x[: R * n].split(n)), group)
            assert torch.equal(out, torch.cat(sent)), f"all_to_all {n} {shift}"
            x = fresh()
            out = x[shift : shift + n]
            dist.scatter(out, list(x[: R * n].split(n)) if rank == 1 else None, 1, group)
            assert torch.equal(out, every[1][rank * n : (rank + 1) * n]), f"scatter {n} {shift}"


@on_ranks(1, 2, 3, transports=BOTH_TRANSPORTS)
def check_sparse_sums(transport: str) -> None:
    group = new_group(transport)
    rank, R = dist.get_rank(), dist.get_world_size()
    x = torch.sparse_coo_tensor([[rank]], [float(rank + 1)], (R,)).coalesce()
    dist.all_reduce(x, group=group)
    assert torch.equal(x.to_dense(), torch.arange(1.0, R + 1))


@on_ranks(1, 2, 3, transports=BOTH_TRANSPORTS)
def check_codecs(transport: str) -> None:
    group = new_group(transport)
    rank, R = dist.get_rank(), dist.get_world_size()
    want = reduced("sum", 5000, torch.float32, R)
    x = values(5000, torch.float32, rank)
    with c10d.codec(group, "int8"):
        dist.all_reduce(x, group=group)
        exact = values(5000, torch.int64, rank)
        dist.all_reduce(exact, group=group)
    error = (x.double() - want).abs().max()
    # Each of R + 1 packings is off by half a step of a block's largest value, which is below 6 R.
    assert (R == 1 or error > 0) and error <= (R + 1) * 6 * R / 254, error
    assert torch.equal(exact, reduced("sum", 5000, torch.int64, R))
    x = values(5000, torch.float32, rank)
    dist.all_reduce(x, group=group)
    assert_reduced(x, "sum", want, R, "after the context")


@on_processes(globals())
def test_collectives(run: Run) -> None:
    run_ranks(run.check, run.R, run.transport)


LARGE = 2**31 + 7  # of values that are bytes


def check_more_values_than_an_int_has(transport: str) -> None:
    group, rank, R = new_group(transport), dist.get_rank(), dist.get_world_size()

    def filled(value: int, n: int = LARGE) -> Tensor:
        x = torch.full((n,), value, dtype=torch.uint8)
        x[0], x[-1] = x[0] + 10, x[-1] + 20
        return x

    def assert_filled(x: Tensor, value: int, ends: tuple[int, int] = (10, 20)) -> None:
        assert (x[0].item(), x[-1].item()) == (value + ends[0], value + ends[1])
        assert all(bool((part == value).all()) for part in x[1:-1].split(1 << 28))

    x = filled(rank + 1)
    dist.all_reduce(x, group=group)
    assert_filled(x, R * (R + 1) // 2, (10 * R, 20 * R))
    x = filled(rank + 1)
    dist.broadcast(x, 1, group)
    assert_filled(x, 2)
    part = x.narrow(0, rank * (LARGE // R), LARGE // R)
    part.fill_(rank + 3)
    whole = x[: LARGE // R * R]
    dist.all_gather_into_tensor(whole, part, group)
    for r in range(R):
        assert_filled(whole.chunk(R)[r], r + 3, (0, 0))
    out = torch.empty(LARGE // R, dtype=torch.uint8)
    dist.reduce_scatter_tensor(out, whole, group=group)
    assert_filled(out, (rank + 3) * R, (0, 0))
    del out
    # Uneven: nearly all goes from rank 0 to rank 1.
    sizes = [[1, LARGE - 1], [2, 3]]
    send, receive = sizes[rank], [sizes[s][rank] for s in range(R)]
    x = filled(rank + 5, sum(send))
    out = torch.empty(sum(receive), dtype=torch.uint8)
    dist.all_to_all_single(out, x, receive, send, group)
    assert out[-1].item() == (26 if rank == 1 else 6)
    if rank == 1:
        assert bool((out[: LARGE - 2] == 5).all()) and out[LARGE - 2].item() == 25
        del x
        x = torch.empty(LARGE, dtype=torch.uint8)
        dist.recv(x, 0, group, tag=4)
        assert_filled(x, 5)
    else:
        dist.send(x, 1, group, tag=4)


@pytest.mark.weekly
def test_more_values_than_an_int_has() -> None:
    run_ranks(check_more_values_than_an_int_has, 2, "shm", timeout=300)
