"""The path that explain reports is the path that the op takes, which the group's counters show."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.harness.ops import on_cpu
from tpkernels import ops
from tpkernels._native import _C
from tpkernels.comm.group import Group
from tpkernels.compress import wire_bytes

# Tokens, N, K of x[*tokens, K] and w[N, K]: products of one and of two shots, of few rows, of nothing.
SHAPES = [
    ((3, 3), 5, 8),
    ((6, 30), 200, 16),
    ((6, 30), 200, 0),
    ((1, 1), 40_000, 8),
    ((9, 9), 8_000, 3),
    ((6, 0), 200, 16),
]


def taken(group: Group, op: str) -> dict[str, float]:
    """The counters of the only call since the last time."""
    row: dict[str, float] = group.stats()["by_op"][op]
    assert row["calls"] == 1
    group.reset_stats()
    return row


def shot(group: Group, row: dict[str, float], numel: int, itemsize: int, codec: str) -> str:
    """The path of an all_reduce over three ranks: one_shot sends the whole message twice, two_shot less."""
    assert group.world_size == 3
    return "one_shot" if row["wire_bytes"] == 2 * wire_bytes(codec, numel, itemsize) else "two_shot"


def check_collectives(group: Group) -> None:
    group.reset_stats()
    for numel, dtype, codec in product(
        (3, 255, 256, 257, 512, 513, 2000), (torch.float32, torch.float16), ("none", "int8")
    ):
        explained = group.explain("all_reduce", numel=numel, dtype=dtype, codec=codec)
        ops.all_reduce(torch.ones(numel, dtype=dtype), group=group, codec=codec)
        assert explained.path == shot(group, taken(group, "all_reduce"), numel, dtype.itemsize, codec), explained
    for op in ("reduce_scatter", "all_gather"):
        assert group.explain(op, numel=300).path == "direct"
    assert group.explain("all_gather", numel=3, dtype=torch.bool).path == "direct"
    with pytest.raises(ValueError, match=r"explain: all_reduce takes no 1-byte values with codec none"):
        group.explain("all_reduce", numel=3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"explain: dtype must be one of float32, .*, got int8"):
        group.explain("gemm_all_reduce", M=3, N=3, K=3, dtype=torch.int8)


def check_gemms(group: Group) -> None:
    """Every shape with and without bias, codec and another dim."""
    group.reset_stats()
    for (tokens, N, K), dtype, bias, codec, dim in product(
        SHAPES, (torch.float32, torch.bfloat16), (None, 1.0), ("none", "fp16"), (0, 1)
    ):
        x, w = torch.ones(*tokens, K, dtype=dtype), torch.ones(N, K, dtype=dtype)
        b = None if bias is None else torch.full((N,), bias, dtype=dtype)
        sizes = {"M": tokens[0] * tokens[1], "N": N, "K": K}
        for op in ("gemm_all_reduce", "gemm_reduce_scatter"):
            if op == "gemm_all_reduce" and dim == 1:
                continue
            explained = group.explain(op, **sizes, dtype=dtype, codec=codec, bias=bias is not None, dim=dim)
            if op == "gemm_all_reduce":
                ops.gemm_all_reduce(x, w, b, group=group, codec=codec)
            else:
                ops.gemm_reduce_scatter(x, w, b, group=group, codec=codec, dim=dim)
            row = taken(group, op)
            assert explained.path == "unfused", (op, sizes, explained)
            numel = tokens[0] * tokens[1] * N
            if op == "gemm_all_reduce" and group.transport == "shm" and numel:
                assert f"; then {shot(group, row, numel, dtype.itemsize, codec)}: " in explained.reason, explained


def check(group: Group) -> None:
    if group.transport == "shm":
        check_collectives(group)
    if group.transport == "group":
        group._communicator.set_link(1e11)  # so fast that rows never wait to be sent, on a loaded machine, too
    for cpu in ((False, False), (True, True)):  # oneDNN multiplies in fp32 on the second one alone
        _C.assume_cpu(*cpu)
        check_gemms(group)
    _C.forget_assumed_cpu()


@pytest.mark.parametrize("R, transport", [(3, "shm"), (2, "group"), (1, "auto")])
def test_explain_reports_the_path_that_is_taken(R: int, transport: str) -> None:
    on_cpu(check, R, transport)


def test_explain_multiplies_the_rows_of_all_ranks_after_a_gather() -> None:
    on_cpu(check_gathered_rows, 2)


def check_gathered_rows(group: Group) -> None:
    group._communicator.add_measured("bfloat16", 2, 8, 8, {"aten": 2.0, "gemv": 3.0})
    reasons = [group.explain("all_gather_gemm", M=M, N=8, K=8, dtype=torch.bfloat16).reason for M in (1, 2)]
    assert "GEMM by aten (measured at 2x8x8: aten 2 us, gemv 3 us)" in reasons[0] and "measured" not in reasons[1]
    assert "sends nothing" in group.explain("replicated_gemm", M=4, N=8, K=8).reason
