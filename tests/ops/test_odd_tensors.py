"""Tensors whose values are not simply in their memory: ZeroTensors, negated views, wrappers, other layouts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import tpkernels as tpk
from tests.harness.ops import on_cpu, raised
from tpkernels import ops
from tpkernels._native import _C
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks


def zeros(*shape: int) -> Tensor:
    """As the gradient of torch.sgn: it has no memory."""
    x = torch.ones(shape, requires_grad=True)
    (z,) = torch.autograd.grad(torch.sgn(x).sum(), x)
    assert z._is_zerotensor()
    return z


def negated(x: Tensor) -> Tensor:
    """x as a view that negates what lies in memory."""
    y = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert y.is_neg()
    return y


def check_zeros(group: Group) -> None:
    R = group.world_size
    for n in (6, 200_000):
        assert torch.equal(ops.all_reduce(zeros(n), group=group), torch.zeros(n))
        assert torch.equal(ops.all_reduce(zeros(n), group=group, op="max", codec="none"), torch.zeros(n))
        assert torch.equal(ops.all_reduce(zeros(n), group=group, codec="fp16"), torch.zeros(n))
        assert torch.equal(ops.all_gather(zeros(n), group=group), torch.zeros(R * n))
        assert torch.equal(ops.all_gather(zeros(n), group=group, dim_size=R * n), torch.zeros(R * n))
        assert torch.equal(ops.reduce_scatter(zeros(R * n), group=group), torch.zeros(n))
        assert torch.equal(ops.decompress(ops.compress(zeros(n), "fp16"), (n,), torch.float32, "fp16"), torch.zeros(n))
    assert ops.squared_norm([zeros(4), torch.ones(3)]).item() == 3.0
    text = raised(lambda: ops.all_reduce_(zeros(4), group=group), ValueError)
    assert text == "all_reduce_: x must have memory to write to, got a ZeroTensor; pass x.clone()"
    text = raised(lambda: ops.compress_with_feedback(torch.ones(4), zeros(4), "fp16"), ValueError)
    assert "residual must have memory to write to" in text
    x, w = torch.ones(4, 3), torch.ones(5, 3)
    for a, b, bias in ((zeros(4, 3), w, None), (x, zeros(5, 3), None), (x, w, zeros(5)), (zeros(4, 3), w, zeros(5))):
        want = F.linear(R * a.clone(), b.clone(), None if bias is None else bias.clone())
        assert torch.equal(ops.gemm_all_reduce(a, b, bias, group=group), want)
    assert "without memory" in raised(
        lambda: torch.ops.tpkernels.all_reduce.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), zeros(4), group.name, R, "sum", "none"
        ),
        ValueError,
    )


def check_zeros_in_backwards(group: Group) -> None:
    """torch.sgn of everything that has a gradient: what arrives in each backward is a ZeroTensor."""
    R, L = group.world_size, tpk.layers
    made: list[Callable[[Tensor], Tensor]] = [
        lambda x: ops.all_reduce(x, group=group),
        lambda x: ops.all_reduce(x, group=group, op="max"),
        lambda x: ops.all_gather(x, group=group),
        lambda x: ops.all_gather(x, group=group, grad="split"),
        lambda x: ops.reduce_scatter(x, group=group),
        L.ColumnParallelLinear(4, 6, group=group),
        L.ColumnParallelLinear(4, 6, group=group, gather_output=True),
        L.ColumnParallelLinear(4, 6, group=group, sequence_parallel=True),
        L.RowParallelLinear(4 * R, 6, group=group),
        L.RowParallelLinear(4 * R, 6, group=group, sequence_parallel=True),
        lambda x: ops.all_reduce_add_rms_norm(x, x, torch.ones(4, requires_grad=True), group=group)[0],
    ]
    for n, f in enumerate(made):
        x = torch.ones(6, 4, requires_grad=True)
        torch.sgn(f(x)).sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad.clone(), torch.zeros(6, 4)), n
    table = L.VocabParallelEmbedding(8, 4, group=group)
    torch.sgn(table(torch.tensor([1, 7]))).sum().backward()
    assert not table.weight.grad.any()
    linear = L.ColumnParallelLinear(4, 6, group=group)
    (torch.sgn(linear.weight).sum() + linear.bias.sum()).backward()
    norm = tpk.data_parallel.clip_grad_norm_(linear, 1e9, groups=group)
    assert torch.allclose(norm.float(), torch.tensor(6.0).sqrt())
    model = nn.Linear(4, 3)
    with tpk.data_parallel.GradAggregator(model, group=group, sync_parameters=True) as aggregator:
        (torch.sgn(model.weight).sum() + model.bias.sum()).backward()
        aggregator.wait()
        assert not model.weight.grad.any()
        assert torch.equal(model.bias.grad, torch.ones(3))


def check_negated(group: Group) -> None:
    R = group.world_size
    for n in (6, 200_000):
        x = torch.arange(float(n))
        assert torch.equal(ops.all_reduce(negated(x), group=group), R * x)
        y = negated(x)
        assert torch.equal(ops.all_reduce_(y if group.rank else x.clone(), group=group), R * x), "one rank has it plain"
        assert not group.rank or torch.equal(y.resolve_neg(), R * x)
        assert torch.equal(ops.all_gather(negated(x), group=group), x.repeat(R))
        got = ops.all_gather(torch.complex(x, x).conj(), group=group)
        assert torch.equal(got.resolve_conj(), torch.complex(x, -x).repeat(R))
        leaf = torch.ones(n, requires_grad=True)
        ops.all_reduce(leaf, group=group).backward(negated(x))
        assert torch.equal(leaf.grad, x)
    residual = torch._neg_view(torch.zeros(4))
    text = raised(lambda: ops.compress_with_feedback(torch.ones(4), residual, "fp16"), ValueError)
    assert "residual must not be a negated view" in text


def check_overlapping(group: Group) -> None:
    """Rows that share memory, by each engine."""
    _C.assume_cpu(True, True)
    try:
        for shape, strides in (((10, 6), (1, 1)), ((6, 10), (2, 1)), ((8, 6), (0, 1)), ((8, 6), (1, 2))):
            w = torch.as_strided(torch.arange(40.0) - 7, shape, strides)
            x, v = torch.randn(9, shape[1]), torch.randn(9, 6)
            assert torch.allclose(ops.replicated_gemm(x, w, group=group), x @ w.clone().T, atol=1e-4)
            assert torch.allclose(ops.replicated_gemm(w, x, group=group), w.clone() @ x.T, atol=1e-4)
            assert torch.allclose(ops.replicated_gemm(v, v, group=group), v @ v.T, atol=1e-4)
    finally:
        _C.forget_assumed_cpu()


def check_all(group: Group) -> None:
    check_zeros(group)
    check_zeros_in_backwards(group)
    check_negated(group)
    check_overlapping(group)


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_zero_tensors_and_negated_views_are_their_values(transport: str) -> None:
    on_cpu(check_all, 2, transport)


def check_refused() -> None:
    group = Group.open()
    R = group.world_size
    mesh = init_device_mesh("cpu", (R,))
    whole = distribute_tensor(torch.ones(2 * R, 3), mesh, [Shard(0)])
    for f in (ops.all_reduce, ops.all_reduce_, ops.all_gather, ops.reduce_scatter):
        name = "x_shard" if f is ops.all_gather else "x"
        text = raised(lambda f=f: f(whole, group=group), TypeError)
        assert text == f"{f.__name__}: {name} must be this rank's tensor, got a DTensor: pass {name}.to_local()"
    assert "w_shard.to_local()" in raised(lambda: ops.gemm_all_reduce(torch.ones(2, 3), whole, group=group), TypeError)
    text = raised(lambda: torch.func.grad(lambda x: ops.all_reduce(x, group=group).sum())(torch.ones(3)), Exception)
    assert "all_reduce: x must not be differentiated by torch.func (grad, vjp, jacrev" in text
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert "x must be a dense" in raised(lambda: ops.all_reduce(nested, group=group), ValueError)
    quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8)
    for f in (ops.all_reduce, ops.all_reduce_, ops.all_gather, ops.reduce_scatter):
        assert "tensor, got a quantized tensor" in raised(lambda f=f: f(quantized, group=group), ValueError)
    assert ops.all_reduce(torch.ones(1), group=group).item() == R  # nothing was sent
    group.close()


def test_tensors_that_are_not_this_ranks_values_are_refused() -> None:
    run_ranks(check_refused, 2)


TOO_MUCH = torch.ones(1, 1).expand(1 << 24, 1)  # its products, and what it is copied to, are larger than addresses
NO_TEXT = "\ud800"  # a str without UTF-8


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.all_reduce(TOO_MUCH.expand(-1, 1 << 24)),
        lambda: ops.all_gather(torch.ones(0, 8), dim_size=1 << 62),
        lambda: ops.gemm_all_reduce(TOO_MUCH, TOO_MUCH),
        lambda: ops.gemm_reduce_scatter(TOO_MUCH, TOO_MUCH),
        lambda: ops.all_gather_gemm(TOO_MUCH, TOO_MUCH),
        lambda: ops.replicated_gemm(TOO_MUCH, TOO_MUCH),
        lambda: ops.vocab_embedding(torch.zeros(1, dtype=torch.int64).expand(1 << 44), torch.ones(4, 64)),
        lambda: ops.compress(TOO_MUCH.expand(-1, 1 << 24), "int8"),
    ],
)
def test_memory_that_cannot_be_had_is_an_error_and_not_the_end_of_the_process(call: Callable[[], Tensor]) -> None:
    with pytest.raises((MemoryError, RuntimeError)):
        call()
    assert ops.all_reduce(torch.ones(2)).sum() == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.all_reduce(torch.ones(4), codec=NO_TEXT),
        lambda: ops.all_reduce(torch.ones(4), op=NO_TEXT),
        lambda: ops.all_reduce_(torch.ones(4), codec=NO_TEXT),
        lambda: ops.all_gather(torch.ones(4), codec=NO_TEXT),
        lambda: ops.all_gather(torch.ones(4), dim_size=1 << 70),
        lambda: ops.reduce_scatter(torch.ones(4), codec=NO_TEXT),
        lambda: ops.gemm_all_reduce(torch.ones(2, 4), torch.ones(3, 4), codec=NO_TEXT),
        lambda: ops.replicated_gemm(torch.ones(2, 4), torch.ones(3, 4), codec=NO_TEXT),
        lambda: ops.compress(torch.ones(4), NO_TEXT),
        lambda: ops.compress_with_feedback(torch.ones(4), torch.zeros(4), NO_TEXT),
        lambda: ops.decompress(torch.zeros(0, dtype=torch.uint8), (1 << 62, 2), torch.float32, "bf16"),
    ],
)
def test_names_without_utf8_and_sizes_that_overflow_are_value_errors(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"must .*got"):
        call()
