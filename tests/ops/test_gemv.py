"""Products of few rows, which an engine of our own makes, against fp64: dtypes, strides, threads, ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import tpkernels as tpk
from tests.harness.ops import assert_same_on_all_ranks, on_cpu
from tpkernels import ops
from tpkernels._native import _C
from tpkernels.comm.group import Group

BF16 = torch.bfloat16
ROUNDING = {torch.float32: 2.0**-24, BF16: 2.0**-8, torch.float16: 2.0**-11}
MOST_ROWS = 8
every_dtype = pytest.mark.parametrize("dtype", ROUNDING, ids=lambda dtype: str(dtype).removeprefix("torch."))
SHAPES = [(1, 1), (3, 5), (7, 16), (5, 31), (4, 32), (9, 33), (6, 47), (13, 130), (257, 576)]  # N, K


@pytest.fixture
def group() -> Iterator[Group]:
    with tpk.Group.open() as group:
        yield group


def values(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    """One rounding to the dtype of a sum whose steps round in fp32."""
    exact = x.double() @ w.double().T
    steps = x.double().abs() @ w.double().abs().T
    if bias is not None:
        exact, steps = exact + bias.double(), steps + bias.double().abs()
    allowed = exact.abs() * ROUNDING[x.dtype] * 1.01 + steps * (x.size(-1) + 2) * 2.0**-24
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= allowed).all())


def multiply(group: Group, engine: str, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    M, (N, K) = x[..., 0].numel(), w.shape
    communicator, dtype = group._communicator, str(x.dtype).removeprefix("torch.")
    if min(M, N, K) > 0:
        communicator.add_measured(dtype, M, N, K, {engine: 1.0})
    try:
        if M <= MOST_ROWS and min(M, N, K) > 0:
            assert _C.choose_engine(communicator, dtype, M, N, K) == (engine, f"measured at {M}x{N}x{K}: {engine} 1 us")
        return ops.replicated_gemm(x, w, bias, group=group)
    finally:
        communicator.forget_measured()


@every_dtype
@pytest.mark.parametrize("M", [0, 1, 2, 3, 5, 8, 9])
def test_products_are_those_of_fp64_rounded(group: Group, M: int, dtype: torch.dtype) -> None:
    for N, K in SHAPES:
        for bias in (None, values(N, seed=3, dtype=dtype)):
            x, w = values(M, K, seed=1, dtype=dtype), values(N, K, seed=2, dtype=dtype)
            assert_near(multiply(group, "gemv", x, w, bias), x, w, bias)


@pytest.mark.parametrize("N, K", [(0, 5), (5, 0)])
def test_nothing_to_multiply_is_left_to_aten(group: Group, N: int, K: int) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        assert _C.choose_engine(group._communicator, dtype, 1, N, K)[0] == "aten"
    assert torch.equal(ops.replicated_gemm(values(1, K), values(N, K), group=group), torch.zeros(1, N, dtype=BF16))


@pytest.mark.parametrize("M", [1, 3])
def test_strides_do_not_change_a_bit(group: Group, M: int) -> None:
    x, w, bias = values(M, 70, seed=1), values(11, 70, seed=2), values(11, seed=3)
    want = multiply(group, "gemv", x, w, bias)
    wider = torch.full((11, 81), torch.nan, dtype=BF16)
    wider[:, :70] = w
    assert torch.equal(multiply(group, "gemv", x, wider[:, :70], bias), want)  # rows further apart
    assert torch.equal(multiply(group, "gemv", x.T.contiguous().T, w, bias), want)
    assert torch.equal(multiply(group, "gemv", x, w, bias.repeat_interleave(2)[::2]), want)
    assert torch.equal(multiply(group, "gemv", x.reshape(1, M, 1, 70), w, bias), want.reshape(1, M, 1, 11))
    expanded = w[:1].expand(11, 70)
    assert_near(multiply(group, "gemv", x, expanded), x, expanded, None)
    columns = w.T.contiguous().T  # the rows of which are not dense: aten's
    assert_near(multiply(group, "gemv", x, columns, bias), x, w, bias)


@pytest.mark.parametrize("M", [1, 2, 4])
def test_what_is_not_finite_reaches_its_outputs_and_no_others(group: Group, M: int) -> None:
    x, w = torch.ones(M, 75, dtype=BF16), torch.ones(9, 75, dtype=BF16)
    w[2, 74], w[5, 3], w[7, 40], w[7, 41] = torch.nan, torch.inf, torch.inf, -torch.inf
    y = multiply(group, "gemv", x, w)
    assert bool(y[:, 2].isnan().all() and y[:, 7].isnan().all() and (y[:, 5] == torch.inf).all())
    assert bool((y[:, [0, 1, 3, 4, 6, 8]] == 75).all())
    x[M - 1, 74] = torch.nan
    y = multiply(group, "gemv", x, torch.ones(9, 75, dtype=BF16))
    assert bool(y[M - 1].isnan().all() and (y[: M - 1] == 75).all())


@every_dtype
def test_rows_beside_a_row_and_threads_do_not_change_a_bit(group: Group, dtype: torch.dtype) -> None:
    x, w = values(MOST_ROWS, 576, seed=1, dtype=dtype), values(1003, 576, seed=2, dtype=dtype)
    want = multiply(group, "gemv", x, w)
    for M in range(1, MOST_ROWS):
        assert torch.equal(multiply(group, "gemv", x[:M], w), want[:M])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(multiply(group, "gemv", x, w), want)
            assert torch.equal(multiply(group, "gemv", x[:1], w), want[:1])
    finally:
        torch.set_num_threads(threads)


@every_dtype
def test_few_rows_take_it_and_explain_says_so(group: Group, dtype: torch.dtype) -> None:
    for M in (1, MOST_ROWS):
        explained = group.explain("gemm_all_reduce", M=M, N=64, K=32, dtype=dtype)
        assert "GEMM by gemv (rule: at most eight rows" in explained.reason
    for dtype_name, M in (("bfloat16", MOST_ROWS + 1), ("float64", 1)):
        assert _C.choose_engine(group._communicator, dtype_name, M, 64, 32)[0] == "aten"


def test_an_engine_that_cannot_make_a_product_is_not_taken(group: Group) -> None:
    communicator = group._communicator
    for dtype, M in (("bfloat16", MOST_ROWS + 1), ("float64", 1)):
        communicator.add_measured(dtype, M, 6, 7, {"gemv": 1.0})
        assert "measured" not in _C.choose_engine(communicator, dtype, M, 6, 7)[1]
    communicator.forget_measured()
    with pytest.raises(ValueError, match=r"engine must be aten, onednn or gemv, got 'mkl'"):
        communicator.add_measured("bfloat16", 1, 6, 7, {"mkl": 1.0})


def check_sum_of_ranks(group: Group) -> None:
    R, rank = group.world_size, group.rank
    for M in (1, 3):
        for N in (37, 20011):  # the second one's product lies in the arena
            x, w, bias = values(M, R * 48, seed=1), values(N, R * 48, seed=2), values(N, seed=3)
            cut = slice(rank * 48, (rank + 1) * 48)
            for given in (None, bias):
                y = ops.gemm_all_reduce(x[:, cut].contiguous(), w[:, cut], given, group=group)
                assert_same_on_all_ranks(group, f"{M} {N}", y)
                exact = x.double() @ w.double().T + (0 if given is None else bias.double())
                parts = sum((x[:, s].double() @ w[:, s].double().T).abs() for s in _cuts(R)) + bias.double().abs()
                steps = x.double().abs() @ w.double().abs().T
                allowed = (exact.abs() + parts) * 2.0**-8 + steps * R * 50 * 2.0**-24
                assert bool(((y.double() - exact).abs() <= allowed).all())


def _cuts(R: int) -> list[slice]:
    return [slice(r * 48, (r + 1) * 48) for r in range(R)]


@pytest.mark.parametrize("R", [2, 3])
def test_ranks_sum_such_products_to_the_same_bits(R: int) -> None:
    on_cpu(check_sum_of_ranks, R)
