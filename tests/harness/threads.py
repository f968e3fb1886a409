"""Ranks that are threads of one process: their groups, and the process's answers to the tests (thread_team.py).

On an emulated device `tpkernels._C` is the emulated module here, put in its place before tpkernels was imported. On one
GPU the ranks share it, each with a stream of its own.
"""

from __future__ import annotations

import faulthandler
import gc
import itertools
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from typing import Any

import torch

from tpkernels._native import _C
from tpkernels.comm.group import Group
from tpkernels.testing.worker import die_with_parent

MEETING_S = 60.0
_EXCHANGE_BYTES = 1 << 20
_WARM_BYTES = 256 << 20

_me = threading.local()
_numbers = itertools.count(1)


# The emulated module's own functions, which the stub of _C does not know.
_emulated: Any = _C


class World:
    """R ranks in this process.

    Args:
        place: "emu" or "virtual".
        size: R.
    """

    def __init__(self, place: str, size: int) -> None:
        self.place = place
        self.size = size
        self.number = next(_numbers)
        self._meeting = threading.Barrier(size, timeout=MEETING_S)
        self._told: list[Any] = [None] * size

    def gather(self, rank: int, mine: Any) -> list[Any]:
        """What every rank has, in rank order; every rank calls this."""
        try:
            self._told[rank] = mine
            self._meeting.wait()
            everyone = list(self._told)
            self._meeting.wait()  # nobody writes before all have read
        except threading.BrokenBarrierError:
            raise RuntimeError(f"another rank failed, or did not come within {MEETING_S:g} s") from None
        if self.place == "emu":
            _emulated.host_threads_met()
        return everyone

    def leave(self) -> None:
        """Let nobody wait for this rank any more."""
        self._meeting.abort()

    def open(
        self,
        rank: int,
        *,
        timeout_s: float | None = None,
        arena_bytes: int = 4 << 20,
        transport: str = "peer",
        multicast: bool = False,
    ) -> Group:
        """Open a group of all ranks of this world; every rank calls this."""
        # On a GPU a rank that waits for what another cannot launch is to be told of within the time of one test.
        timeout_s = timeout_s or (30.0 if self.place == "emu" else 10.0)
        _me.opened = getattr(_me, "opened", 0) + 1
        name = f"{self.place}/{self.number}/{_me.opened}@{rank}"
        device = torch.device("cpu") if self.place == "emu" else torch.device("cuda", torch.cuda.current_device())
        kernels = _kernels(self.place)
        index = rank if self.place == "emu" else device.index
        if self.size == 1:
            return Group(kernels.open_local(name, "world", index), None, timeout_s, "one rank", device)
        if transport == "group":
            exchange = ThreadExchange(self, rank)
            made = kernels.open_group(name, "world", rank, self.size, timeout_s, index, exchange)
            return Group(made, None, timeout_s, "ranks are threads that exchange bytes", device)
        arena = Arena(arena_bytes, device, rank)
        pointers = self.gather(rank, arena.pointer)
        switch = self._switch(rank, pointers, arena_bytes) if multicast else 0
        made = kernels.open_peer(name, "world", rank, self.size, timeout_s, index, pointers, switch, arena_bytes, arena)
        if self.place == "virtual":
            made.share_device(self.size)
            self.gather(rank, None)  # nobody launches what waits while another still asks CUDA for memory and streams
        return Group(made, None, timeout_s, "ranks are threads that reach each other's memory", device)

    def _switch(self, rank: int, pointers: list[int], arena_bytes: int) -> int:
        """One address that stands for all arenas, the same for all ranks."""
        made = _emulated.multicast(pointers, arena_bytes) if rank == 0 else 0
        return int(self.gather(rank, made)[0])


class Arena:
    """The memory of one rank that the others reach; zero at first. An emulated device is told whose it is."""

    def __init__(self, nbytes: int, device: torch.device, rank: int) -> None:
        self._emulated = device.type == "cpu"
        self._memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self.pointer = self._memory.data_ptr()
        if self._emulated:
            _emulated.own(self.pointer, nbytes, rank)
        else:
            torch.cuda.synchronize(device)

    def __del__(self) -> None:
        if self._emulated:
            _emulated.disown(self.pointer)


