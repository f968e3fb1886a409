"""A server over a tiny model, with a gate in front of its steps, so that tests decide when time passes."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.harness.generation import byte_tokenizer, tiny_llama
from tpkernels import Group
from tpkernels.generate.decoders import SlotDecoder
from tpkernels.plan.api import parallelize
from tpkernels.serve.app import create_app
from tpkernels.serve.channel import follow
from tpkernels.serve.command import Server, listen
from tpkernels.serve.engine import Engine
from tpkernels.serve.metrics import Metrics

SLOTS, QUEUE, MAX_LENGTH = 4, 64, 96
DEADLINE_S = 60.0


class Gate:
    """In front of a decoder's steps: while it is shut, nobody passes."""

    def __init__(self, decoder: SlotDecoder) -> None:
        self.open, self.waiting, self._step = threading.Event(), threading.Event(), decoder.step
        self.open.set()
        decoder.step = self._wait  # type: ignore[method-assign]

    def _wait(self, tokens: Any) -> Any:
        self.waiting.set()
        assert self.open.wait(DEADLINE_S)
        return self._step(tokens)

    @contextmanager
    def shut(self) -> Iterator[None]:
        """No step until the end of the body."""
        self.waiting.clear()
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()


@dataclass
class Served:
    """A running server and how to reach it."""

    client: httpx.AsyncClient
    engine: Engine
    decoder: Any
    gate: Gate
    server: Server

    async def complete(self, prompt: str, **options: Any) -> httpx.Response:
        body = {"model": "tiny", "prompt": prompt, "temperature": 0, "ignore_eos": True, **options}
        return await self.client.post("/v1/completions", json=body)

    def calls(self, method: str) -> list[tuple[Any, ...]]:
        """The arguments of each call of a method of the engine from now on."""
        made, real = list[tuple[Any, ...]](), getattr(self.engine, method)

        def call(*args: Any) -> Any:
            made.append(args)
            return real(*args)

        setattr(self.engine, method, call)
        return made

    async def until(self, true: Callable[[], bool]) -> None:
        """Return when the condition holds."""
        deadline = time.monotonic() + DEADLINE_S
        while not true():
            assert time.monotonic() < deadline, "the condition never held"
            await asyncio.sleep(0.005)

    def value(self, name: str, **labels: str) -> float:
        """A number of /metrics."""
        families = text_string_to_metric_families(self.engine.metrics.text().decode())
        samples = (sample for family in families for sample in family.samples)
        return sum(
            sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()
        )

    def waiting(self) -> float:
        """Requests without a slot."""
        return self.value("tpkernels_queue_length")


def cut_decoder(group: Group) -> SlotDecoder:
    model = tiny_llama()
    return SlotDecoder(parallelize(model, group=group) if group.world_size > 1 else model, SLOTS, MAX_LENGTH)


def serve_ranks(
    check: Callable[[Served], Awaitable[Any]],
    token: str | None = None,
    timeout_s: float = 30.0,
    drain_s: float = 30.0,
    health_s: float = 20.0,
) -> Any:
    """On every rank: rank 0 serves and runs the check against its server, the others follow."""
    with Group.open(timeout_s=timeout_s) as group:
        decoder = cut_decoder(group)
        if group.rank:
            return follow(decoder, group, SLOTS)
        engine = Engine(decoder, byte_tokenizer(), group, QUEUE, Metrics())
        return serve_one(check, engine, decoder, token, drain_s, health_s)


def serve_one(
    check: Callable[[Served], Awaitable[Any]],
    engine: Engine,
    decoder: Any,
    token: str | None,
    drain_s: float,
    health_s: float = 20.0,
) -> Any:
    gate, listening = Gate(decoder), listen("127.0.0.1", 0)
    engine.start()
    server = Server(create_app(engine, "tiny", token, health_s), engine, listening, drain_s)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve_until_stopped()), daemon=True)
    thread.start()

    async def main() -> Any:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        headers = {"Authorization": f"Bearer {token}"} if token else None
        where = f"http://127.0.0.1:{listening.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=where, limits=limits, timeout=DEADLINE_S, headers=headers) as client:
            return await check(Served(client, engine, decoder, gate, server))

    try:
        return asyncio.run(main())
    finally:
        gate.open.set()
        server.handle_exit(15, None)
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "the server did not stop"
        listening.close()


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def streamed(text: str) -> tuple[str, str]:
    """The text and the end of a stream of completions."""
    chunks = events(text)
    return "".join(c["choices"][0]["text"] for c in chunks), chunks[-1]["choices"][0]["finish_reason"]
