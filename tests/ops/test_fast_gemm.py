"""The fused GEMMs of plain tensors past the dispatcher: the bits of the op, and every call that is not one for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness.ops import on_cpu
from tpkernels import ops
from tpkernels._native import _C
from tpkernels.comm.group import Group
from tpkernels.testing.case import present

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    with Group.open() as group:
        yield group


def operands(M: tuple[int, ...], N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(M[0] + N + K)
    return torch.randn(*M, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)


def by_op(group: Group, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.tpkernels.gemm_all_reduce(x, w, bias, group.name, group.world_size, "none")
    return y


def check_bits(group: Group) -> None:
    """Both ways, on every rank another share of them: they are one call to the group."""
    taken = 0
    for dtype, M, (N, K), has_bias in product(DTYPES, ((1,), (5,), (2, 3), (40,)), ((7, 9), (64, 80)), (False, True)):
        x, w, b = operands(M, N, K, dtype)
        bias = b if has_bias else None
        for engine in _C.engines_for(str(dtype).removeprefix("torch."), x[..., 0].numel(), N, K):
            group._communicator.add_measured(str(dtype).removeprefix("torch."), x[..., 0].numel(), N, K, {engine: 1.0})
            want = by_op(group, x, w, bias)
            assert torch.equal(ops.gemm_all_reduce(x, w, bias, group=group), want)
            mixed = by_op if group.rank == 0 else _fast_or_op
            assert torch.equal(mixed(group, x, w, bias), want)
            taken += _C.fast_gemm_all_reduce(x, w, bias, group._address, "none") is not None
            local = torch.ops.tpkernels.replicated_gemm(x, w, bias, group.name, group.world_size, "none")
            assert torch.equal(ops.replicated_gemm(x, w, bias, group=group), local)
    group._communicator.forget_measured()
    assert taken > 40


def _fast_or_op(group: Group, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    y = _C.fast_gemm_all_reduce(x, w, bias, group._address, "none")
    return by_op(group, x, w, bias) if y is None else y


def replicated_by_op(group: Group, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.tpkernels.replicated_gemm(x, w, bias, group.name, group.world_size, "none")
    return y


def check_gradients(group: Group) -> None:
    """Of calls that autograd records: forward and backward by either way, on every rank another."""
    ways: list[tuple[Callable[..., Tensor], Callable[..., Tensor], str]] = [
        (ops.gemm_all_reduce, by_op, "gemm_all_reduceBackward"),
        (ops.replicated_gemm, replicated_by_op, "replicated_gemmBackward"),
    ]
    for dtype, M, has_bias, (public, op, name) in product(DTYPES, ((1,), (5,), (2, 3), (40,)), (False, True), ways):
        for variables in ((0, 1, 2), (0,), (1,)):
            found = []
            for way in ("public", "op", "mixed"):
                x, w, b = operands(M, 7, 9, dtype)
                leaves = [t.requires_grad_() for i, t in enumerate((x, w, b)) if i in variables and (i < 2 or has_bias)]
                fast = way == "public" or (way == "mixed" and group.rank == 0)
                arguments = (x, w, b if has_bias else None)
                y = public(*arguments, group=group) if fast else op(group, *arguments)
                assert present(y.grad_fn).name() == (name if fast else present(y.grad_fn).name())
                dy = torch.ones_like(y).cumsum(0)
                found.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), (dtype, M, name, variables)


def columns(x: Tensor) -> Tensor:
    """The values of x as the first columns of a wider tensor, as a shard cut along columns is."""
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


def turned(x: Tensor) -> Tensor:
    """The values of x, column by column in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def check_strides(group: Group) -> None:
    """One engine for all ops and both ways, however the operands lie in memory."""
    for dtype, M, has_bias in product(DTYPES, ((1,), (5,), (40,)), (False, True)):
        x, w, b = operands(M, 64, 80, dtype)
        bias = b if has_bias else None
        for engine in _C.engines_for(str(dtype).removeprefix("torch."), M[0], 64, 80):
            group._communicator.add_measured(str(dtype).removeprefix("torch."), M[0], 64, 80, {engine: 1.0})
            for of_x, of_w in product((Tensor.clone, columns, turned), repeat=2):
                call = of_x(x), of_w(w), bias
                want = by_op(group, *call)
                assert torch.equal(ops.gemm_all_reduce(*call, group=group), want), (dtype, M, engine, of_x, of_w)
                rows = ops.all_gather(ops.gemm_reduce_scatter(*call, group=group), dim_size=M[0], group=group)
                assert torch.equal(rows, want), (dtype, M, engine, of_x, of_w)
    group._communicator.forget_measured()


def check(group: Group) -> None:
    check_bits(group)
    check_strides(group)
    check_gradients(group)


@pytest.mark.parametrize(("R", "transport"), [(1, "auto"), (3, "shm"), (2, "group")])
def test_it_has_the_bits_of_the_op_and_makes_the_same_call(R: int, transport: str) -> None:
    on_cpu(check, R, transport)


