"""split_by_layer: stages that run one after the other are the whole model, balance, and what is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.harness.parallelize import ids, tiny
from tests.harness.pipelines import tiny_llama
from tests.harness.ranks import nightly
from tests.harness.zoo import Animal, make, tokens
from tests.harness.zoo_decoders import ANIMALS as DECODERS
from tests.harness.zoo_others import ANIMALS as OTHERS
from tpkernels.errors import PlanError
from tpkernels.pipeline import Split, split_by_layer, take_stages
from tpkernels.pipeline.balance import balanced
from tpkernels.train.gpt import GPT, GPTConfig, whole_parts

GPT2 = {"n_embd": 36, "n_head": 9, "n_positions": 64, "num_hidden_layers": 4}


def in_turn(model: nn.Module, split: Split, call: Callable[[nn.Module], Any]) -> tuple[Any, list[nn.Module]]:
    """The output of the stages, each in a model of its own, and these models."""
    hidden, models = None, []
    for stage in split.stages:
        own = copy.deepcopy(model)
        hidden = take_stages(own, split, stage.index).call(stage.index, hidden, lambda own=own: call(own))
        models.append(own)
    return hidden, models


def assert_equal_outputs(model: nn.Module, split: Split, call: Callable[[nn.Module], Any]) -> list[nn.Module]:
    with torch.no_grad():
        want = call(model)
        got, models = in_turn(model, split, call)
    pairs = list(zip(tensors_of(got), tensors_of(want), strict=True))
    assert pairs
    assert all(torch.equal(a, b) for a, b in pairs)
    return models


def tensors_of(output: Any) -> list[Tensor]:
    """Logits and loss where there are some, else all tensors."""
    if isinstance(output, Mapping):
        named = [output[name] for name in ("logits", "loss") if output.get(name) is not None]
        output = named or tuple(output.values())
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_the_stages_of_gpt2_with_tied_embeddings_are_the_whole_model(num_stages: int) -> None:
    model = tiny("gpt2", **GPT2)
    split = split_by_layer(model, num_stages)
    models = assert_equal_outputs(model, split, lambda m: m(input_ids=ids(), labels=ids(), use_cache=False))
    held = [dict(m.named_parameters()) for m in models]
    assert set().union(*held) == {name for name, _ in model.named_parameters()} | (
        {"lm_head.weight"} if num_stages > 1 else set()
    )
    shared = [name for a, b in itertools.combinations(held, 2) for name in a.keys() & b.keys()]
    assert not shared, "a stage holds what another one holds"
    tied = {"transformer.wte.weight": {0: "transformer.wte.weight", num_stages - 1: "lm_head.weight"}}
    assert split.tied == (tied if num_stages > 1 else {})
    for stage, parameters in zip(split.stages, held, strict=True):
        assert stage.nbytes == sum(p.numel() * 8 for p in parameters.values())


def test_the_stages_of_our_gpt_are_the_whole_model_and_a_split_of_a_meta_model_fits_it() -> None:
    config = GPTConfig(layers=3, d_model=24, heads=3, context=8, vocab=11)
    with torch.device("meta"):
        split = split_by_layer(GPT(config, whole_parts()), 3)
    assert [len(stage.layers) for stage in split.stages] == [1, 1, 1]
    torch.manual_seed(0)
    assert_equal_outputs(GPT(config, whole_parts()), split, lambda m: m(torch.arange(16).view(2, 8) % 11))


FEW = {"bert", "roformer", "gemma", "bloom", "mpt", "phimoe", "opt", "mistral", "vit"}
ZOO = [case if case[0] in FEW else nightly(case)[0] for case in itertools.chain(DECODERS.items(), OTHERS.items())]


@pytest.mark.parametrize(("name", "animal"), ZOO)
def test_the_stages_of_a_family_are_the_whole_model_or_it_is_refused(name: str, animal: Animal) -> None:
    try:
        model = make(name, animal, animal.attention or "sdpa")
    except (ValueError, ImportError):
        model = make(name, animal, "eager")
    inputs = animal.inputs() if animal.inputs else {"input_ids": tokens(), "labels": tokens()}
    before = [(type(m), len(vars(m))) for m in model.modules()]

    def call(m: nn.Module) -> Any:
        torch.manual_seed(3)
        return m(**inputs)

    split = None
    with refusal_of(name):
        split = split_by_layer(model, 2)
    assert [(type(m), len(vars(m))) for m in model.modules()] == before
    if split is not None:
        with refusal_of(name):
            assert_equal_outputs(model, split, call)


@contextmanager
def refusal_of(name: str) -> Iterator[None]:
    """A family may be refused, but for a few, with words that say what of."""
    try:
        yield
    except PlanError as error:
        assert name not in FEW, str(error)
        assert str(error).startswith(("split_by_layer: ", "model.", name[:2])) or "another pipeline stage" in str(error)


def largest(sizes: list[int], costs: list[float], before: float, after: float) -> float:
    own = [sum(costs[a:b]) for a, b in itertools.pairwise([0, *itertools.accumulate(sizes)])]
    own[0] += before
    own[-1] += after
    return max(own)


def test_stages_are_balanced_as_well_as_any_division() -> None:
    random = torch.Generator().manual_seed(0)
    for num_stages in (1, 2, 3, 4):
        for _ in range(10):
            costs = torch.rand(7, generator=random).tolist()
            before, after = torch.rand(2, generator=random).tolist()
            every = [s for s in itertools.product(range(1, 8), repeat=num_stages) if sum(s) == 7]
            found = balanced(costs, before, after, num_stages)
            best = min(largest(list(sizes), costs, before, after) for sizes in every)
            assert largest(found, costs, before, after) <= best * (1 + 1e-9)


def test_a_large_head_takes_layers_off_the_last_stage_and_memory_counts_parameters() -> None:
    def sizes(balance: Any, vocab: int) -> list[int]:
        with torch.device("meta"):
            model = GPT(GPTConfig(layers=6, d_model=64, heads=4, context=16, vocab=vocab), whole_parts())
        return [len(stage.layers) for stage in split_by_layer(model, 2, balance).stages]

    assert sizes("cost", 16) == [3, 3]
    first, last = sizes("cost", 8192)
    assert first > last
    assert sizes("memory", 8192) == [3, 3]  # table and head are equally large
    assert sizes([5, 1], 16) == [5, 1]


class Borrowed(nn.Module):
    """Layers of which each also takes what the first one computed; or the last adds the embedding."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = start = self.table(tokens)
        other = None
        for layer in self.layers:
            x = layer(x, other)
            if self.kind == "first" and other is None:
                other = layer.linear(x)
            if self.kind == "between":
                x = x * 2
        return x + start if self.kind == "skip" else x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, other: Tensor | None) -> Tensor:
        return x + self.linear(x if other is None else x * other)


