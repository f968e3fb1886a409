"""Helpers of the tests of gradient aggregation: gradients known in advance, their fp64 average, bounds, equal bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tests.harness.ops import assert_within
from tpkernels.comm.group import Group
from tpkernels.comm.objects import gather
from tpkernels.data_parallel import GradAggregator
from tpkernels.testing.case import unit

SHAPES = {"table": (40, 30), "inner": (70, 50), "bias": (50,), "scalar": (), "outer": (50, 9), "last": (9,)}
# What one packing adds: the share of the value, or of the largest value of its bucket.
OF_VALUE = {"none": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}
OF_LARGEST = {"int8": 1 / 253, "fp8": 2.0**-4}


class Bare(nn.Module):
    """Parameters and nothing else, the same on all ranks."""

    def __init__(self, dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, ...]] | None = None) -> None:
        super().__init__()
        for i, (name, shape) in enumerate((shapes or SHAPES).items()):
            generator = torch.Generator().manual_seed(i)
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


def gradient(name: str, shape: Iterable[int], rank: int, step: int) -> Tensor:
    """The gradient that a rank has in a step, fp64; values over several decades."""
    seed = sum(ord(c) * 31**i for i, c in enumerate(name)) % 100_000
    generator = torch.Generator().manual_seed(seed + 1_000_003 * rank + 7919 * step)
    drawn = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return drawn[0] * 10 ** drawn[1].clamp(-3, 3)


def backward(
    model: nn.Module,
    rank: int,
    step: int,
    only: Callable[[str], bool] = lambda name: True,
    scaler: torch.amp.GradScaler | None = None,
    bad: str = "",
) -> None:
    """A backward pass that gives each parameter exactly gradient(...), rounded to its dtype, times the loss scale.

    The gradient of the parameter `bad` has an infinity in it.
    """
    terms = []
    for name, p in model.named_parameters():
        if p.requires_grad and only(name):
            factor = gradient(name, p.shape, rank, step).to(p.dtype)
            if name == bad:
                factor.view(-1)[0] = math.inf
            terms.append((p * factor).sum().double())
    loss = torch.stack(terms).sum()
    (loss if scaler is None else scaler.scale(loss)).backward()


def average(name: str, p: Tensor, R: int, steps: Iterable[int], ranks: Iterable[int] | None = None) -> Tensor:
    """The fp64 average over R ranks of the gradients, summed over steps, as `backward` gives them."""
    every = [gradient(name, p.shape, r, s).to(p.dtype).double() for r in (ranks or range(R)) for s in steps]
    return torch.stack(every).sum(0) / R


def bound_of(magnitude: Tensor, R: int, codec: str, largest: float, dtype: torch.dtype, packings: int) -> Tensor:
    """How far an average in `dtype` may be from the fp64 one.

    Args:
        magnitude: the average of what was summed, taken absolutely.
        largest: of its bucket.
        packings: that a value has gone through: as a contribution, as a sum, and as what those two lost a step before.
    """
    packed = OF_VALUE[codec] * magnitude if codec in OF_VALUE else magnitude * 0.0 + OF_LARGEST[codec] * largest
    rounding = (R + 6) * unit(torch.float32) + 3 * unit(dtype)
    return (packings + 0.1) * packed + rounding * magnitude + 2.0**-39 * largest


def assert_averaged(model: nn.Module, R: int, codec: str, steps: int = 1, *, carried: bool = False) -> None:
    """Every p.grad is the average over the ranks of the steps' gradients, within the bound of the codec.

    carried: the same was sent in the step before, so that what its packing lost has come along.
    """
    names = dict(model.named_parameters())
    seen = [(r, s) for r in range(R) for s in range(steps)]
    every = {n: torch.stack([gradient(n, p.shape, *at) for at in seen]) for n, p in names.items()}
    largest = max(float(found.abs().max()) for found in every.values()) * steps
    for name, p in names.items():
        assert p.grad is not None, name
        want, magnitude = average(name, p, R, range(steps)), every[name].abs().sum(0) / R
        bound = bound_of(magnitude, R, codec, largest, p.grad.dtype, packings=4 if carried else 2)
        assert_within(p.grad.double(), want, bound, name)


def assert_same_bits(tensors: dict[str, Tensor | None], group: Group) -> None:
    """All ranks hold the same."""
    every = gather({name: None if t is None else t.detach().clone() for name, t in tensors.items()}, group)
    for rank, theirs in enumerate(every):
        for name, first in every[0].items():
            other = theirs[name]
            assert (first is None) == (other is None), f"{name} on rank {rank}"
            if first is not None and other is not None:
                same = torch.equal(first.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
                assert same, f"{name} on rank {rank}"


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def values(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def events_of(aggregator: GradAggregator) -> list[tuple[str, int]]:
    """What happens from now on, in order."""
    aggregator._traffic.events = events = []
    return events
