"""Cells of the overhead of an op, and of the time that a codec wins or loses.

`codecs` and `codecs_group` run one in-place all_reduce for each codec, over shared memory and over gloo (the `group`
transport), against the same without a codec. `dispatch` reduces one element, so that only the way down is left.
`overheads` and `overheads_training` run small fused GEMMs against the program that each equals.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bench import baselines
from bench.cell import CODEC_ROUNDING, Cell, Setting, compare, sum_tolerance
from bench.collectives import numel_of, sums, taking
from bench.gemms import Problem
from bench.shapes import Gemm
from bench.timing import Candidate
from tpkernels import ops


def codec_cell(setting: Setting, nbytes: int, op: str, transport: str) -> Cell:
    """The same sum with each codec."""
    numel, world = numel_of(setting, nbytes), setting.world_size
    source = setting.values(setting.rank, numel)
    want, magnitude = sums(setting, numel)
    group, path = setting.group(transport), setting.path("all_reduce_", transport, numel=numel)

    def with_codec(codec: str) -> Candidate:
        def run(x: Tensor) -> Tensor:
            ops.all_reduce_(x, group=group, codec=codec)
            return x

        check = compare(want, sum_tolerance(setting, magnitude, codec))
        return taking(setting, source, codec, run, check, label=setting.ours(transport, codec, path))

    def cast_gloo() -> Candidate:
        def run(x: Tensor) -> Tensor:
            return x.copy_(baselines.gloo_all_reduce(x.to(torch.float16)))

        rough = compare(want, sum_tolerance(setting, magnitude, "fp16") * world)  # gloo rounds at every hop
        return taking(setting, source, "cast_gloo", run, rough, label={"codec": "fp16", "transport": "gloo"})

    gloo = compare(want, sum_tolerance(setting, magnitude))
    candidates = setting.pick(
        **{codec: lambda codec=codec: with_codec(codec) for codec in CODEC_ROUNDING},
        gloo=lambda: taking(setting, source, "gloo", baselines.gloo_all_reduce, gloo, label={"transport": "gloo"}),
        cast_gloo=cast_gloo,
    )
    return Cell(op, setting.dtype_name, world, {"bytes": numel * setting.itemsize}, candidates, "none",
                bus_factor=2 * (world - 1) / world)  # fmt: skip


def codecs(setting: Setting, nbytes: int) -> Cell:
    """Over the transport that the group picks by itself."""
    return codec_cell(setting, nbytes, "codecs", "auto")


def codecs_group(setting: Setting, nbytes: int) -> Cell:
    """Over gloo, where fewer bytes ought to pay."""
    return codec_cell(setting, nbytes, "codecs_group", "group")


def dispatch(setting: Setting, nbytes: int) -> Cell:
    """One element: gloo, the public function, the torch op under it, and torch's own neg_ as a yardstick."""
    group, world = setting.group(), setting.world_size
    source = setting.values(setting.rank, 1)
    want, magnitude = sums(setting, 1)
    exact = compare(want, sum_tolerance(setting, magnitude))
    raw = torch.ops.tpkernels.all_reduce_

    def public(x: Tensor) -> Tensor:
        ops.all_reduce_(x, group=group)
        return x

    def op_only(x: Tensor) -> Tensor:
        raw(x, group.name, world, "sum", "none")
        return x

    def make(name: str, run: Callable[[Tensor], Tensor], ours: bool = True) -> Callable[[], Candidate]:
        label = setting.ours(path=setting.path("all_reduce_", numel=1)) if ours else {}
        return lambda: taking(setting, source, name, run, exact, label=label)

    zero = compare(-source.double(), torch.zeros((), dtype=torch.float64))
    candidates = setting.pick(
        gloo=make("gloo", baselines.gloo_all_reduce, ours=False),
        functional=make("functional", lambda x: ops.all_reduce(x, group=group)),
        plain=make("plain", public),
        op_only=make("op_only", op_only),
        neg=lambda: taking(setting, source, "neg", lambda x: x.neg_(), zero),
        barrier=lambda: Candidate("barrier", call=group.barrier, error=lambda _: 0.0, label=setting.ours()),
        gloo_barrier=lambda: Candidate("gloo_barrier", call=dist.barrier, error=lambda _: 0.0),
    )
    return Cell("dispatch", setting.dtype_name, world, {"bytes": nbytes}, candidates, "gloo")


def overheads(setting: Setting, gemm: Gemm) -> Cell:
    """In inference: gemm_all_reduce against F.linear and all_reduce_, replicated_gemm against F.linear."""
    return _overheads(setting, gemm, "overheads", trains=False)


def overheads_training(setting: Setting, gemm: Gemm) -> Cell:
    """Forward and backward, the gradients of x and w: the same, and the gradient of a replicated x summed."""
    return _overheads(setting, gemm, "overheads_training", trains=True)


def _overheads(setting: Setting, gemm: Gemm, op: str, *, trains: bool) -> Cell:
    job, group = Problem.make(setting, gemm), setting.group()
    x, w = (job.part(whole, 1).requires_grad_(trains) for whole in (job.x, job.w))
    dy = setting.values(3, gemm.M, gemm.N)
    summed, local = job.check(job.x, job.w), job.check(x.detach(), w.detach())

    def make(name: str, product: Callable[[], Tensor], check: Callable[[Tensor], float], sums_dx: bool) -> Candidate:
        def step() -> Tensor:
            y = product()
            torch.autograd.backward(y, dy)
            if sums_dx and x.grad is not None:
                ops.all_reduce_(x.grad, group=group)
            x.grad = w.grad = None
            return y.detach()

        return Candidate(name, step if trains else product, check, label=setting.ours())

    def two_lines() -> Tensor:
        y = F.linear(x, w)
        ops.all_reduce_(y.detach(), group=group)
        return y

    candidates = setting.pick(
        two_lines=lambda: make("two_lines", two_lines, summed, False),
        gemm_all_reduce=lambda: make("gemm_all_reduce", lambda: ops.gemm_all_reduce(x, w, group=group), summed, False),
        linear=lambda: make("linear", lambda: F.linear(x, w), local, True),
        replicated_gemm=lambda: make("replicated_gemm", lambda: ops.replicated_gemm(x, w, group=group), local, False),
    )
    return Cell(op, setting.dtype_name, setting.world_size, gemm._asdict(), candidates, "two_lines")
