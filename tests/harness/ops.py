"""What the op tests share: run cases on a rank and compare them with their references, within bounds."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness.places import PLACES, Place
from tpkernels.comm.group import Group
from tpkernels.testing.case import Case, Sizes

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
ALONE = threading.Lock()
"""For what begins with torch.manual_seed: ranks that are threads share torch's own generator."""


def place_for(name: str, R: int) -> Place:
    """The place, for R ranks; where this machine lacks something, the test is skipped and says what it needs."""
    place = PLACES[name]
    needs = place.lacks(R)
    if needs is not None:
        pytest.skip(needs)  # "virtual needs a CUDA GPU: ..."
    return place


def run_at(place: str, body: Callable[..., Any], R: int, *args: Any, **options: Any) -> list[Any]:
    """body(group, *args) on R ranks of a place; where the place lacks something, the test is skipped and says what."""
    return place_for(place, R).run(body, R, *args, **options)


def on_cpu(body: Callable[..., Any], R: int, transport: str = "auto", *args: Any) -> list[Any]:
    """body(group, *args) on R processes; of one rank there is only one kind of group."""
    return run_at("cpu", body, R, *args, transport=transport if R > 1 else "auto")


def is_device(group: Group) -> bool:
    """Whether calls return before they have run: on a GPU, also an emulated one."""
    return hasattr(group._communicator, "device")


def there(group: Group, arguments: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Tensors where the group works."""
    return [None if x is None else x.to(group.device) for x in arguments]


class Drawn:
    """Random numbers that all ranks draw alike, where the group works: ranks that are threads share torch's own."""

    def __init__(self, group: Group, seed: int = 0) -> None:
        self._group = group
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device="cpu").to(self._group.device)

    def randint(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        found = torch.randint(high, shape, generator=self._generator, device="cpu", dtype=dtype)
        return found.to(self._group.device)


def assert_within(got: Tensor, want: Tensor, bound: Tensor, what: str) -> None:
    """Elementwise |got - want| <= bound, where a NaN is never within."""
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
    if got.numel() == 0:
        return
    got, want, bound = got.detach().cpu(), want.detach().cpu(), bound.cpu()
    got, want = (x.double() if x.is_floating_point() else x for x in (got, want))
    if not want.is_floating_point():
        assert torch.equal(got, want), f"{what}: {got} is not {want}"
        return
    excess = (got - want).abs() - bound
    off, worst = int((~(excess <= 0)).sum()), float(excess.nan_to_num(9e9).max())
    assert not off, (
        f"{what}: {off} of {got.numel()} values off, the worst by {worst:.3g} more than its bound; "
        f"got {got.flatten()[:8].tolist()}, expected {want.flatten()[:8].tolist()}"
    )


def describe(case: Case, s: Sizes) -> str:
    """A failing check says which one it was."""
    return f"{case.name} {s}"


def check_forward(case: Case, s: Sizes, group: Group) -> Tensor:
    """One rank's part of a case, compared with the reference; exact for integers without a codec."""
    y = case.call(s, there(group, case.arguments(s, group.rank)), group)
    want, bound = case.expected(s, group.rank), case.bound(s, group.rank)
    if s.integers and s.codec == "none" and want.dtype.is_floating_point and s.op == "sum" and case.terms(s) < 10_000:
        bound = torch.zeros_like(bound)
        want = want.to(y.dtype).double()
    assert y.is_contiguous(), describe(case, s)
    assert_within(y, want, bound, describe(case, s))
    return y


def check_gradient(case: Case, s: Sizes, group: Group) -> None:
    """All gradients of one rank of a case, compared with those of the unsharded program."""
    arguments = there(group, case.arguments(s, group.rank))
    for x in arguments:
        if x is not None and x.is_floating_point():
            x.requires_grad_()
    y = case.call(s, arguments, group)
    dy, wanted, bounds = case.gradients(s, group.rank)
    y.backward(dy.to(y.device))
    for i, (x, want, bound) in enumerate(zip(arguments, wanted, bounds, strict=True)):
        if x is None or not x.is_floating_point():
            continue
        assert x.grad is not None, f"{describe(case, s)}: argument {i} has no gradient"
        assert want is not None
        assert bound is not None
        assert_within(x.grad, want, bound, f"{describe(case, s)}: gradient of argument {i}")


def digest(*tensors: Tensor) -> str:
    """Of the bits of tensors."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(f"{x.dtype}{list(x.shape)}".encode())
        found.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def assert_same_on_all_ranks(group: Group, what: str, *tensors: Tensor) -> None:
    """Every rank holds the same bits."""
    digests = group.all_gather_ints(int(digest(*tensors)[:15], 16))
    assert len(set(digests)) == 1, f"{what}: the ranks hold different bits: {digests}"


def raised(fn: Callable[[], object], kinds: type[Exception] | tuple[type[Exception], ...]) -> str:
    """The text of the error that fn raises."""
    try:
        found = fn()
    except kinds as error:
        return str(error)
    raise AssertionError(f"expected {kinds}, but the call returned {found!r}")


def grid(case: Case, sizes: Iterable[Sizes], group: Group, check: Callable[[Case, Sizes, Group], object]) -> int:
    """Check a case with all sizes; return how many."""
    return len([check(case, s, group) for s in sizes])
