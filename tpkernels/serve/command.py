"""The work of each rank of `tpkernels serve`: rank 0 answers HTTP and runs the engine, the others its steps."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import typer
import uvicorn
from fastapi import FastAPI

from tpkernels.comm import torchrun
from tpkernels.comm.group import Group
from tpkernels.comm.objects import gather
from tpkernels.errors import UserError
from tpkernels.generate.decoders import SlotDecoder
from tpkernels.generate.load import load, quiet_transformers

from .app import create_app
from .arguments import ServeArguments
from .channel import follow
from .engine import Engine
from .metrics import Metrics

POLL_S = 0.05  # between two checks of a draining server whether it is idle


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
        """Drain at the first SIGTERM or SIGINT, stop at the second. Called by uvicorn."""
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
        await asyncio.to_thread(self._engine.stop)  # requests that still run fail with 503
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Args:
        port: 0 for a free one.

    Raises:
        UserError: the address cannot be resolved or bound.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}.") from None


def work(args: ServeArguments) -> None:
    """Load, then serve (rank 0) or follow it (the others) until a signal stops rank 0.

    Raises:
        UserError: the port is taken, there is no such model, or the arguments do not fit it.
        TimeoutError, PeerLostError: a rank did not take part in a step, or died.
    """
    quiet_transformers()
    with torchrun.open_ranks(args.timeout_s, args.arena_mib, tp=torchrun.world_size()) as layout:
        group = layout.tp
        with _listening(args, group) as listening:
            decoder, tokenizer = _prepared(args, group)
            if group.rank == 0 and listening is not None:
                _lead(args, group, decoder, tokenizer, listening)
            else:
                with _ignore_signals():
                    follow(decoder, group, args.slots)


@contextlib.contextmanager
def _listening(args: ServeArguments, group: Group) -> Iterator[socket.socket | None]:
    """Rank 0's socket; a port that is taken is an error on every rank before anything is loaded."""
    found, problem = None, None
    if group.rank == 0:
        try:
            found = listen(args.host, args.port)
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


def _prepared(args: ServeArguments, group: Group) -> tuple[SlotDecoder, Any]:
    model, tokenizer = load(args.model, group, args.dtype)
    try:
        decoder = SlotDecoder(model, args.slots, args.max_length, compile=args.compile)
    except ValueError as error:
        raise UserError(str(error)) from None
    gather(None, group)  # the ranks may read from slow disks; the waits after this have a short deadline
    sizes = {min(1 << i, args.slots) for i in range(args.slots.bit_length() + 1)} if args.compile else {1}
    for rows in sorted(sizes):  # each number of rows is compiled separately
        decoder.insert(rows - 1, [0])
        decoder.step({rows - 1: 0})
    gather(None, group)
    return decoder, tokenizer


def _lead(args: ServeArguments, group: Group, decoder: SlotDecoder, tokenizer: Any, listening: socket.socket) -> None:
    engine = Engine(decoder, tokenizer, group, args.queue, Metrics())
    engine.start()
    try:
        name = args.name or args.model.rstrip("/").rpartition("/")[2]
        server = Server(create_app(engine, name, args.token, args.health_s), engine, listening, args.drain_s)
        host, port = listening.getsockname()[:2]
        typer.echo(f"serving {name} over {group.world_size} ranks at http://{host}:{port}/v1", err=True)
        asyncio.run(server.serve_until_stopped())
    finally:
        engine.stop()
    if engine.error is not None:
        raise engine.error


@contextlib.contextmanager
def _ignore_signals() -> Iterator[None]:
    """Only rank 0 decides when to stop: a signal to the whole process group must not cut running requests off."""
    before = {sig: signal.signal(sig, signal.SIG_IGN) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
