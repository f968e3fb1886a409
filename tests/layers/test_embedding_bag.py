"""VocabParallelEmbeddingBag against nn.EmbeddingBag: bags of every shape, weights, padding, gradients, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.harness.layers import F64, assert_close, assert_equal, assert_same_step, integers, leaf, make_integer
from tpkernels import layers
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks

ROWS, WIDTH = 11, 5
RAGGED = (torch.tensor([3, 10, 0, 3, 3, 7, 1]), torch.tensor([0, 2, 2, 6]))  # the second bag is empty
FLAT = (torch.tensor([[3, 10, 0], [4, 4, 9]]), None)


def check_against_torch(group: Group) -> None:
    for mode in ("sum", "mean"):
        for ids, offsets in (RAGGED, FLAT, (torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0]))):
            for padding in (None, 3, -2):
                for weighted in (False, True) if mode == "sum" else (False,):
                    whole = make_integer(nn.EmbeddingBag(ROWS, WIDTH, mode=mode, padding_idx=padding, dtype=F64))
                    cut = layers.VocabParallelEmbeddingBag.from_embedding_bag(whole, group=group)
                    compare(cut, whole, ids, offsets, weighted)


def compare(cut: nn.Module, whole: nn.Module, ids: Tensor, offsets: Tensor | None, weighted: bool) -> None:
    weights = [leaf(integers(*ids.shape, seed=3)) if weighted else None for _ in range(2)]
    y, want = cut(ids, offsets, weights[0]), whole(ids, offsets, weights[1])
    exact = whole.mode == "sum"
    (assert_equal if exact else assert_close)(y, want, f"{whole} {ids.shape}")
    dy = integers(*want.shape, seed=4)
    y.backward(dy)
    want.backward(dy)
    assert_same_step(cut, whole, exact=exact)
    if weighted:
        assert_equal(weights[0].grad, weights[1].grad, "gradient of the weights is whole on every rank")


def check_ranks_without_rows(group: Group) -> None:
    whole = make_integer(nn.EmbeddingBag(2, WIDTH, mode="sum", dtype=F64))
    cut = layers.VocabParallelEmbeddingBag.from_embedding_bag(whole, group=group)
    compare(cut, whole, torch.tensor([1, 0, 1]), torch.tensor([0, 1]), True)


def check_dtypes_options_and_compile(group: Group) -> None:
    ids, offsets = RAGGED
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = nn.EmbeddingBag(ROWS, WIDTH, mode="sum", include_last_offset=True, dtype=dtype)
        cut = layers.VocabParallelEmbeddingBag.from_embedding_bag(whole, group=group)
        ends = torch.cat([offsets, torch.tensor([len(ids)])])
        assert_close(cut(ids.int(), ends.int()), whole(ids, ends).detach(), f"{dtype}", terms=8)
    torch.manual_seed(7)
    drawn = layers.VocabParallelEmbeddingBag(ROWS, WIDTH, group=group, padding_idx=3)
    torch.manual_seed(7)
    assert_equal(drawn.full_weight(), nn.EmbeddingBag(ROWS, WIDTH, padding_idx=3).weight.detach(), "the same draw")
    compiled = torch.compile(drawn, fullgraph=True, backend="aot_eager")
    for table in (drawn, compiled):
        drawn.zero_grad()
        table(ids, offsets).sum().backward()
        if table is drawn:
            want = drawn.weight.grad.clone()
    assert_close(drawn.weight.grad, want, "gradient under compile")


def check_bad_input(group: Group) -> None:
    table = layers.VocabParallelEmbeddingBag(ROWS, WIDTH, group=group)
    ids, offsets = RAGGED
    with pytest.raises(ValueError, match=r"ids must be in \[0, 11\), got 11"):
        table(torch.tensor([[0, 11]]))
    with pytest.raises(ValueError, match="offsets must begin with 0"):
        table(ids, torch.tensor([1, 3]))
    with pytest.raises(ValueError, match=r"per_sample_weights must have the shape of ids.*mode 'mean'"):
        table(ids, offsets, torch.ones(len(ids)))
    with pytest.raises(ValueError, match=r"ids must be \[B, L\] without offsets"):
        table(ids)
    with pytest.raises(TypeError, match=r"int64 or int32, got torch\.float32"):
        table(ids.float(), offsets)
    with pytest.raises(ValueError, match="mode must be one of sum, mean, got 'max'"):
        layers.VocabParallelEmbeddingBag(ROWS, WIDTH, group=group, mode="max")
    with pytest.raises(ValueError, match="sparse is not supported"):
        layers.VocabParallelEmbeddingBag.from_embedding_bag(nn.EmbeddingBag(ROWS, WIDTH, sparse=True), group=group)


def check_all() -> None:
    with Group.open() as group:
        for check in (check_against_torch, check_ranks_without_rows, check_dtypes_options_and_compile, check_bad_input):
            check(group)


@pytest.mark.parametrize("R", [1, 2, 3])
def test_a_cut_bag_equals_torchs(R: int) -> None:
    run_ranks(check_all, R)
