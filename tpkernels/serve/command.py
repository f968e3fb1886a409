"""What each rank of `tpkernels serve` does: rank 0 answers HTTP and leads, the others follow."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import typer
import uvicorn
from fastapi import FastAPI

from tpkernels import launch
from tpkernels.comm.group import Group
from tpkernels.comm.objects import gather
from tpkernels.errors import UserError
from tpkernels.generate.decoders import SlotDecoder
from tpkernels.generate.load import load

from .app import create_app
from .channel import follow
from .engine import Engine
from .metrics import Metrics

POLL_S = 0.05  # how often a draining server looks whether it is done


@dataclass(frozen=True)
class ServeArguments:
    """The command's arguments; see its help."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    name: str | None = None
    slots: int = 8
    queue: int = 256
    max_length: int = 2048
    drain_s: float = 25.0
    compile: bool = False
    dtype: str = "auto"
    timeout_s: float = 120.0
    arena_mib: int = 16
    health_s: float = 20.0


class Server(uvicorn.Server):
    """A server that ends in two steps: at the first signal it refuses new requests and lets those that run end.

    Args:
        app: from create_app.
        engine: started.
        listening: a bound socket.
        drain_s: seconds that running requests have to end.
    """

    def __init__(self, app: FastAPI, engine: Engine, listening: socket.socket, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, timeout_keep_alive=75, timeout_graceful_shutdown=5
            )
        )
        self._engine, self._listening, self._drain_s = engine, listening, drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What uvicorn calls for SIGTERM and SIGINT; at the second one it stops at once."""
        if self._engine.draining:
            self.should_exit = True
        self._engine.drain()

    async def serve_until_stopped(self) -> None:
        """Answer until `handle_exit` and until the last request has ended, or its time is up."""
        watching = asyncio.ensure_future(self._watch())
        try:
            await self.serve(sockets=[self._listening])
        finally:
            watching.cancel()

    async def _watch(self) -> None:
        while not self._engine.draining:
            await asyncio.sleep(POLL_S)
        deadline = time.monotonic() + self._drain_s
        while not self._engine.idle and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        await asyncio.to_thread(self._engine.stop)  # what is left fails with 503
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: it cannot.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}.") from None


def work(asked: ServeArguments) -> None:
    """Load, then serve or follow until rank 0 is told to stop."""
    with launch.all_ranks(asked.timeout_s, asked.arena_mib, tp=launch.world_size()) as layout:
        group = layout.tp
        with _listening(asked, group) as listening:
            decoder, tokenizer = _prepared(asked, group)
            if group.rank == 0 and listening is not None:
                _lead(asked, group, decoder, tokenizer, listening)
            else:
                with _deaf_to_signals():
                    follow(decoder, group, asked.slots)


@contextlib.contextmanager
def _listening(asked: ServeArguments, group: Group) -> Iterator[socket.socket | None]:
    """Rank 0's socket; a port that is taken is an error on every rank before anything is loaded."""
    found, problem = None, None
    if group.rank == 0:
        try:
            found = listen(asked.host, asked.port)
        except UserError as error:
            problem = str(error)
    problem = gather(problem, group)[0]
    if problem is not None:
        raise UserError(problem)
    try:
        yield found
    finally:
        if found is not None:
            found.close()


def _prepared(asked: ServeArguments, group: Group) -> tuple[SlotDecoder, Any]:
    model, tokenizer = load(asked.model, group, asked.dtype)
    try:
        decoder = SlotDecoder(model, asked.slots, asked.max_length, compile=asked.compile)
    except ValueError as error:
        raise UserError(str(error)) from None
    gather(None, group)  # a rank may have a slow disk: from here on waits have a short deadline
    sizes = {min(1 << i, asked.slots) for i in range(asked.slots.bit_length() + 1)} if asked.compile else {1}
    for rows in sorted(sizes):  # every one is compiled apart
        decoder.insert(rows - 1, [0])
        decoder.step({rows - 1: 0})
    gather(None, group)
    return decoder, tokenizer


def _lead(asked: ServeArguments, group: Group, decoder: SlotDecoder, tokenizer: Any, listening: socket.socket) -> None:
    engine = Engine(decoder, tokenizer, group, asked.queue, Metrics())
    engine.start()
    try:
        name = asked.name or asked.model.rstrip("/").rpartition("/")[2]
        server = Server(create_app(engine, name, asked.token, asked.health_s), engine, listening, asked.drain_s)
        host, port = listening.getsockname()[:2]
        typer.echo(f"serving {name} over {group.world_size} ranks at http://{host}:{port}/v1", err=True)
        asyncio.run(server.serve_until_stopped())
    finally:
        engine.stop()
    if engine.error is not None:
        raise engine.error


@contextlib.contextmanager
def _deaf_to_signals() -> Iterator[None]:
    """Only rank 0 decides when to stop: a signal to the whole process group must not cut running requests off."""
    before = {sig: signal.signal(sig, signal.SIG_IGN) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
