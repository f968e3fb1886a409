"""Cells of the fused GEMMs, against F.linear and gloo, against F.linear and our collective, and against the GEMM alone.

Variants: `linear_gloo` the plain way; `linear_tpk` F.linear and this library's collective; `onednn_tpk` oneDNN's linear
and this library's collective, the honest rival; `tpkernels` the op; `one_chunk`, between hosts, the op with its
communication after the product; `flat`, where hosts have several ranks, the op over transport `group`; `gemm_aten`,
`gemm_onednn` this rank's GEMM alone, the roof. Time beyond the faster roof is exposed communication.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import baselines
from bench.cell import Cell, Setting, compare, product_tolerance
from bench.shapes import Gemm
from bench.timing import Candidate
from tpkernels import ops

Check = Callable[[Tensor], float]
Linear = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Ways:
    """The same product, plain (gloo), unfused (ours after some linear), fused; and their bounds."""

    plain: Callable[[Tensor], Tensor]
    unfused: Callable[[Linear, Tensor], Tensor]
    fused: Callable[[Tensor, Any], Tensor]  # over a group
    exact: Check
    packed: Check


@dataclass
class Problem:
    """x[M, K] and w[N, K] whole, in the dtype, and this rank's part of each."""

    setting: Setting
    gemm: Gemm
    x: Tensor
    w: Tensor

    @classmethod
    def make(cls, setting: Setting, gemm: Gemm) -> Problem:
        x = setting.values(1, gemm.M, gemm.K)
        w = (setting.values(2, gemm.N, gemm.K).float() / math.sqrt(gemm.K)).to(setting.dtype)
        return cls(setting, gemm, x, w)

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's slice; gloo takes equal ones alone.

        Raises:
            ValueError: the ranks do not divide this dimension.
        """
        if whole.shape[dim] % self.setting.world_size:
            raise ValueError(f"{'x'.join(map(str, self.gemm))}: {whole.shape[dim]} does not divide by "
                             f"{self.setting.world_size} ranks, which gloo needs")  # fmt: skip
        return whole.chunk(self.setting.world_size, dim)[self.setting.rank].contiguous()

    def check(self, x: Tensor, w: Tensor, codec: str = "none", rows: slice = slice(None)) -> Check:
        """Against x @ w.T in fp64, these rows of it."""
        want = (x.double() @ w.double().T)[rows]
        scale = 1 / math.sqrt(self.gemm.K)  # of one product x * w
        return compare(want, product_tolerance(self.setting, want, x.shape[1], scale, codec))

    def on(self, x: Tensor, name: str, run: Callable[[Tensor], Tensor], check: Check, **label: str | None) -> Candidate:
        """A candidate with an x of its own, rewritten before each call."""
        own = torch.empty_like(x)

        def load() -> None:
            own.copy_(x)

        return Candidate(name, call=lambda: run(own), error=check, load=load, refresh=load, label=dict(label))

    def cell(self, op: str, candidates: list[Candidate]) -> Cell:
        """The candidates with their names and numbers."""
        sizes, world = {**self.gemm._asdict()}, self.setting.world_size
        sizes["bytes"] = self.gemm.M * self.gemm.N * self.setting.itemsize
        roofs = tuple(c.name for c in candidates if c.name.startswith("gemm_"))
        flops = 2 * self.gemm.M * self.gemm.N * self.gemm.K // world
        return Cell(op, self.setting.dtype_name, world, sizes, candidates, "linear_gloo", roofs, flops)

    def roofs(self, x: Tensor, w: Tensor) -> dict[str, Callable[[], Candidate]]:
        """The GEMM that this rank does, alone."""
        check = self.check(x, w)
        found = {"gemm_aten": lambda: self.on(x, "gemm_aten", lambda x: F.linear(x, w), check)}
        if baselines.why_no_onednn(self.setting.dtype) is None:
            found["gemm_onednn"] = lambda: self.on(x, "gemm_onednn", lambda x: baselines.onednn_linear(x, w), check)
        return found

    def linears(self) -> dict[str, Linear]:
        """The linear in front of our collective in the unfused ways, by name."""
        if baselines.why_no_onednn(self.setting.dtype) is not None:
            return {"linear_tpk": F.linear}
        return {"linear_tpk": F.linear, "onednn_tpk": baselines.onednn_linear}

    def one_chunk(self, op: str, x: Tensor, ways: Ways) -> dict[str, Callable[[], Candidate]]:
        """Between hosts: the op, with its communication after the product."""
        group, setting = self.setting.group(), self.setting
        if group.transport not in ("group", "hierarchical"):
            return {}

        def run(x: Tensor) -> Tensor:
            group._communicator.force_chunks(1)
            y = ways.fused(x, group)
            group._communicator.force_chunks(0)
            return y

        label = setting.ours(path="unfused")
        return {"one_chunk": lambda: self.on(x, "one_chunk", run, ways.packed, **label)}

    def assemble(self, op: str, x: Tensor, w: Tensor, ways: Ways, whole_x: Tensor | None = None) -> Cell:
        """The candidates of a cell; whole_x is the input of the GEMM alone where that is not x."""
        setting = self.setting

        def unfused(name: str, linear: Linear) -> Candidate:
            label = setting.ours(path="unfused", codec="none")
            return self.on(x, name, lambda x: ways.unfused(linear, x), ways.exact, **label)

        def fused(name: str, transport: str) -> Candidate:
            group = setting.group(transport)
            path = setting.path(op, transport, M=x.shape[0], N=w.shape[0], K=w.shape[1])
            return self.on(x, name, lambda x: ways.fused(x, group), ways.packed, **setting.ours(transport, path=path))

        flat = {"flat": lambda: fused("flat", "group")} if setting.transport == "hierarchical" else {}
        candidates = setting.pick(
            linear_gloo=lambda: self.on(x, "linear_gloo", ways.plain, ways.exact, path="unfused", transport="gloo"),
            **{name: lambda n=name, f=f: unfused(n, f) for name, f in self.linears().items()},
            tpkernels=lambda: fused("tpkernels", "auto"),
            **flat,
            **self.one_chunk(op, x, ways),
            **self.roofs(x if whole_x is None else whole_x, w),
        )
        return self.cell(op, candidates)


def gemm_all_reduce(setting: Setting, gemm: Gemm) -> Cell:
    """y = sum over ranks of x_r @ w_r.T, K cut."""
    job, group, codec = Problem.make(setting, gemm), setting.group(), setting.codec
    x, w = job.part(job.x, 1), job.part(job.w, 1)

    def unfused(linear: Linear, x: Tensor) -> Tensor:
        y = linear(x, w)
        ops.all_reduce_(y, group=group)
        return y

    ways = Ways(
        plain=lambda x: baselines.linear_gloo(x, w),
        unfused=unfused,
        fused=lambda x, group: ops.gemm_all_reduce(x, w, group=group, codec=codec),
        exact=job.check(job.x, job.w),
        packed=job.check(job.x, job.w, codec),
    )
    return job.assemble("gemm_all_reduce", x, w, ways)


def gemm_reduce_scatter(setting: Setting, gemm: Gemm) -> Cell:
    """This rank's rows of that sum."""
    job, group, codec = Problem.make(setting, gemm), setting.group(), setting.codec
    x, w, part = job.part(job.x, 1), job.part(job.w, 1), gemm.M // setting.world_size
    rows = slice(setting.rank * part, (setting.rank + 1) * part)
    kept = job.part(job.x.new_empty(gemm.M, gemm.N), 0)
    ways = Ways(
        plain=lambda x: baselines.linear_gloo_reduce_scatter(kept, x, w),
        unfused=lambda linear, x: ops.reduce_scatter(linear(x, w), dim=0, group=group),
        fused=lambda x, group: ops.gemm_reduce_scatter(x, w, group=group, dim=0, codec=codec),
        exact=job.check(job.x, job.w, rows=rows),
        packed=job.check(job.x, job.w, codec, rows),
    )
    return job.assemble("gemm_reduce_scatter", x, w, ways)


def all_gather_gemm(setting: Setting, gemm: Gemm) -> Cell:
    """y_r = (all rows of x) @ w_r.T, N cut, the rows of x spread over the ranks."""
    job, group, codec, tokens = Problem.make(setting, gemm), setting.group(), setting.codec, gemm.M
    x, w = job.part(job.x, 0), job.part(job.w, 0)
    whole = torch.empty_like(job.x)
    ways = Ways(
        plain=lambda x: baselines.gloo_all_gather_linear(whole, x, w),
        unfused=lambda linear, x: linear(ops.all_gather(x, 0, group=group, dim_size=tokens), w),
        fused=lambda x, group: ops.all_gather_gemm(x, w, group=group, dim=0, dim_size=tokens, codec=codec),
        exact=job.check(job.x, w),
        packed=job.check(job.x, w, codec),
    )
    return job.assemble("all_gather_gemm", x, w, ways, whole_x=job.x)
