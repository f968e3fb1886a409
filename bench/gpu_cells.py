"""The cells of bench/gpu.py. A cell is made when it is its turn, on a machine that has a GPU."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cell import CODEC_FLOOR, CODEC_ROUNDING
from bench.gpu_ranks import VirtualRanks, in_rank_order
from bench.gpu_timing import GpuCell, graph_of
from bench.timing import Candidate
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.compress import wire_bytes

MIB = 1 << 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CODEC_VALUES = 64 * MIB  # 256 MiB of fp32, beyond every cache
INSIDE = 20  # jobs in a graph, where one is too short to be timed
EPS = 1e-6


@dataclass(frozen=True)
class Cell:
    """A cell to be made: its name says all of it."""

    family: str
    name: str
    make: Callable[[], Any]  # a context with a GpuCell


def randn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Values on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def equal(want: Tensor) -> Callable[[Tensor], float]:
    """Right is the same bits."""
    return lambda got: 0.0 if torch.equal(got, want) else math.inf


def near(want: Tensor, allowed: float) -> Callable[[Tensor], float]:
    """Right is within so much of the largest value."""
    scale = allowed * float(want.abs().max())
    return lambda got: float((got.double() - want.double()).abs().max()) / scale


@contextmanager
def codec_cell(codec: str) -> Iterator[GpuCell]:
    """Packing and unpacking of a large tensor, against a copy of it."""
    n = CODEC_VALUES
    x = randn(0, n, dtype=torch.float32)
    y, wire, packed = torch.empty_like(x), ops.compress(x, codec), wire_bytes(codec, n)
    back = ops.decompress(wire, (n,), torch.float32, codec)
    unpacked = near(x, (CODEC_ROUNDING[codec] + CODEC_FLOOR[codec]) * 1.01)
    yield GpuCell(
        "codec", "codec", "fp32",
        [
            Candidate("copy", lambda: y.copy_(x), equal(x)),
            Candidate("encode", lambda: ops.compress(x, codec),
                      lambda w: max(equal(wire)(w), unpacked(back)), label={"codec": codec}),
            Candidate("decode", lambda: ops.decompress(wire, (n,), torch.float32, codec), unpacked,
                      label={"codec": codec}),
        ],
        "copy", sizes={"bytes": 4 * n}, traffic={"copy": 8 * n, "": 4 * n + packed},
    )  # fmt: skip


@contextmanager
def collective_cell(op: str, R: int, nbytes: int) -> Iterator[GpuCell]:
    """A collective between virtual ranks against the least that memory must carry: inputs read, results written."""
    n = nbytes // 2
    ranks = VirtualRanks(R, arena_bytes=4 * nbytes + 4 * MIB, pool_bytes=3 * nbytes)
    xs = [randn(r, n, dtype=torch.bfloat16) for r in range(R)]
    total, part = in_rank_order(xs), n // R
    torch.cuda.synchronize()

    def all_reduce(r: int) -> Tensor:
        return ops.all_reduce(xs[r], group=ranks.groups[r])

    def reduce_scatter(r: int) -> Tensor:
        return ops.reduce_scatter(xs[r], group=ranks.groups[r])

    def all_gather(r: int) -> Tensor:
        return ops.all_gather(xs[r][:part], group=ranks.groups[r], dim_size=part * R)

    work = {"all_reduce": all_reduce, "reduce_scatter": reduce_scatter, "all_gather": all_gather}[op]
    gathered = torch.cat([x[:part] for x in xs])
    wanted = {"all_reduce": [total] * R, "reduce_scatter": list(total.split(part)), "all_gather": [gathered] * R}[op]

    def error(got: list[Tensor]) -> float:
        return max(equal(want)(y) for want, y in zip(wanted, got, strict=True))

    def way(name: str, path: str) -> Candidate:
        def call() -> list[Tensor]:
            ranks.force(path=path)
            return ranks.each(work)

        return Candidate(name, call, error, label={"path": path or None, "transport": "virtual"})

    ways = ("one_shot", "two_shot") if op == "all_reduce" else ()
    candidates = [way("tpkernels", ""), *(way(name, name) for name in ways)]
    # The floor does not count slots: an op that copies into them reads and writes more bytes.
    traffic = {"all_reduce": 2 * R, "reduce_scatter": R + 1, "all_gather": R + 1}[op] * nbytes
    yield GpuCell("collective", op, "bf16", candidates, "tpkernels", R, {"bytes": nbytes}, {"": traffic})
    ranks.close()


@contextmanager
def gemm_cell(op: str, M: int, NK: int) -> Iterator[GpuCell]:
    """The fused op of one rank, whole and in parts, against the product alone: what cutting costs."""
    x, w = randn(0, M, NK, dtype=torch.bfloat16), randn(1, NK, NK, dtype=torch.bfloat16) / math.sqrt(NK)
    out, want = torch.empty(M, NK, dtype=torch.bfloat16, device="cuda"), x.float() @ w.float().T
    right = near(want, 2.0**-7)
    fused = {"gemm_all_reduce": ops.gemm_all_reduce, "gemm_reduce_scatter": ops.gemm_reduce_scatter,
             "all_gather_gemm": ops.all_gather_gemm}[op]  # fmt: skip
    more = {"dim_size": M} if op == "all_gather_gemm" else {}
    with Group.open(device="cuda") as group:

        def parts(count: int) -> Candidate:
            def call() -> Tensor:
                group._communicator.force(parts=count)
                return fused(x, w, group=group, **more)

            return Candidate(f"parts_{count}", call, right, label={"path": f"chunked({count})", "transport": "local"})

        product = Candidate("mm", lambda: torch.mm(x, w.t(), out=out), right)
        sizes = {"M": M, "N": NK, "K": NK, "bytes": 2 * M * NK}
        candidates = [product, *(parts(count) for count in (1, 2, 4))]
        yield GpuCell("gemm", op, "bf16", candidates, "mm", sizes=sizes, flops=2 * M * NK * NK)


@contextmanager
def fused_cell(op: str, M: int, NK: int, R: int = 2) -> Iterator[GpuCell]:
    """A GEMM cut over virtual ranks and its collective, in one kernel (Hopper) and as the rule has it.

    Of one rank it is a product and nothing else, against the vendor's.
    """
    bf16, y_bytes = torch.bfloat16, 2 * M * NK
    ranks = VirtualRanks(R, arena_bytes=4 * y_bytes + 4 * MIB, pool_bytes=4 * y_bytes, peer=True)
    if op == "all_gather_gemm":
        shape, w_shape = (M // R, NK), (NK // R, NK)
    else:
        shape, w_shape = (M, NK // R), (NK, NK // R)
    xs = [randn(r, *shape, dtype=bf16) for r in range(R)]
    ws = [randn(R + r, *w_shape, dtype=bf16) / math.sqrt(NK) for r in range(R)]
    fused = {"gemm_all_reduce": ops.gemm_all_reduce, "gemm_reduce_scatter": ops.gemm_reduce_scatter,
             "all_gather_gemm": ops.all_gather_gemm}[op]  # fmt: skip
    more = {"dim_size": M} if op == "all_gather_gemm" else {}
    if op == "all_gather_gemm":
        wanted = [torch.cat(xs).float() @ w.float().T for w in ws]
    else:
        total = torch.stack([x.float() @ w.float().T for x, w in zip(xs, ws, strict=True)]).sum(0)
        wanted = [total] * R if op == "gemm_all_reduce" else list(total.split(M // R))
    right = [near(want, 2.0**-7) for want in wanted]
    for parts in (1, 2, 3, 4):  # cuBLAS loads a kernel when it first needs it, which must not be while a rank waits
        torch.mm(xs[0][: len(xs[0]) // parts], ws[0].t())
    torch.cuda.synchronize()

    def way(name: str, path: str) -> Candidate:
        def call() -> list[Tensor]:
            ranks.force(path=path)
            return ranks.each(lambda r: fused(xs[r], ws[r], group=ranks.groups[r], **more))

        def error(got: list[Tensor]) -> float:
            return max(is_right(y) for is_right, y in zip(right, got, strict=True))

        return Candidate(name, call, error, label={"path": path or None, "transport": "virtual"})

    def product() -> list[Tensor]:
        return [torch.mm(xs[0], ws[0].t())]

    first = Candidate("mm", product, lambda ys: right[0](ys[0])) if R == 1 else way("tpkernels", "")
    sizes = {"M": M, "N": NK, "K": NK, "bytes": y_bytes}
    yield GpuCell("fused", op, "bf16", [first, way("fused", "fused")], first.name, R, sizes, flops=2 * M * NK * NK)
    ranks.close()


@dataclass(frozen=True)
class BackwardOfRank:
    """What a rank gives to the backward of a sharded GEMM, and what it gets.

    Attributes:
        dy, x, w: its operands.
        more: the arguments of the op behind the number of ranks.
        dx, dw: in fp32.
    """

    dy: Tensor
    x: Tensor
    w: Tensor
    more: tuple[Any, ...]
    dx: Tensor
    dw: Tensor


def backward_of_ranks(op: str, R: int, x: Tensor, w: Tensor, dy: Tensor) -> list[BackwardOfRank]:
    """The backward of y = x @ w.T over R ranks, whose sizes are all multiples of R."""
    M, full = len(x), (dy.float() @ w.float(), dy.float().t() @ x.float())
    if op == "gemm_reduce_scatter":  # w is cut along K, dy along the tokens
        of_ranks = zip(dy.chunk(R), x.chunk(R, 1), w.chunk(R, 1), full[0].chunk(R, 1), full[1].chunk(R, 1), strict=True)
    else:
        of_tokens = [(x, full[0])] * R
        if op == "all_gather_gemm":
            of_tokens = list(zip(x.chunk(R), full[0].chunk(R), strict=True))
        of_ranks = zip(dy.chunk(R, 1), [t[0] for t in of_tokens], w.chunk(R), [t[1] for t in of_tokens],
                       full[1].chunk(R), strict=True)  # fmt: skip
    more: Callable[[int], tuple[Any, ...]] = {
        "replicated_gemm": lambda r: ("none",),
        "gemm_reduce_scatter": lambda r: (0, M, "none"),
        "all_gather_gemm": lambda r: (r, 0, M, "none", "none"),
    }[op]
    return [BackwardOfRank(dy.contiguous(), x.contiguous(), w.contiguous(), more(r), dx, dw)
            for r, (dy, x, w, dx, dw) in enumerate(of_ranks)]  # fmt: skip


def run_backward(op: str, of: BackwardOfRank, group: Group) -> tuple[Tensor, Tensor]:
    """dx and dw of a rank."""
    backward = getattr(torch.ops.tpkernels, f"{op}_backward")
    name, R = group._communicator.name, group.world_size
    dx, dw, _ = backward(of.dy, of.x, of.w, True, True, False, name, R, *of.more)
    return dx, dw


@contextmanager
def backward_cell(op: str, M: int, NK: int, R: int) -> Iterator[GpuCell]:
    """The backward of a sharded GEMM over virtual ranks, dx and dw: dx and its collective in one kernel (Hopper)
    against products with a collective beside them."""
    bf16, y_bytes = torch.bfloat16, 2 * M * NK
    ranks = VirtualRanks(R, arena_bytes=4 * y_bytes + 4 * MIB, pool_bytes=6 * y_bytes)
    x, dy = randn(0, M, NK, dtype=bf16), randn(1, M, NK, dtype=bf16)
    w = randn(2, NK, NK, dtype=bf16) / math.sqrt(NK)
    of_ranks = backward_of_ranks(op, R, x, w, dy)
    right = [(near(of.dx, 2.0**-7), near(of.dw, 2.0**-7)) for of in of_ranks]
    for of in of_ranks:  # cuBLAS loads a kernel when it first needs it, which must not be while a rank waits
        dy_whole, x_whole = (dy if op == "gemm_reduce_scatter" else of.dy), (x if op == "all_gather_gemm" else of.x)
        torch.mm(dy_whole, of.w), torch.mm(dy_whole.t(), x_whole)
    torch.cuda.synchronize()

    def way(name: str, path: str, parts: int) -> Candidate:
        def call() -> list[Any]:
            ranks.force(path=path, parts=parts)
            return ranks.each(lambda r: run_backward(op, of_ranks[r], ranks.groups[r]))

        def error(got: list[Any]) -> float:
            return max(max(dx_right(dx), dw_right(dw))
                       for (dx_right, dw_right), (dx, dw) in zip(right, got, strict=True))  # fmt: skip

        return Candidate(name, call, error, label={"path": name, "transport": "virtual"})

    sizes = {"M": M, "N": NK, "K": NK, "bytes": y_bytes}
    candidates = [way("unfused", "", 1), way("fused", "fused", 0)]
    yield GpuCell("backward", f"{op}_backward", "bf16", candidates, "unfused", R, sizes, flops=4 * M * NK * NK)
    ranks.close()


@contextmanager
def norm_cell(R: int, M: int, N: int) -> Iterator[GpuCell]:
    """The fused add and norm against all_reduce, add and torch's norm, both as CUDA graphs."""
    bf16 = torch.bfloat16
    ranks = VirtualRanks(R, arena_bytes=8 * MIB, pool_bytes=64 * MIB)
    xs, residual, weight = (
        [randn(r, M, N, dtype=bf16) for r in range(R)],
        randn(90, M, N, dtype=bf16),
        randn(91, N, dtype=bf16),
    )
    total = in_rank_order(xs) + residual
    want = F.rms_norm(total.double(), (N,), weight.double(), EPS)
    torch.cuda.synchronize()

    def fused(r: int) -> Tensor:
        return ops.all_reduce_add_rms_norm(xs[r], residual, weight, group=ranks.groups[r], eps=EPS)[0]

    def unfused(r: int) -> Tensor:
        return F.rms_norm(ops.all_reduce(xs[r], group=ranks.groups[r]) + residual, (N,), weight, EPS)

    def way(name: str, work: Callable[[int], Tensor]) -> Candidate:
        graph, made = graph_of(lambda: ranks.each(work), INSIDE)

        def call() -> list[Tensor]:
            graph.replay()
            return made

        right = near(want, 2.0**-7)
        return Candidate(name, call, lambda ys: max(map(right, ys)), label={"transport": "virtual"})

    candidates = [way("unfused", unfused), way("fused", fused)]
    yield GpuCell("norm", "all_reduce_add_rms_norm", "bf16", candidates, "unfused", R,
                  {"M": M, "N": N, "bytes": 2 * M * N}, inside=INSIDE)  # fmt: skip
    ranks.close()


