"""How a request ends: at any end of the generation config, or by a failure of its own that no other one sees."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("transformers")

from tests.harness.generation import byte_tokenizer, tiny_llama
from tests.harness.serving import MAX_LENGTH, QUEUE, SLOTS, Served, serve_one, serve_ranks
from tpkernels import Group
from tpkernels.generate import Generator, Sampling
from tpkernels.generate.decoders import SlotDecoder
from tpkernels.serve.engine import Engine
from tpkernels.serve.metrics import Metrics


def test_any_end_of_the_generation_config_ends_an_answer() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()

    async def check(served: Served) -> None:
        for ignore_eos, count, finish in ((False, at + 1, "stop"), (True, 24, "length")):
            answer = (await served.complete("abc", max_tokens=24, ignore_eos=ignore_eos)).json()
            assert answer["choices"][0]["finish_reason"] == finish
            assert answer["usage"]["completion_tokens"] == count

    with Group.open() as group:
        (whole,) = Generator(model, tokenizer, group).generate(["abc"], Sampling(max_tokens=24, ignore_eos=True))
        at = next(i for i in range(3, 24) if whole.tokens[i] not in whole.tokens[:i])
        model.generation_config.eos_token_id = [256, whole.tokens[at]]
        decoder = SlotDecoder(model, SLOTS, MAX_LENGTH)
        serve_one(check, Engine(decoder, tokenizer, group, QUEUE, Metrics()), decoder, None, 30.0)


class Sick:
    """A sampler that fails."""

    def draw(self, logits: Any) -> int:
        raise RuntimeError("no token today")


def test_a_request_whose_token_cannot_be_drawn_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from tpkernels.serve import engine as module

    real = module.Sampler
    monkeypatch.setattr(module, "Sampler", lambda how: Sick() if how.seed == 13 else real(how))

    async def check(served: Served) -> None:
        answers = await asyncio.gather(*(served.complete("ab", max_tokens=9, seed=seed) for seed in (1, 13, 2)))
        assert [a.status_code for a in answers] == [200, 500, 200]
        assert answers[1].json()["error"]["message"] == "the server failed: RuntimeError: no token today"
        assert (await served.client.get("/health")).status_code == 200
        assert (await served.complete("ab", max_tokens=9)).text.count('"length"') == 1
        many = await served.complete(["ab"] * 9, n=8)  # type: ignore[arg-type]
        assert (many.status_code, many.json()["error"]["message"]) == (
            400, f"a request may have {QUEUE + SLOTS} sequences (prompts times n), got 72"
        )  # fmt: skip

    serve_ranks(check)
