"""Rotary embeddings that scale by length: a sequence has its own frequencies, whatever is beside it or was before."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from tests.harness.generation import byte_tokenizer, tiny_llama
from tpkernels import Group
from tpkernels.generate import Generator, Sampling
from tpkernels.testing import run_ranks

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)

TRAINED, COUNT = 16, 10
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4,
    "original_max_position_embeddings": TRAINED, "factor": 8.0,
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "longrope": {"rope_parameters": LONGROPE},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0},
        "max_position_embeddings": TRAINED,
    },
}
LENGTHS = (TRAINED + 14, 6, TRAINED + 9, TRAINED - 4)  # long, short, and one that crosses the limit


def prompts() -> list[list[int]]:
    """Their ends are what a wrong frequency changes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 255, (length,), generator=generator).tolist() for length in LENGTHS]


def check_ropes(rope: str) -> None:
    """Each sequence against generate of transformers on a new model, by itself.

    Without a cache where frequencies switch: a cache would keep keys of the others (Phi-3 has its own remedy for that).
    """
    from tpkernels.generate.decoders import SlotDecoder
    from tpkernels.plan.api import parallelize

    want = []
    for prompt in prompts():
        how: Any = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        how["use_cache"] = rope == "dynamic"
        found = tiny_llama(**ROPES[rope]).generate(torch.tensor([prompt]), **how)
        want.append(found[0, len(prompt) :].tolist())
    with Group.open() as group:
        model = tiny_llama(**ROPES[rope])
        if group.world_size > 1:
            parallelize(model, group=group)
        for cache in ("static", "dynamic"):
            generator = Generator(model, byte_tokenizer(), group, cache=cache)
            got = generator.generate(prompts(), Sampling(max_tokens=COUNT, ignore_eos=True))
            assert [c.tokens for c in got] == want, cache
        decoder = SlotDecoder(model, len(LENGTHS), 64)
        filled = decoder.fill(dict(enumerate(prompts())), together=decoder.fills_together)
        assert [int(filled[slot].argmax()) for slot in range(len(LENGTHS))] == [tokens[0] for tokens in want]
        model(torch.tensor([prompts()[0]]), labels=torch.tensor([prompts()[0]])).loss.backward()


@pytest.mark.parametrize("R", [1, 2])
@pytest.mark.parametrize("rope", ROPES)
def test_a_sequence_has_its_own_frequencies(rope: str, R: int) -> None:
    run_ranks(check_ropes, R, rope)