@contextmanager
def cupy_cell(nbytes: int) -> Iterator[GpuCell | str]:
    """NCCL as CuPy calls it, a world of one: an all-reduce without links."""
    if importlib.util.find_spec("cupy") is None:
        yield "CuPy is not installed"
        return
    from cupy.cuda import nccl

    n = nbytes // 4
    x = randn(0, n, dtype=torch.float32)
    y = torch.empty_like(x)
    communicator = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)

    def all_reduce() -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        communicator.allReduce(x.data_ptr(), y.data_ptr(), n, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream)
        return y

    with Group.open(device="cuda") as group:
        ours = Candidate("tpkernels", lambda: ops.all_reduce(x, group=group), equal(x), label={"transport": "local"})
        candidates = [Candidate("cupy_nccl", all_reduce, equal(x)), ours]
        yield GpuCell(
            "nccl", "all_reduce", "fp32", candidates, "cupy_nccl", sizes={"bytes": nbytes}, traffic={"": 2 * nbytes}
        )


def cells() -> list[Cell]:
    """All cells, in the order in which they are measured: those whose kernels wait for each other are last."""
    found = [
        Cell("codec", f"codec {codec}", lambda c=codec: codec_cell(c)) for codec in CODEC_ROUNDING if codec != "none"
    ]
    for op, M in (("gemm_all_reduce", 4096), ("gemm_all_reduce", 8192), ("gemm_reduce_scatter", 8192),
                  ("all_gather_gemm", 8192)):  # fmt: skip
        found.append(Cell("gemm", f"{op} {M}x4096x4096", lambda o=op, m=M: gemm_cell(o, m, 4096)))
    found.append(Cell("nccl", "all_reduce CuPy's NCCL", lambda: cupy_cell(64 * MIB)))
    for op in ("all_reduce", "reduce_scatter", "all_gather"):
        for R in (2, 4, 8):
            found.append(Cell("collective", f"{op} R={R} 64 MiB", lambda o=op, r=R: collective_cell(o, r, 64 * MIB)))
    for op in ("gemm_all_reduce", "gemm_reduce_scatter", "all_gather_gemm"):
        for R in (1, 2):
            name = f"{op} R={R} 8192x4096x4096 in one kernel"
            found.append(Cell("fused", name, lambda o=op, r=R: fused_cell(o, 8192, 4096, r)))
    for op in ("replicated_gemm", "gemm_reduce_scatter", "all_gather_gemm"):
        for R in (2, 4, 8):
            name = f"{op}_backward R={R} 4096x4096x4096 in one kernel"
            found.append(Cell("backward", name, lambda o=op, r=R: backward_cell(o, 4096, 4096, r)))
    for R in (1, 2, 4):
        for M in (1, 16, 64):
            found.append(
                Cell("norm", f"all_reduce_add_rms_norm R={R} {M}x8192", lambda r=R, m=M: norm_cell(r, m, 8192))
            )
    return found