def test_a_layer_that_takes_more_than_hidden_states_is_refused_and_a_skip_of_the_embedding_is_computed_twice() -> None:
    with pytest.raises(PlanError, match=r"layers\.1 depends on layers\.0\.linear"):
        split_by_layer(Borrowed("first"), 2)
    with pytest.raises(PlanError, match="layer 1 does not take what layer 0 returned"):
        split_by_layer(Borrowed("between"), 2)
    torch.manual_seed(0)
    model = Borrowed("skip")
    split = split_by_layer(model, 3)
    assert split.tied == {"table.weight": {0: "table.weight", 2: "table.weight"}}
    assert_equal_outputs(model, split, lambda m: m(torch.arange(10).view(2, 5)))


def test_bad_arguments_and_models_are_refused_and_nothing_is_changed() -> None:
    model = tiny_llama(2)
    for num_stages, balance, error, text in (
        (3, "cost", PlanError, "3 stages need 3 layers or more, model.layers has 2"),
        (0, "cost", ValueError, "num_stages must be an int of 1 or more, got 0"),
        (2, "time", ValueError, "balance must be 'cost', 'memory' or a list of layers, got 'time'"),
        (2, [2, 1], ValueError, r"2 numbers of 1 or more whose sum is 2, got \[2, 1\]"),
    ):
        with pytest.raises(error, match=text):
            split_by_layer(model, num_stages, balance)  # type: ignore[arg-type]
    split = split_by_layer(model, 2)
    with pytest.raises(ValueError, match=r"stages must be among 0 to 1, got \[2\]"):
        take_stages(model, split, 2)
    with pytest.raises(PlanError, match="lacks"):
        take_stages(nn.Linear(2, 2), split, 0)
    model.config.output_router_logits = True
    take_stages(model, split, 1)
    with pytest.raises(PlanError, match=r"has stages \[1\] only"):
        take_stages(model, split, 1)
    with pytest.raises(PlanError, match="is cut already"):
        split_by_layer(model, 2)
    with pytest.raises(PlanError, match=r"model\.layers\.0 belongs to another pipeline stage"):
        model(input_ids=ids())


def test_losses_of_the_router_that_need_all_layers_are_refused() -> None:
    model = tiny("mixtral", num_local_experts=4, output_router_logits=True)
    with pytest.raises(PlanError, match=r"behind the layers depends on model\.layers\.\d"):
        split_by_layer(model, 2)
