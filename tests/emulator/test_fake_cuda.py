"""Ops on CUDA tensors without a GPU: fakes of every op, and what is said of tensors on the wrong device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tests.harness.op_calls import op_calls
from tests.harness.ops import describe
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.testing.case import Case, Sizes
from tpkernels.testing.cases import CASES

CUDA = torch.device("cuda", 0)


class OnCuda:
    """A communicator of one rank of many, of which only the names are asked."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.name, self.label, self.transport, self.address = "fake/1", "fake", "peer", 0
        self.rank, self.world_size = rank, world_size

    def close(self, why: str = "") -> None:
        pass


@pytest.fixture(params=[(0, 1), (2, 3)], ids=["one rank", "rank 2 of 3"])
def group(request: pytest.FixtureRequest) -> Any:
    with Group(OnCuda(*request.param), None, 30.0, "fake", CUDA) as group:
        yield group


def sized(case: Case, s: Sizes) -> Case:
    """The case with the sizes given that only the ranks know."""
    known = {"dim_size": s.M} if case.name.startswith("all_gather") else {}
    known |= {"vocab_size": s.V} if case.name.startswith("vocab") else {}
    return replace(case, options=lambda s: {**case.options(s), **known})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fakes_of_every_op_stay_on_the_gpu(case: Case, group: Group) -> None:
    for s in (
        Sizes(R=group.world_size, M=6, N=9, K=12, V=15),
        Sizes(R=group.world_size, M=7, N=5, K=11, V=17, dtype=torch.bfloat16, codec="fp16"),
    ):
        known, rank = sized(case, s), group.rank
        want = known.expected(s, rank)
        arguments = known.arguments(s, rank)
        with FakeTensorMode():
            y = known.call(s, [on_cuda(x) for x in arguments], group)
        assert (y.device, y.shape) == (CUDA, want.shape), describe(case, s)
        assert y.is_contiguous()


def on_cuda(x: Any) -> Any:
    """The argument with its tensors, if any, on a GPU that is not there; under a FakeTensorMode."""
    if isinstance(x, list):
        return [on_cuda(one) for one in x]
    return torch.empty(x.shape, dtype=x.dtype, device=CUDA) if isinstance(x, Tensor) else x


def test_fakes_of_backwards_and_local_ops_stay_on_the_gpu(group: Group) -> None:
    """Every registered op by itself: autograd does not start for a GPU that is not there."""
    for op, arguments in op_calls(group):
        with FakeTensorMode(), torch.no_grad():
            found = op(*(on_cuda(x) for x in arguments))
        for y in found if isinstance(found, tuple | list) else [found]:
            assert y is None or y.device == CUDA, op


def test_fakes_of_ops_without_a_group_need_no_kernels() -> None:
    with FakeTensorMode():
        x = torch.empty(1000, device=CUDA)
        wire = ops.compress(x, "fp16")
        assert wire.device == CUDA
        assert ops.decompress(wire, (1000,), torch.float32, "fp16").device == CUDA
        assert ops.squared_norm([x, x.half()]).device == CUDA
        assert ops.compress_with_feedback(x, torch.empty_like(x), "fp16").device == CUDA


def test_in_place_on_a_fake_gpu(group: Group) -> None:
    with FakeTensorMode():
        x = torch.empty(7, 3, device=CUDA)
        assert ops.all_reduce_(x, group=group) is x


def calls(x: Tensor, group: Group) -> dict[str, Callable[[], Any]]:
    """Every public op with its tensors where x is."""
    w, ids = x.new_ones(4, 3), torch.zeros(2, dtype=torch.int64, device=x.device)
    return {
        "all_reduce: x": lambda: ops.all_reduce(x, group=group),
        "all_reduce_: x": lambda: ops.all_reduce_(x, group=group),
        "reduce_scatter: x": lambda: ops.reduce_scatter(x, group=group),
        "all_gather: x_shard": lambda: ops.all_gather(x, group=group),
        "all_reduce_packed: wire": lambda: ops.all_reduce_packed(x, (2,), x.dtype, group=group, codec="fp16"),
        "reduce_scatter_packed: wire": lambda: ops.reduce_scatter_packed(x, 2, x.dtype, group=group, codec="fp16"),
        "compress_parts: x": lambda: ops.compress_parts(x, "fp16", group=group),
        "gemm_all_reduce: x_shard": lambda: ops.gemm_all_reduce(x, w, group=group),
        "gemm_reduce_scatter: x_shard": lambda: ops.gemm_reduce_scatter(x, w, group=group),
        "all_gather_gemm: x_shard": lambda: ops.all_gather_gemm(x, w, group=group),
        "replicated_gemm: x": lambda: ops.replicated_gemm(x, w, group=group),
        "vocab_embedding: ids": lambda: ops.vocab_embedding(ids, w, group=group, vocab_size=4 * group.world_size),
        "vocab_cross_entropy: logits_shard": lambda: ops.vocab_cross_entropy(x, ids, group=group),
        "all_reduce_add_rms_norm: x": lambda: ops.all_reduce_add_rms_norm(x, x, x.new_ones(3), group=group),
    }


