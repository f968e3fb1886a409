"""Generation through pipeline stages: the tokens of the uncut model, for any number of flights."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch

from tests.harness.generation import byte_tokenizer, tiny_llama
from tests.harness.parallelize import tiny
from tests.harness.ranks import nightly
from tpkernels import parallelize
from tpkernels.comm.group import Group
from tpkernels.comm.mesh import Mesh
from tpkernels.generate import Generator, Sampling
from tpkernels.pipeline import split_by_layer, take_stages
from tpkernels.testing import run_ranks
from tpkernels.train.gpt import GPT, GPTConfig, generate, sharded_parts, whole_parts

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)

PROMPTS = [[5, 9, 40], [7], [1, 2, 3, 4, 5, 6, 8], [44, 13]]
HOW = [
    Sampling(max_tokens=9, ignore_eos=True),
    Sampling(max_tokens=4, temperature=0.8, seed=3, ignore_eos=True),
    Sampling(max_tokens=12, ignore_eos=True),
    Sampling(max_tokens=12, temperature=1.2, top_k=9, seed=4, ignore_eos=True),
]
WORDS = {"vocab_size": 258, "num_hidden_layers": 3}
SLIDING = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}


def models() -> dict[str, Any]:
    return {
        "llama": tiny_llama(num_hidden_layers=3),
        "gpt2": tiny("gpt2", n_embd=36, n_head=9, n_positions=64, **WORDS),
        "gemma3_text": tiny("gemma3_text", head_dim=4, **WORDS, **SLIDING),
    }


def check_tokens(tp: int) -> None:
    tokenizer = byte_tokenizer()
    with Mesh.open(tp=tp, pp=2) as mesh, Group.open(timeout_s=30.0) as everyone:
        assert mesh.pp is not None
        for name, model in models().items():
            want = Generator(copy.deepcopy(model), tokenizer, everyone, cache="dynamic").generate(PROMPTS, HOW)
            split = split_by_layer(model, 2)
            if tp > 1:
                parallelize(model, group=mesh.tp)
            take_stages(model, split, mesh.stage)
            for flights in (None, 1, 3):
                generator = Generator(model, tokenizer, mesh.tp, pipeline=mesh.pp, flights=flights)
                assert generator.generate(PROMPTS, HOW) == want, (name, flights)
            pieces = generator.stream(PROMPTS, HOW)
            assert all(next(pieces).token >= 0 for _ in range(6))
            pieces.close()  # type: ignore[attr-defined]
            assert generator.generate(PROMPTS[:1], HOW[0]) == want[:1], "what was under way is not read again"


@pytest.mark.parametrize("tp", [1, *nightly(2)])
def test_the_tokens_are_those_of_the_uncut_model(tp: int) -> None:
    run_ranks(check_tokens, 2 * tp, tp)


def check_refusals() -> None:
    tokenizer = byte_tokenizer()
    with Group.open() as group:
        model = tiny_llama()
        split = split_by_layer(model, 2)
        with pytest.raises(ValueError, match="flights must be 1 or more, and need a pipeline, got 2"):
            Generator(model, tokenizer, group, flights=2)
        take_stages(model, split, 1 - group.rank)
        with pytest.raises(ValueError, match="some pipeline stages only: give pipeline"):
            Generator(model, tokenizer, group)
        with pytest.raises(ValueError, match="is not compiled"):
            Generator(model, tokenizer, group, pipeline=group, compile=True)
        with pytest.raises(
            ValueError, match=rf"must hold stage {group.rank} of 2, got stages \[{1 - group.rank}\] of 2"
        ):
            list(Generator(model, tokenizer, group, pipeline=group).stream([[1]]))


def test_stages_that_do_not_fit_are_refused() -> None:
    run_ranks(check_refusals, 2)


def check_bytes(tp: int) -> None:
    """Our own model, whose windows are computed anew for each byte."""
    config, prompts = GPTConfig(layers=3, d_model=30, heads=5, context=12), [b"import ", b"x", b"abc"]
    with Mesh.open(tp=tp, pp=2) as mesh:
        torch.manual_seed(7)
        whole = GPT(config, whole_parts())
        want = generate(whole, prompts, 16, seed=5)
        split = split_by_layer(whole, 2, inputs=((torch.zeros(1, 12, dtype=torch.int64),), {}))
        torch.manual_seed(7)
        model = GPT(config, sharded_parts(mesh.tp))
        take_stages(model, split, mesh.stage)
        for count in (1, 3):
            assert generate(model, prompts[:count], 16, seed=5, pipeline=mesh.pp) == want[:count]


@pytest.mark.parametrize("tp", [1, *nightly(2)])
def test_our_gpt_continues_texts_through_stages(tp: int) -> None:
    run_ranks(check_bytes, 2 * tp, tp)
