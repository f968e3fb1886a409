"""Layers under torch.compile and torch.export: one graph, the values of eager mode, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.harness.layers import assert_close, assert_equal, leaf
from tests.harness.ranks import nightly
from tpkernels import layers
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks


def check_compile(backend: str, cuts_tokens: tuple[bool, ...] = (False, True)) -> None:
    group = Group.open()
    torch.manual_seed(0)
    for cut in cuts_tokens:
        tokens = 4 if cut else 5
        width = 4 * group.world_size
        options = {"group": group, "sequence_parallel": cut}
        model = nn.Sequential(
            layers.LayerNorm(6, **options),
            layers.ColumnParallelLinear(6, width, **options),
            nn.GELU(),
            layers.RowParallelLinear(width, 6, **options),
        )
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            x = leaf(torch.linspace(-1, 1, tokens * 6).view(tokens, 6))
            y = run(x)
            y.square().sum().backward()
            results.append([y, x.grad, *(p.grad for p in model.parameters())])
        for i, (got, want) in enumerate(zip(results[1], results[0], strict=True)):
            assert_close(got, want, f"result {i}")


def check_compile_of_a_whole_step() -> None:
    group = Group.open()
    torch.manual_seed(0)
    vocab, width = 11, 6  # the vocabulary is uneven: its size is known, so that this traces too

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = layers.VocabParallelEmbedding(vocab, width, group=group, padding_idx=0)
            self.mix = layers.RowParallelLinear(width, width, group=group, input_is_parallel=False)
            self.gathered = layers.ColumnParallelLinear(width, 9, group=group, gather_output=True)
            self.head = layers.ColumnParallelLinear(9, vocab, bias=False, group=group)
            self.loss = layers.VocabParallelCrossEntropy(group=group, vocab_size=vocab, label_smoothing=0.1)

        def forward(self, ids: Tensor, target: Tensor) -> Tensor:
            loss: Tensor = self.loss(self.head(self.gathered(F.silu(self.mix(self.embed(ids))))), target)
            return loss

    model = Model()
    ids, target = torch.randint(0, vocab, (2, 5)), torch.randint(0, vocab, (2, 5))
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = run(ids, target)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for i, (got, want) in enumerate(zip(results[1], results[0], strict=True)):
        assert_close(got, want, f"result {i}")


def check_compile_of_dropout() -> None:
    group = Group.open()
    dropout = layers.ParallelDropout(0.5, group=group, shard_dim=0)
    step = torch.compile(lambda x: dropout(x * 2), fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    want = dropout(torch.ones(50) * 2)
    torch.manual_seed(0)
    assert_equal(step(torch.ones(50)), want, "y")


def check_export() -> None:
    group = Group.open()
    model = nn.Sequential(
        layers.VocabParallelEmbedding(11, 6, padding_idx=1, group=group),
        layers.LayerNorm(6, sequence_parallel=True, group=group),
        layers.ColumnParallelLinear(6, 8, group=group),
        nn.GELU(),
        layers.RowParallelLinear(8, 6, group=group),
    )
    ids = torch.arange(10).view(2, 5)
    for strict in (False, True):
        exported = torch.export.export(model, (ids,), strict=strict)
        assert_equal(exported.module()(ids), model(ids), "y")


def test_a_model_is_exported() -> None:
    run_ranks(check_export, 2)


@pytest.mark.parametrize("cuts_tokens", [True, *nightly(False)])
def test_a_compiled_mlp_equals_the_eager_one_in_one_graph(cuts_tokens: bool) -> None:
    run_ranks(check_compile, 2, "inductor", (cuts_tokens,), timeout=300)


@pytest.mark.parametrize("R", [1, 3])
def test_an_mlp_is_traced_in_one_graph_for_any_number_of_ranks(R: int) -> None:
    run_ranks(check_compile, R, "aot_eager")


@pytest.mark.parametrize("R", [1, 2])
def test_embedding_head_loss_and_conversions_are_traced_in_one_graph(R: int) -> None:
    run_ranks(check_compile_of_a_whole_step, R)


def test_dropout_of_shards_is_traced_in_one_graph() -> None:
    run_ranks(check_compile_of_dropout, 2)
