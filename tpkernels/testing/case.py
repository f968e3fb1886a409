"""Case: an op as a plain torch program on full tensors, and the cut of its inputs and its output over the ranks.

From these follow the arguments of every rank, its result and its gradients. The bound on the error is derived from the
rounding of the dtypes: with u half the distance between 1 and the next number,

    |error| <= (terms * u(sums) + roundings * u(dtype) + packings * u(codec)) * magnitude

where magnitude is the program on the absolute values of its inputs, which for sums of products is the worst case. A
codec also loses a share of the largest magnitude that shares its scale; the bound takes the largest of all.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tpkernels.ops.checks import sums_dtype
from tpkernels.shard import part

PARTIAL = "partial"
"""A cut: the full input has one more dimension in front, the ranks, and rank r holds index r."""

Cut = int | str | None
"""The dimension along which a tensor is cut, None for a replicated tensor, or PARTIAL."""

CODEC_ROUNDING = {"none": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 0.0, "fp8": 2.0**-4}
"""The largest loss by packing a value, as a share of it: see the heads of csrc/core/codec/*.h."""

CODEC_FLOOR = {"none": 0.0, "fp16": 2.0**-39, "bf16": 0.0, "int8": 1 / 252, "fp8": 2.0**-17}
"""The same as a share of the largest magnitude beside it."""


@dataclass(frozen=True)
class Sizes:
    """The sizes and options of one run of a case.

    Attributes:
        R: the number of ranks.
        M, N, K: tokens, outputs, inputs of the full tensors; any of them may be uneven over R, or 0.
        V: the size of the full vocabulary.
        batch: dimensions in front of the tokens.
        dim: the dimension that collectives cut, and the token dimension of the sequence-parallel GEMMs.
        dtype: of all floating-point tensors.
        op, codec: as the ops take them.
        bias: whether GEMMs have one.
        smoothing: of the labels.
        integers: small integers instead of normal deviates, so that every sum is exact.
        seed: of all values; each tensor has its own stream.
    """

    R: int
    M: int = 6
    N: int = 10
    K: int = 12
    V: int = 17
    batch: tuple[int, ...] = ()
    dim: int = 0
    dtype: torch.dtype = torch.float32
    op: str = "sum"
    codec: str = "none"
    bias: bool = True
    smoothing: float = 0.1
    integers: bool = False
    seed: int = 0

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The tokens: [*batch, M]."""
        return (*self.batch, self.M)

    @lru_cache(maxsize=16)  # noqa: B019  one test needs the same values many times; sizes are small
    def randn(self, name: str, *shape: int) -> Tensor:
        """Values that `dtype` holds exactly, in fp64 (integer dtypes: in themselves), from the seed and the name."""
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()) + self.seed)
        if self.integers or not self.dtype.is_floating_point:
            low = 0 if self.dtype == torch.uint8 else -4
            found = torch.randint(low, 5, shape, generator=generator, device="cpu")
        else:  # drawing in fp64 takes five times as long
            drawn = torch.float64 if self.dtype == torch.float64 else torch.float32
            found = torch.randn(shape, generator=generator, device="cpu", dtype=drawn)
        found = found.to(self.dtype)
        return found.double() if self.dtype.is_floating_point else found

    def ids(self, name: str, low: int, *shape: int) -> Tensor:
        """Ids from `low` up to the vocabulary."""
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()) + self.seed)
        return torch.randint(low, self.V, shape, generator=generator, device="cpu")


@dataclass(frozen=True)
class Case:
    """An op as a plain program on full tensors; see the module.

    Attributes:
        name: of the op, with a suffix where it has several cases.
        op: the public function.
        inputs: the full arguments by name, in the order of the op's tensor arguments; None for an absent one.
        cuts: how each is cut.
        program: computes the full result from the full arguments, differentiably.
        output_cut: how the result is cut.
        options: the keyword arguments of the op.
        terms: the number of additions in the longest sum.
        roundings: how often a value is rounded to the dtype.
        packings: how often it is packed by the codec in the forward.
        flops: multiplications and additions of one rank.
        wire_bytes: the least that a rank must send.
    """

    name: str
    op: Callable[..., Tensor]
    inputs: Callable[[Sizes], dict[str, Tensor | None]]
    cuts: Callable[[Sizes], dict[str, Cut]]
    program: Callable[..., Tensor]
    output_cut: Callable[[Sizes], Cut] = lambda s: None
    options: Callable[[Sizes], dict[str, Any]] = lambda s: {}
    terms: Callable[[Sizes], int] = lambda s: s.R
    roundings: int = 2
    packings: int = 2
    flops: Callable[[Sizes], int] = lambda s: 0
    wire_bytes: Callable[[Sizes], float] = lambda s: 0.0

    def arguments(self, s: Sizes, rank: int) -> list[Tensor | None]:
        """The tensor arguments of the rank."""
        full, cuts = self.inputs(s), self.cuts(s)
        return [shard(x, cuts[name], s, rank) for name, x in full.items()]

    def call(self, s: Sizes, arguments: list[Tensor | None], group: Any) -> Tensor:
        """The op on the rank's arguments."""
        return self.op(*arguments, group=group, **self.options(s))

    def run(self, s: Sizes, full: Mapping[str, Tensor | None] | None = None) -> Tensor:
        """The full result, of the case's own inputs or of others."""
        return self.program(s, *(self.inputs(s) if full is None else full).values())

    def expected(self, s: Sizes, rank: int) -> Tensor:
        """The exact result of the rank, in fp64."""
        return present(shard(self.run(s), self.output_cut(s), s, rank, round_to=None))

    def bound(self, s: Sizes, rank: int) -> Tensor:
        """The largest error of that result, elementwise."""
        magnitude = self.run(s, {name: absolute(x) for name, x in self.inputs(s).items()}).abs()
        mine = present(shard(magnitude, self.output_cut(s), s, rank, round_to=None))
        return self.rounding(s, self.packings) * mine + self.packings * floor_of(s, magnitude)

    def rounding(self, s: Sizes, packings: int) -> float:
        """The bound's factor before magnitude."""
        if not s.dtype.is_floating_point:
            return 0.0
        packed = packings * CODEC_ROUNDING[s.codec]
        return (self.terms(s) + 2) * unit(sums_dtype(s.dtype)) + self.roundings * unit(s.dtype) + packed

    def upstream(self, s: Sizes, rank: int) -> Tensor:
        """The gradient of the rank's result."""
        y = self.run(s)
        return self._mine(s.randn("dy", *y.shape).to(y.dtype), s, rank)

    def _mine(self, dy: Tensor, s: Sizes, rank: int) -> Tensor:
        return present(shard(dy, self.output_cut(s), s, rank))

    def gradients(self, s: Sizes, rank: int) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """The gradient of the rank's result; the exact gradients of its arguments; the largest errors of those."""
        exact, arriving = self._backward(s, lambda x: x)
        magnitude, _ = self._backward(s, absolute)
        cuts = self.cuts(s)
        # The backward sums again, over tokens, outputs or ids, and rounds what it returns and what it gathers.
        tokens = torch.Size(s.x_shape).numel()
        factor = 2 * self.rounding(s, packings=2) + (tokens + s.N + s.V) * unit(sums_dtype(s.dtype)) + 2 * unit(s.dtype)
        wanted = [shard(g, cuts[name], s, rank, round_to=None) for name, g in exact.items()]
        larger = {
            name: None if g is None else torch.maximum(g.abs(), present(exact[name]).abs())
            for name, g in magnitude.items()
        }
        bounds = [shard(g, cuts[name], s, rank, round_to=None) for name, g in larger.items()]
        dy = self._mine(arriving, s, rank)
        floors = [0.0 if g is None else 4 * floor_of(s, g) for g in larger.values()]
        return dy, wanted, [None if b is None else factor * b + f for b, f in zip(bounds, floors, strict=True)]

    def _backward(self, s: Sizes, see: Callable[[Any], Any]) -> tuple[dict[str, Tensor | None], Tensor]:
        leaves = {}
        for name, x in self.inputs(s).items():
            floating = x is not None and x.is_floating_point()
            leaves[name] = see(present(x)).detach().clone().requires_grad_() if floating else x
        y = self.run(s, leaves)
        dy = see(s.randn("dy", *y.shape)).to(y.dtype)
        wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
        found = torch.autograd.grad(y, list(wanted.values()), dy)
        gradients = dict(zip(wanted, found, strict=True))
        return {name: gradients.get(name) for name in leaves}, dy


def floor_of(s: Sizes, magnitude: Tensor) -> float:
    """The largest loss of one packing, in absolute terms."""
    return CODEC_FLOOR[s.codec] * float(magnitude.max()) if magnitude.numel() else 0.0


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to the dtype."""
    return torch.finfo(dtype).eps / 2


def absolute(x: Tensor | None) -> Tensor | None:
    """|x|; integers (ids) as they are."""
    return x.abs() if x is not None and x.is_floating_point() else x


def present(x: Tensor | None) -> Tensor:
    """Return x, which is not None."""
    assert x is not None
    return x


def shard(x: Tensor | None, cut: Cut, s: Sizes, rank: int, round_to: Any = "dtype") -> Tensor | None:
    """Return the rank's shard of x.

    Args:
        x: unsharded; where `cut` is PARTIAL, the terms of all ranks, [R, ...].
        cut: the dimension to shard, PARTIAL for the rank's term, or None for all of x.
        s: sizes, with R ranks.
        rank: which.
        round_to: None keeps fp64; else the result has the dtype of the case.
    """
    if x is None:
        return None
    if cut == PARTIAL:
        found = x[rank]
    elif cut is None:
        found = x
    else:
        assert isinstance(cut, int)
        found = part(x, cut, s.R, rank)
    if round_to is not None and found.is_floating_point():
        found = found.to(s.dtype)
    return found.clone(memory_format=torch.contiguous_format)