class ThreadExchange:
    """What DeviceExchange is for processes: the all-to-all of transport `group` between threads, on host memory."""

    def __init__(self, world: World, rank: int) -> None:
        self._world, self._rank = world, rank
        self._send = torch.empty(_EXCHANGE_BYTES, dtype=torch.uint8)
        self._receive = torch.empty(_EXCHANGE_BYTES, dtype=torch.uint8)
        self.capacity = _EXCHANGE_BYTES
        self.send_pointer = self._send.data_ptr()
        self.receive_pointer = self._receive.data_ptr()

    def start(self, send_bytes: list[int], receive_bytes: list[int]) -> None:
        """Wait for the stream that fills the buffer, then fetch what the others have for this rank."""
        _emulated.synchronize()
        offers = self._world.gather(self._rank, (self._send, send_bytes))
        begin = 0
        for (theirs, sizes), nbytes in zip(offers, receive_bytes, strict=True):
            first = sum(sizes[: self._rank])
            if sizes[self._rank] != nbytes:
                raise RuntimeError(f"a rank sends {sizes[self._rank]} bytes where {nbytes} were expected")
            self._receive[begin : begin + nbytes].copy_(theirs[first : first + nbytes])
            begin += nbytes
        self._world.gather(self._rank, None)  # nobody fills its buffer before all have fetched

    def wait(self, call: int) -> None:
        """Nothing is left to wait for."""

    def agree(self, numbers: list[int]) -> list[list[int]]:
        """The numbers of every rank, in rank order."""
        return self._world.gather(self._rank, list(numbers))

    def synchronise(self, call: int) -> None:
        """Wait for the stream."""
        _emulated.synchronize()

    def close(self, last_call: int) -> None:
        """The other threads notice by themselves."""


def open_beside(group: Group, **opening: Any) -> Group:
    """Another group of the same ranks, in whatever place they are; every rank calls this."""
    world = getattr(_me, "world", None)
    if world is not None:
        found: Group = world.open(_me.rank, **opening)
        return found
    return Group.open(group.process_group, device=group.device, **opening)


def where(group: Group) -> AbstractContextManager[Any]:
    """Tensors that a body makes are made where its group works."""
    return nullcontext() if group.is_cpu else group.device


def _kernels(place: str) -> Any:
    if place == "emu":
        return _C
    from tpkernels.comm.devices import load_cuda

    module, obstacle = load_cuda()
    if module is None:
        raise RuntimeError(obstacle)
    return module


def _stream(place: str) -> AbstractContextManager[Any]:
    """The rank's own stream; nothing may be allocated while another rank's kernel waits, so its pool is filled."""
    if place == "emu":
        return nullcontext()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        held = [torch.empty(_WARM_BYTES, dtype=torch.uint8, device="cuda")]
        held += [torch.empty(1 << 19, dtype=torch.uint8, device="cuda") for _ in range(64)]
        del held
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x = torch.ones(16, 16, dtype=dtype, device="cuda")  # cuBLAS has a handle for each thread, and its memory
            torch.addmm(x, x, x.t())
    stream.synchronize()
    return torch.cuda.stream(stream)


def serve(pipe: Connection, place: str, stack_file: str, seed: int) -> None:
    """Answer every call with a (rank, finished, value or traceback) for each rank, and None.

    A call is (body, R, args, opening, faulty).
    """
    die_with_parent()
    stack = open(stack_file, "w", encoding="utf-8")  # noqa: SIM115
    faulthandler.enable(stack)
    faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
    torch.set_num_threads(1)
    if place == "emu":
        _emulated.configure(seed=seed)
    else:
        # What is collected may be the pinned memory or the events of a group, and to free those waits for the device,
        # where another rank's kernel may wait for this one.
        gc.disable()
    lock = threading.Lock()

    def tell(message: Any) -> None:
        with lock:
            pipe.send_bytes(pickle.dumps(message))

    while True:
        try:
            body, R, args, opening, faulty = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        except Exception:  # the test must see it
            tell((0, False, traceback.format_exc()))
            tell(None)
            continue
        world = World(place, R)
        lives = [(world, rank, body, args, opening, faulty, tell) for rank in range(R)]
        ranks = [threading.Thread(target=_be, args=life, daemon=True) for life in lives]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join()
        if place == "virtual":
            gc.collect()
        tell(None)


def _be(
    world: World,
    rank: int,
    body: Callable[..., Any],
    args: tuple[Any, ...],
    opening: dict[str, Any],
    faulty: bool,
    tell: Callable[[Any], None],
) -> None:
    """The life of one rank."""
    tell((rank, None, threading.get_ident()))
    try:
        _me.world, _me.rank = world, rank
        if world.place == "emu":
            _emulated.set_device(rank)
        # One thread runs the backwards of a GPU, where one rank's wait would keep another from being launched.
        with _stream(world.place), torch.autograd.set_multithreading_enabled(world.place == "emu"):
            with world.open(rank, **opening) as group:
                with where(group):
                    value = body(group, *args)
                if not faulty:
                    group.check()
                world.gather(rank, None)  # nobody closes while another still reads
            if not faulty:
                _raise_reports(world, rank)
        tell((rank, True, value))
    except BaseException:  # whatever it is, the test must see it
        world.leave()
        tell((rank, False, traceback.format_exc()))


def _raise_reports(world: World, rank: int) -> None:
    """What the emulator found wrong with the kernels, although the values may be right."""
    if world.place != "emu":
        return
    world.gather(rank, None)  # all have ended
    found = _emulated.take_reports() if rank == 0 else []
    if found:
        raise AssertionError("the emulator reports:\n" + "\n".join(map(str, found)))
