"""Bad arguments of every public function: TypeError or ValueError that says op, argument, expected and got."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tpkernels as tpk
from tests.harness.ops import raised
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks

X = torch.ones(4, 3)
W = torch.ones(5, 3)
B = torch.ones(5)
IDS = torch.tensor([0, 1])
TABLE = torch.ones(6, 3)
LOGITS = torch.ones(2, 6)


@dataclass(frozen=True)
class Bad:
    """A call, and the error that it must end in; the text follows "<op>: "."""

    op: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    kind: type[Exception]
    text: str


def value(op: Callable[..., Any], /, *args: Any, says: str, **options: Any) -> Bad:
    return Bad(op, args, options, ValueError, f"{op.__name__}: {says}")


def kind(op: Callable[..., Any], /, *args: Any, says: str, **options: Any) -> Bad:
    return Bad(op, args, options, TypeError, f"{op.__name__}: {says}")


def of_reductions() -> list[Bad]:
    found = []
    for f in (ops.all_reduce, ops.all_reduce_, ops.reduce_scatter):
        found += [
            kind(f, [1.0], says="x must be a torch.Tensor, got list"),
            kind(f, None, says="x must be a torch.Tensor, got NoneType"),
            value(f, X, op="mean", says="op must be one of 'sum', 'avg', 'max', 'min', got 'mean'"),
            value(f, X, op=None, says="op must be one of .*, got None"),
            value(f, X, codec="zip", says="codec must be one of 'none', 'fp16', 'bf16'.*, got 'zip'"),
            value(f, X.int(), op="avg", says="op 'avg' needs a dtype of float32.*, got int32"),
            value(f, X.int(), codec="fp16", says="codec 'fp16' needs a dtype of .*, got int32"),
            value(f, X.double(), codec="bf16", says="codec 'bf16' needs a dtype of .*, got float64"),
            value(f, X, op="max", codec="fp16", says="op must be 'sum' or 'avg' with codec 'fp16', got 'max'"),
            value(f, X.bool(), says="x must have a dtype of .*, got bool"),
            value(f, X.cfloat(), says="x must have a dtype of .*, got complex64"),
            value(f, X.to_sparse(), says="x must be a dense .*, got layout torch.sparse_coo"),
            value(f, X.clone().requires_grad_(), op="mean", says="op must be one of"),
        ]
    return [
        *found,
        value(ops.all_reduce_, X.clone().requires_grad_(), says="x must not require a gradient"),
        value(ops.all_reduce_, torch.ones(1).expand(3), says=r"x must not overlap itself, got strides \(0,\)"),
        value(ops.reduce_scatter, X, 2, says=r"dim must be in \[-2, 2\) for shape \[4, 3\], got 2"),
        value(ops.reduce_scatter, X, -3, says="dim must be in .*, got -3"),
        value(ops.reduce_scatter, torch.tensor(1.0), says=r"dim must be .* for shape \[\], got 0"),
        kind(ops.reduce_scatter, X, 0.5, says="dim must be an int, got float"),
        kind(ops.reduce_scatter, X, True, says="dim must be an int, got bool"),
    ]


def of_all_gather() -> list[Bad]:
    f = ops.all_gather
    return [
        kind(f, [1.0], says="x_shard must be a torch.Tensor, got list"),
        value(f, X, 2, says=r"dim must be in \[-2, 2\) for shape \[4, 3\], got 2"),
        kind(f, X, "0", says="dim must be an int, got str"),
        value(f, torch.tensor(1.0), says=r"dim must be .* shape \[\], got 0"),
        value(f, X, grad="sum", says="grad must be 'reduce' or 'split', got 'sum'"),
        value(f, X, codec="zip", says="codec must be one of .*, got 'zip'"),
        value(f, X.int(), codec="fp16", says="codec 'fp16' needs .*, got int32"),
        value(f, X, dim_size=-4, says="dim_size must not be negative, got -4"),
        kind(f, X, dim_size=4.0, says="dim_size must be an int or None, got float"),
        value(f, X.to_sparse(), says="x_shard must be a dense"),
    ]


def of_gemms() -> list[Bad]:
    found = []
    for f in (ops.gemm_all_reduce, ops.gemm_reduce_scatter, ops.all_gather_gemm, ops.replicated_gemm):
        x = "x" if f is ops.replicated_gemm else "x_shard"
        found += [
            kind(f, [1], W, says=f"{x} must be a torch.Tensor, got list"),
            kind(f, X, None, says="w_shard must be a torch.Tensor, got NoneType"),
            kind(f, X, W, 1.0, says="bias must be a torch.Tensor, got float"),
            value(f, X[0], W, says=rf"{x} must have 2 dims or more, got 1 \(shape \[3\]\)"),
            value(f, X, B, says=r"w_shard must have 2 dims \[N, K\], got 1 \(shape \[5\]\)"),
            value(f, X, W[:, 1:], says=rf"{x} and w_shard must have the same K \(last dim\), got 3 and 2"),
            value(f, X, W, B[1:], says=r"bias must have shape \[5\], got \[4\]"),
            value(f, X, W, W, says=r"bias must have shape \[5\], got \[5, 3\]"),
            value(f, X, W.double(), says=f"{x} and w_shard must have the same dtype, got float32 and float64"),
            value(f, X, W, B.half(), says=f"bias must have the dtype of {x}, float32, got float16"),
            value(f, X.int(), W.int(), says=f"{x} must have a dtype of float32.*, got int32"),
            value(f, X, W, codec="zip", says="codec must be one of .*, got 'zip'"),
            value(f, X.double(), W.double(), codec="fp16", says="codec 'fp16' needs .*, got float64"),
            value(f, X, W.to("meta"), says="all tensors must be on one device, got cpu, meta"),
        ]
    # whose forward packs nothing, and whose backward takes the other codec
    found.append(
        value(ops.replicated_gemm, X, W, codec="zip", grad_codec="none", says="codec must be one of .*, got 'zip'")
    )
    for f in (ops.gemm_reduce_scatter, ops.all_gather_gemm):
        found += [
            value(f, X, W, dim=1, says=r"dim must be a token dimension, not the last one of shape \[4, 3\], got 1"),
            value(f, X, W, dim=-1, says="dim must be a token dimension, .*, got -1"),
            value(f, X, W, dim=2, says=r"dim must be in \[-2, 2\).*, got 2"),
            kind(f, X, W, dim=None, says="dim must be an int, got NoneType"),
        ]
    return found


def of_vocab() -> list[Bad]:
    embed, loss = ops.vocab_embedding, ops.vocab_cross_entropy
    return [
        kind(embed, [0], TABLE, says="ids must be a torch.Tensor, got list"),
        kind(embed, IDS, [0], says="table_shard must be a torch.Tensor, got list"),
        value(embed, IDS.float(), TABLE, says="ids must have a dtype of int64, int32, got float32"),
        value(embed, IDS, TABLE.int(), says="table_shard must have a dtype of .*, got int32"),
        value(embed, IDS, TABLE[0], says=r"table_shard must have 2 dims \[V / R, D\], got 1"),
        value(embed, IDS, TABLE, vocab_size=7, says="rank 0 of 1 must have 7 of the 7 ids of vocab_size, got 6"),
        kind(embed, IDS, TABLE, vocab_size="6", says="vocab_size must be an int or None, got str"),
        value(embed, IDS + 5, TABLE, says=r".*\[0, 6\).* 6"),
        value(embed, IDS - 1, TABLE, says=r".*\[0, 6\).* -1"),
        kind(loss, [0], IDS, says="logits_shard must be a torch.Tensor, got list"),
        kind(loss, LOGITS, 1, says="target must be a torch.Tensor, got int"),
        value(loss, LOGITS.int(), IDS, says="logits_shard must have a dtype of .*, got int32"),
        value(loss, LOGITS, IDS.float(), says="target must have a dtype of int64, int32, got float32"),
        value(loss, LOGITS, IDS[:1], says=r"target must have the shape of logits_shard .*, got \[1\] and \[2, 6\]"),
        value(loss, LOGITS, IDS, label_smoothing=1.5, says=r"label_smoothing must be in \[0, 1\], got 1.5"),
        value(loss, LOGITS, IDS, label_smoothing=float("nan"), says="label_smoothing .*, got nan"),
        kind(loss, LOGITS, IDS, label_smoothing="a", says="label_smoothing must be a float, got str"),
        kind(loss, LOGITS, IDS, ignore_index=None, says="ignore_index must be an int, got NoneType"),
        value(loss, LOGITS, IDS, vocab_size=-6, says="vocab_size must not be negative, got -6"),
        value(loss, LOGITS, IDS + 5, says=r".*\[0, 6\).* 6"),
        value(loss, LOGITS, IDS - 1, says=r".*\[0, 6\).* -1"),
    ]


def of_norm() -> list[Bad]:
    f, w = ops.all_reduce_add_rms_norm, torch.ones(3)
    return [
        kind(f, [1.0], X, w, says="x must be a torch.Tensor, got list"),
        kind(f, X, None, w, says="residual must be a torch.Tensor, got NoneType"),
        kind(f, X, X, 1.0, says="weight must be a torch.Tensor, got float"),
        value(f, X.int(), X.int(), w.int(), says="x must have a dtype of float32.*, got int32"),
        value(f, X, X.half(), w, says="x, residual and weight must have the same dtype, got float32, float16, float32"),
        value(f, X, X, w.double(), says="x, residual and weight must have the same dtype, got .*, float64"),
        value(f, X, X[1:], w, says=r"x and residual must have the same shape, got \[4, 3\] and \[3, 3\]"),
        value(f, X, X, w[1:], says=r"weight must have shape \[3\], got \[2\]"),
        value(f, X, X, X, says=r"weight must have shape \[3\], got \[4, 3\]"),
        value(f, w[0], w[0], w[0], says="x must have 1 dim or more, got 0"),
        value(f, X, X, w, codec="zip", says="codec must be one of .*, got 'zip'"),
        value(f, X.double(), X.double(), w.double(), codec="fp16", says="codec 'fp16' needs .*, got float64"),
        value(f, X, X, w, eps=-1e-5, says="eps must be 0 or more and finite, got -1e-05"),
        value(f, X, X, w, eps=float("nan"), says="eps must be 0 or more and finite, got nan"),
        kind(f, X, X, w, eps="1e-5", says="eps must be a float or None, got str"),
        value(f, X, X.to("meta"), w, says="all tensors must be on one device, got cpu, meta"),
        value(f, X.to_sparse(), X, w, says="x must be a dense .*, got layout torch.sparse_coo"),
    ]


def of_gradients() -> list[Bad]:
    norm, pack, unpack, feedback = ops.squared_norm, ops.compress, ops.decompress, ops.compress_with_feedback
    wire = torch.zeros(24, dtype=torch.uint8)
    return [
        value(norm, [], says="tensors must have one tensor at least, got none"),
        kind(norm, [X, 1.0], says="tensors must be a torch.Tensor, got float"),
        value(norm, [X.int()], says="tensors must have a dtype of .*, got int32"),
        value(norm, [X, X.to("meta")], says="tensors must be on one device, got cpu and meta"),
        kind(pack, [1.0], "fp16", says="x must be a torch.Tensor, got list"),
        value(pack, X, "zip", says="codec must be one of .*, got 'zip'"),
        value(pack, X.double(), "fp16", says="codec 'fp16' needs a dtype of .*, got float64"),
        kind(unpack, b"1", [2], torch.float32, "fp16", says="wire must be a torch.Tensor, got bytes"),
        kind(unpack, wire, [2], "float32", "fp16", says="dtype must be a torch.dtype, got str"),
        value(unpack, wire, [2], torch.int32, "fp16", says="codec 'fp16' needs a dtype of .*, got int32"),
        value(unpack, wire, [-2, -2], torch.float32, "fp16", says=r"shape must not be negative, got \[-2, -2\]"),
        value(unpack, wire, [2, 3], torch.float32, "fp16", says=r"wire must have 28 bytes for shape \[2, 3\], got 24"),
        value(unpack, X, [4], torch.float32, "fp16", says="wire must be uint8 with one dim, got float32 of shape"),
        kind(feedback, X, [0.0], "fp16", says="residual must be a torch.Tensor, got list"),
        value(feedback, X.double(), X, "none", says="x must have a dtype of float32, bfloat16, float16, got float64"),
        value(feedback, X, X.half(), "fp16", says="residual must be float32, .*, got float16 of shape"),
        value(feedback, X, X[1:], "fp16", says=r"residual must be .* shape of x, \[4, 3\], got .* \[3, 3\]"),
        value(feedback, X.t(), W.new_ones(4, 3).t(), "fp16", says=r"residual must be .* with strides \[1, 3\]"),
        value(feedback, X, X.clone().requires_grad_(), "fp16", says="residual must not require a gradient"),
        kind(feedback, X, X.clone(), "fp16", "1", says="scale must be a float, got str"),
    ]


def of_packed() -> list[Bad]:
    reduce, scatter, parts = ops.all_reduce_packed, ops.reduce_scatter_packed, ops.compress_parts
    wire, fp32 = torch.zeros(24, dtype=torch.uint8), torch.float32
    return [
        kind(reduce, b"1", [2], fp32, codec="fp16", says="wire must be a torch.Tensor, got bytes"),
        kind(reduce, wire, [2], "float32", codec="fp16", says="dtype must be a torch.dtype, got str"),
        value(reduce, wire, [2, 3], fp32, codec="fp16", says=r"wire must have 28 bytes for shape \[2, 3\], got 24"),
        value(reduce, wire, [-1], fp32, codec="fp16", says=r"shape must not be negative, got \[-1\]"),
        value(reduce, X, [4], fp32, codec="fp16", says="wire must be uint8 with one dim, got float32 of shape"),
        value(reduce, wire, [4], fp32, codec="zip", says="codec must be one of .*, got 'zip'"),
        value(reduce, wire, [4], torch.float64, codec="fp16", says="codec 'fp16' needs a dtype of .*, got float64"),
        value(reduce, wire, [4], fp32, op="max", codec="fp16", says="op must be 'sum' or 'avg' .*, got 'max'"),
        value(reduce, wire, [6], torch.int32, op="avg", codec="none", says="op must be .*, got 'avg' for int32"),
        kind(scatter, wire, None, fp32, codec="fp16", says="numel must be an int, got None"),
        kind(scatter, wire, 2.0, fp32, codec="fp16", says="numel must be an int or None, got float"),
        value(scatter, wire, -1, fp32, codec="fp16", says="numel must not be negative, got -1"),
        value(scatter, wire, 5, fp32, codec="fp16", says="wire must have 26 bytes for 5 values in 1 packed .*, got 24"),
        value(scatter, wire, 4, fp32, op="min", codec="fp16", says="op must be 'sum' or 'avg' .*, got 'min'"),
        kind(parts, [1.0], "fp16", says="x must be a torch.Tensor, got list"),
        value(parts, X, "zip", says="codec must be one of .*, got 'zip'"),
        value(parts, X.int(), "fp16", says="codec 'fp16' needs a dtype of .*, got int32"),
        value(parts, X, "fp16", scale=0.5, says="scale must be 1 without a residual, got 0.5"),
        value(parts, X, "fp16", residual=X[1:], says=r"residual must be .* shape of x, \[4, 3\], got .* \[3, 3\]"),
    ]


LOCAL = ("compress", "compress_with_feedback", "decompress", "squared_norm")
"""Ops without a group."""

ALL_BAD = [*of_reductions(), *of_all_gather(), *of_gemms(), *of_vocab(), *of_norm(), *of_gradients(), *of_packed()]


@pytest.mark.parametrize("bad", ALL_BAD, ids=[f"{i}-{bad.op.__name__}" for i, bad in enumerate(ALL_BAD)])
def test_a_bad_argument_says_op_argument_expected_and_got(bad: Bad) -> None:
    with pytest.raises(bad.kind, match=bad.text):
        bad.op(*bad.args, **bad.options)


def test_every_public_op_is_tested_with_bad_arguments() -> None:
    assert set(ops.__all__) == {bad.op.__name__ for bad in ALL_BAD}


@pytest.mark.parametrize("op", [getattr(ops, name) for name in ops.__all__ if name not in LOCAL])
@pytest.mark.parametrize("group", ["world", 3])
def test_a_group_must_be_a_group(op: Callable[..., Any], group: object) -> None:
    bad = next(bad for bad in ALL_BAD if bad.op is op)
    with pytest.raises(TypeError, match=f"group must be .*, got {type(group).__name__}"):
        op(*bad.args, **{**bad.options, "group": group})


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: Group.open(timeout_s=0), ValueError, "Group.open: timeout_s must be .*positive.*, got 0"),
        (lambda: Group.open(timeout_s=float("nan")), ValueError, "Group.open: timeout_s must be .*, got nan"),
        (lambda: Group.open(arena_bytes=12), ValueError, "Group.open: arena_bytes must be .*, got 12"),
        (lambda: Group.open(transport="mpi"), ValueError, "Group.open: transport must be .*, got 'mpi'"),
        (lambda: Group.open(3), TypeError, "Group.open: .*, got int"),
        (lambda: Group.open().explain("sort"), ValueError, "explain: op must be one of .*, got 'sort'"),
        (lambda: Group.open().empty((4, -1)), ValueError, r"group.empty: .*-1"),
    ],
)
def test_bad_arguments_of_a_group(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("gather", [ops.all_gather, lambda x, **options: ops.all_gather_gemm(x, W, **options)])
def test_one_rank_gathers_only_what_it_has(gather: Callable[..., Any]) -> None:
    with pytest.raises((ValueError, tpk.RankMismatchError), match="dim_size"):
        gather(X, dim_size=7)


def check_bad_arguments_send_nothing() -> None:
    """An error in the arguments is raised before anything is sent, so that the ranks stay in step."""
    with Group.open() as group:
        texts = [
            raised(lambda: ops.all_reduce(X, group=group, op="mean"), ValueError),
            raised(lambda: ops.gemm_all_reduce(X, W[:, 1:], group=group), ValueError),
            raised(lambda: ops.all_gather(X, 7, group=group), ValueError),
        ]
        assert group.stats()["calls"] == 0
        if group.rank == 0:
            texts.append(raised(lambda: ops.vocab_embedding(IDS, TABLE, group=group, vocab_size=9), ValueError))
        assert ops.all_reduce(X, group=group).sum() == 12 * group.world_size
        assert all("got" in text for text in texts)


def check_ranks_bring_parts_of_the_wrong_size() -> None:
    with Group.open() as group:
        R = group.world_size
        for call in (
            lambda: ops.all_gather(torch.ones(2 + group.rank, 3), group=group, dim_size=2 * R),
            lambda: ops.all_gather_gemm(torch.ones(2 + group.rank, 3), W, group=group, dim_size=2 * R),
        ):
            text = raised(call, (ValueError, tpk.RankMismatchError))
            assert "dim_size" in text, text
        assert ops.all_reduce(X, group=group).sum() == 12 * R


@pytest.mark.parametrize(
    "check",
    [check_bad_arguments_send_nothing, check_ranks_bring_parts_of_the_wrong_size],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_after_bad_arguments_the_ranks_are_still_in_step(check: Callable[[], None]) -> None:
    run_ranks(check, 2)
