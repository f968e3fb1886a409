"""Cells of all_reduce, reduce_scatter and all_gather. A size is that of the full tensor, in bytes.

Variants: `plain` ordinary tensors, in place where gloo works in place; `flat` the same over connections between all
ranks, where others go over transport hierarchical; `functional` a new output each call; `sym`
tensors from group.empty; `copy` one private copy of as many bytes on every rank at once, the physical yardstick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import baselines
from bench.cell import Cell, Setting, compare, sum_tolerance
from bench.timing import Candidate
from tpkernels import ops

NO_ERROR = torch.zeros((), dtype=torch.float64)


def numel_of(setting: Setting, nbytes: int) -> int:
    """Elements in so many bytes, cut down to a multiple of R (gloo takes equal parts alone)."""
    return max(1, nbytes // setting.itemsize // setting.world_size) * setting.world_size


def sums(setting: Setting, numel: int) -> tuple[Tensor, Tensor]:
    """The sum of all ranks' inputs and the sum of their magnitudes, in fp64."""
    want, magnitude = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    for rank in range(setting.world_size):
        term = setting.values(rank, numel).double()
        want += term
        magnitude += term.abs_()
    return want, magnitude


def taking(
    setting: Setting, source: Tensor, name: str, run: Callable[[Tensor], Tensor], error: Callable[[Tensor], float],
    *, x: Tensor | None = None, label: dict[str, Any] | None = None,
) -> Candidate:  # fmt: skip
    """A candidate on an input of its own (x, or ordinary memory) that holds `source` when it is checked."""
    own = torch.empty_like(source) if x is None else x
    mark = setting.rank + 1  # any value that differs over the ranks and whose sums stay small
    return Candidate(
        name,
        call=lambda: run(own),
        error=error,
        load=lambda: own.copy_(source),
        refresh=lambda: own.fill_(mark),
        label=label or {},
    )


def all_reduce(setting: Setting, nbytes: int) -> Cell:
    """The sum of one tensor per rank, to all ranks."""
    numel, world, codec = numel_of(setting, nbytes), setting.world_size, setting.codec
    source = setting.values(setting.rank, numel)
    want, magnitude = sums(setting, numel)
    exact = compare(want, sum_tolerance(setting, magnitude))
    packed = compare(want, sum_tolerance(setting, magnitude, codec))
    spare = torch.empty_like(source)

    def ours(name: str, *, functional: bool = False, symmetric: bool = False, transport: str = "auto") -> Candidate:
        group = setting.group(transport)

        def reduce_(x: Tensor) -> Tensor:
            ops.all_reduce_(x, group=group, codec=codec)
            return x

        def reduce(x: Tensor) -> Tensor:
            return ops.all_reduce(x, group=group, codec=codec)

        x = group.empty((numel,), setting.dtype) if symmetric else None
        run = reduce if functional else reduce_
        label = setting.ours(transport, path=setting.path("all_reduce_", transport, numel=numel))
        return taking(setting, source, name, run, packed, x=x, label=label)

    flat = {"flat": lambda: ours("flat", transport="group")} if setting.transport == "hierarchical" else {}
    candidates = setting.pick(
        gloo=lambda: taking(setting, source, "gloo", baselines.gloo_all_reduce, exact),
        plain=lambda: ours("plain"),
        **flat,
        functional=lambda: ours("functional", functional=True),
        sym=lambda: ours("sym", symmetric=True),
        copy=lambda: taking(setting, source, "copy", spare.copy_, compare(source.double(), NO_ERROR)),
    )
    return Cell("all_reduce", setting.dtype_name, world, {"bytes": numel * setting.itemsize}, candidates, "gloo",
                bus_factor=2 * (world - 1) / world)  # fmt: skip


def reduce_scatter(setting: Setting, nbytes: int) -> Cell:
    """Every rank keeps its part of the sum. gloo's own can be slower than its all_reduce and a slice: both."""
    numel, world, codec = numel_of(setting, nbytes), setting.world_size, setting.codec
    source, part = setting.values(setting.rank, numel), numel // world
    start = setting.rank * part
    want, magnitude = (whole.narrow(0, start, part).clone() for whole in sums(setting, numel))
    exact = compare(want, sum_tolerance(setting, magnitude))
    packed = compare(want, sum_tolerance(setting, magnitude, codec))
    kept = torch.empty(part, dtype=setting.dtype)

    def ours(name: str, *, symmetric: bool = False) -> Candidate:
        group = setting.group()
        x = group.empty((numel,), setting.dtype) if symmetric else None

        def run(x: Tensor) -> Tensor:
            return ops.reduce_scatter(x, dim=0, group=group, codec=codec)

        label = setting.ours(path=setting.path("reduce_scatter", numel=numel))
        return taking(setting, source, name, run, packed, x=x, label=label)

    def gloo(x: Tensor) -> Tensor:
        return baselines.gloo_reduce_scatter(kept, x)

    def gloo_slice(x: Tensor) -> Tensor:
        return baselines.gloo_all_reduce_slice(x, start, part)

    candidates = setting.pick(
        gloo=lambda: taking(setting, source, "gloo", gloo, exact),
        gloo_slice=lambda: taking(setting, source, "gloo_slice", gloo_slice, exact),
        plain=lambda: ours("plain"),
        sym=lambda: ours("sym", symmetric=True),
    )
    return Cell("reduce_scatter", setting.dtype_name, world, {"bytes": numel * setting.itemsize}, candidates, "gloo",
                bus_factor=(world - 1) / world)  # fmt: skip


def all_gather(setting: Setting, nbytes: int) -> Cell:
    """Every rank gets all parts."""
    numel, world, codec = numel_of(setting, nbytes), setting.world_size, setting.codec
    part = numel // world
    source, kept = setting.values(setting.rank, part), torch.empty(numel, dtype=setting.dtype)
    want = torch.cat([setting.values(r, part) for r in range(world)]).double()
    exact = compare(want, NO_ERROR)
    packed = exact if codec == "none" else compare(want, sum_tolerance(setting, want.abs(), codec))

    def ours(name: str, *, symmetric: bool = False) -> Candidate:
        group = setting.group()
        x = group.empty((part,), setting.dtype) if symmetric else None

        def run(x: Tensor) -> Tensor:
            return ops.all_gather(x, 0, group=group, dim_size=numel, codec=codec)

        label = setting.ours(path=setting.path("all_gather", numel=numel))
        return taking(setting, source, name, run, packed, x=x, label=label)

    def gloo(x: Tensor) -> Tensor:
        return baselines.gloo_all_gather(kept, x)

    candidates = setting.pick(
        gloo=lambda: taking(setting, source, "gloo", gloo, exact),
        plain=lambda: ours("plain"),
        sym=lambda: ours("sym", symmetric=True),
    )
    return Cell("all_gather", setting.dtype_name, world, {"bytes": numel * setting.itemsize}, candidates, "gloo",
                bus_factor=(world - 1) / world)  # fmt: skip
