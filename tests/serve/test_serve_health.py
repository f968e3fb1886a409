"""/health says 200 only while the ranks make tokens together."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("transformers")

from tests.harness.serving import Served, serve_ranks
from tpkernels.testing import run_ranks


async def ask(served: Served) -> tuple[int, dict[str, str]]:
    answer = await served.client.get("/health")
    return answer.status_code, answer.json()


async def follow_a_forward_pass(served: Served) -> None:
    """An idle server makes a token at a request of /health, at most once a second; one that hangs answers 503."""
    engine, real = served.engine, served.decoder.insert
    engine.last_pass = float("-inf")
    before = engine.passes
    answers = await asyncio.gather(*(ask(served) for _ in range(5)))
    assert answers == [(200, {"status": "ok"})] * 5
    assert engine.passes == before + 1
    go, stuck = threading.Event(), threading.Event()

    def hang(*args: Any) -> Any:
        stuck.set()
        assert go.wait(60)
        return real(*args)

    served.decoder.insert = hang
    engine.last_pass = float("-inf")
    status, body = await ask(served)
    assert stuck.is_set(), "it was a forward pass"
    assert (status, body["status"]) == (503, "unhealthy")
    assert "the model has made no token in" in body["reason"]
    await served.until(lambda: _now_stands(served))
    assert "tpkernels_healthy 0.0" in (await served.client.get("/metrics")).text
    go.set()
    served.decoder.insert = real
    await served.until(lambda: engine.passes > before + 1)
    assert await ask(served) == (200, {"status": "ok"})
    assert "tpkernels_healthy 1.0" in (await served.client.get("/metrics")).text


def _now_stands(served: Served) -> bool:
    return time.monotonic() - served.engine.last_step > 1.0


async def see_requests_that_hang(served: Served) -> None:
    """A request that makes no progress is seen, too; one that does needs no token beside it."""
    with served.gate.shut():
        running = asyncio.ensure_future(served.complete("ab", max_tokens=6))
        await served.until(served.gate.waiting.is_set)
        served.engine.last_pass = float("-inf")
        status, body = await ask(served)
        assert (status, body["status"]) == (503, "unhealthy")
    assert (await running).json()["usage"]["completion_tokens"] == 6
    passes = served.engine.passes
    assert await ask(served) == (200, {"status": "ok"})
    assert served.engine.passes == passes, "the request has just shown it"


async def see_nan(served: Served) -> None:
    engine, real = served.engine, served.decoder.insert
    served.decoder.insert = lambda *args: real(*args) * torch.nan
    engine.last_pass = float("-inf")
    assert await ask(served) == (503, {"status": "unhealthy", "reason": "the model's logits hold NaN"})
    served.decoder.insert = real
    engine.last_pass = float("-inf")
    assert await ask(served) == (200, {"status": "ok"})
    assert (await served.complete("ab", max_tokens=3)).json()["usage"]["completion_tokens"] == 3


async def see_the_end(served: Served) -> None:
    """The answer has the reason that ended the engine's thread."""
    engine = served.engine

    def fail(*_: Any) -> Any:
        raise TimeoutError("rank 1 did not come")

    served.decoder.insert = fail
    engine.last_pass = float("-inf")
    status, body = await ask(served)
    assert (status, body) == (503, {"status": "unhealthy", "reason": "TimeoutError: rank 1 did not come"})


async def everything(served: Served) -> None:
    for check in (follow_a_forward_pass, see_requests_that_hang, see_nan):
        await asyncio.wait_for(check(served), 60)


def check_health(last: bool) -> Any:
    return serve_ranks(see_the_end if last else everything, timeout_s=60.0, health_s=1.0)


def test_health_is_that_of_the_forward_pass() -> None:
    run_ranks(check_health, 1, False)


def test_health_tells_why_the_engine_has_ended() -> None:
    run_ranks(check_health, 1, True)


def check_two_ranks() -> Any:
    async def healthy(served: Served) -> Any:
        found = [await ask(served)]
        before = served.engine.passes
        served.engine.last_pass = float("-inf")
        found.append(await ask(served))
        assert served.engine.passes == before + 1
        return found

    return serve_ranks(healthy, timeout_s=60.0)


def test_two_ranks_make_the_token_together() -> None:
    assert run_ranks(check_two_ranks, 2)[0] == [(200, {"status": "ok"})] * 2