def test_a_tensor_on_the_cpu_is_none_for_a_group_on_a_gpu(group: Group) -> None:
    for where, call in calls(torch.ones(2, 3), group).items():
        with pytest.raises(ValueError, match=rf"{where} must be on cuda:0, where group 'fake' works, got device cpu"):
            call()


def test_a_tensor_on_a_gpu_is_none_for_a_group_on_the_cpu_or_on_another_gpu(group: Group) -> None:
    with Group.open() as on_cpu, FakeTensorMode():
        for where, call in calls(torch.ones(2, 3, device=CUDA), on_cpu).items():
            text = rf"{where} must be on cpu, where group 'local' works, got device cuda:0 \(Group.open\(device='cuda'"
            with pytest.raises(ValueError, match=text):
                call()
        for where, call in calls(torch.ones(2, 3, device="cuda:1"), group).items():
            with pytest.raises(ValueError, match=f"{where} must be on cuda:0, where .*, got device cuda:1$"):
                call()


def test_arguments_on_two_devices_are_named(group: Group) -> None:
    with FakeTensorMode():
        x, w = torch.ones(2, 3, device=CUDA), torch.ones(4, 3)
        with pytest.raises(ValueError, match=r"gemm_all_reduce: w_shard must be on cuda:0, .*, got device cpu"):
            ops.gemm_all_reduce(x, w, group=group)


@contextmanager
def autocast_on_cuda(dtype: torch.dtype) -> Iterator[None]:
    """What torch.autocast("cuda") does, which refuses to where there is no GPU."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


def test_autocast_of_the_gpu_is_followed_on_the_gpu(group: Group) -> None:
    with FakeTensorMode():
        x, w = torch.ones(6, 3, device=CUDA), torch.ones(4, 3, device=CUDA)
        with autocast_on_cuda(torch.bfloat16):
            for op in (ops.gemm_all_reduce, ops.gemm_reduce_scatter, ops.replicated_gemm):
                assert op(x, w, group=group).dtype == torch.bfloat16
            assert ops.all_gather_gemm(x, w, group=group, dim_size=6 * group.world_size).dtype == torch.bfloat16
            assert ops.gemm_all_reduce(x.double(), w.double(), group=group).dtype == torch.float64
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ops.gemm_all_reduce(x, w, group=group).dtype == torch.float32


def test_while_a_graph_is_captured_sizes_must_be_given(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    text = r"all_gather_ints on group 'fake': the ranks cannot ask each other while a CUDA graph .* pass the size"
    with pytest.raises(ValueError, match=text):
        group.all_gather_ints(3)
    with FakeTensorMode():
        x, w = torch.ones(6, 3, device=CUDA), torch.ones(4, 3, device=CUDA)
        for op, args in ((ops.all_gather, (x,)), (ops.all_gather_gemm, (x, w))):
            with pytest.raises(ValueError, match=f"{op.__name__}: dim_size must be given while a CUDA graph"):
                op(*args, group=group)
        if group.world_size > 1:
            with pytest.raises(ValueError, match="pass the size"):
                ops.vocab_embedding(torch.zeros(2, dtype=torch.int64, device=CUDA), w, group=group)


def test_empty_of_a_group_on_a_gpu_is_on_that_gpu(group: Group) -> None:
    with FakeTensorMode():
        x = group.empty((2, 3), torch.bfloat16)
        assert (x.shape, x.dtype, x.device) == ((2, 3), torch.bfloat16, CUDA)
        assert group.empty(5).shape == (5,)