def test_a_recorded_call_keeps_hooks_saved_tensors_and_the_error_of_a_changed_one(group: Group) -> None:
    x, w, _ = operands((5,), 7, 9, torch.float32)
    seen: list[str] = []
    w.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append("packed") or t, lambda t: t):
        y = ops.gemm_all_reduce(x, w, group=group)
    assert seen == ["packed"], "x alone is needed for the gradient of w"
    present(y.grad_fn).register_hook(lambda *_: seen.append("hook"))
    y.sum().backward()
    assert seen == ["packed", "hook"]
    torch.testing.assert_close(w.grad, x.sum(0).expand(7, 9))
    y = ops.replicated_gemm(x, w, group=group)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = ops.replicated_gemm(x, w, group=group)
    (first,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), w)
    torch.testing.assert_close(second, 2 * (x.T @ x).sum(0).expand(7, 9))


def test_a_call_in_a_hook_of_a_recorded_call_is_one_of_its_own(group: Group) -> None:
    x, w, _ = operands((5,), 7, 9, torch.float32)
    inside: list[Tensor] = []
    w.requires_grad_()

    def hook(t: Tensor) -> Tensor:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            inside.append(ops.gemm_all_reduce(2 * x, w, group=group))
        return t

    with torch.autograd.graph.saved_tensors_hooks(hook, hook):
        y = ops.replicated_gemm(x, w, group=group)
    (dw,) = torch.autograd.grad(y.sum(), w)
    assert len(inside) == 2
    for z in inside:
        assert torch.equal(z, 2 * y)
        assert torch.equal(torch.autograd.grad(z.sum(), w)[0], 2 * dw)
    with pytest.raises(ValueError, match="called from elsewhere"):
        _C.forward_linear(None, x, w, None, group._address, "none")


def both(group: Group, x: Any, w: Any, bias: Any = None) -> list[Any]:
    return [
        _C.fast_linear(x, w, bias, group._address, "none"),
        _C.fast_gemm_all_reduce(x, w, bias, group._address, "none"),
    ]


def test_what_does_not_fit_is_left_to_the_op_whose_text_names_it(group: Group) -> None:
    x, w, b = operands((5,), 7, 9, torch.float32)
    wrong = [
        (x, w[:, :8], b), (x, w, b[:6]), (x, w.double(), b), (x, w, b.double()), (x.int(), w.int(), None),
        (x[0], w, b), (x, w[0], b), (x[:0], w, b), (x, w[:0], None), (x.to("meta"), w, b), (x, "w", b), (x, w, 3),
        (x, w, torch.randn(14)[::2]), (x.to_sparse(), w, b), (x.cfloat(), w.cfloat(), None),
    ]  # fmt: skip
    for call in wrong:
        assert both(group, *call) == [None, None], call
    with pytest.raises(ValueError, match=r"gemm_all_reduce: .*9.*8"):
        ops.gemm_all_reduce(x, w[:, :8], group=group)
    with pytest.raises(ValueError, match="replicated_gemm: codec must be"):
        ops.replicated_gemm(x, w, group=group, codec="zip")


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", [ops.gemm_all_reduce, ops.replicated_gemm])
def test_layers_of_torch_that_observe_a_call_see_the_op(group: Group, op: Callable[..., Tensor]) -> None:
    x, w, b = operands((5,), 7, 9, torch.float32)
    with Seen() as seen:
        op(x, w, b, group=group)
    assert any("tpkernels" in name for name in seen.names)
    for tensor in (x, w, b):
        tensor.requires_grad_()
        assert op(x, w, b, group=group).requires_grad
        with torch.no_grad():
            assert not op(x, w, b, group=group).requires_grad
            assert _C.fast_linear(x, w, b, group._address, "none") is not None
        tensor.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(x, w, b, group=group).dtype == torch.bfloat16


@pytest.mark.parametrize("M", [(3,), (40,), (2, 2)])
def test_its_output_is_no_view_and_may_be_modified(group: Group, M: tuple[int, ...]) -> None:
    x, w, b = operands(M, 7, 9, torch.float32)
    for y in (y for y in both(group, x, w, b) if y is not None):
        assert not y._is_view() and y.is_contiguous() and y.shape == (*M, 7)
        y.mul_(torch.ones(7, requires_grad=True)).sum().backward()


def test_a_closed_or_forked_group_is_refused_with_the_text_of_the_op() -> None:
    x, w, b = operands((5,), 7, 9, torch.float32)
    group = Group.open()
    group.close()
    assert both(group, x, w, b) == [None, None]
    for op in (ops.gemm_all_reduce, ops.replicated_gemm):
        with pytest.raises((ValueError, RuntimeError), match=r"closed|not open"):
            op(x, w, b, group=group)
    with Group.open() as opened:
        if (child := os.fork()) == 0:
            os._exit(0 if both(opened, x, w, b) == [None, None] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
