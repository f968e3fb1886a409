"""Exchanges through NCCL that get stuck are given up. Gloo and a thread stand for NCCL and the stream."""

from __future__ import annotations

import os
import queue
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.harness.ops import raised
from tpkernels.comm.device_exchange import DeviceExchange
from tpkernels.comm.watch import Watch
from tpkernels.errors import PeerLostError
from tpkernels.testing import run_ranks, run_ranks_outcomes
from tpkernels.testing.faults import kill_myself

ALL_GATHER = 3  # as csrc/core/types.h numbers the ops
PART = [8, 8, 8]


class OnThread(DeviceExchange):
    """Its stream is a thread, which does one thing after the other and marks what it does as the kernels do."""

    def __init__(self, label: str, timeout_s: float) -> None:
        pids: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(pids, os.getpid())
        world: Any = dist.group.WORLD
        super().__init__(world, Watch(world, label, timeout_s, pids), 64, torch.device("cpu"))
        self.aborted, self.trapped = threading.Event(), threading.Event()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def call(self, number: int) -> None:
        """One exchange, enqueued."""
        self.raise_given_up()
        self._queue.put(number)

    def reached(self, begun: int, ended: int) -> bool:
        """Whether the stream comes that far."""
        while not self.aborted.wait(0.01):
            if self._marks[:2].tolist() == [begun, ended]:
                return True
        return False

    def _run(self) -> None:
        while True:
            number = self._queue.get()
            self._marks[3] = number
            self._marks[2] = ALL_GATHER
            self._marks[0] += 1
            self.start(PART, PART)
            try:
                self.wait(number)
            except RuntimeError:
                self.aborted.wait()  # a stream does not end by itself where a rank is lost
            if self._marks[4]:
                return self.trapped.set()
            self._marks[1] += 1

    def _abort(self) -> None:
        self.aborted.set()


def check_exchanges_that_end() -> None:
    exchange = OnThread("stream/fine", 5.0)
    for number in range(1, 4):
        exchange._send.fill_(dist.get_rank() + number)
        exchange.call(number)
        assert exchange.reached(number, number)
        assert exchange._receive[:24].tolist() == [r + number for r in range(3) for _ in range(8)]
        dist.barrier()
    assert exchange._watcher is not None
    assert exchange._watcher.is_alive()
    exchange.close(3)
    exchange._watcher.join(5.0)
    assert not exchange._watcher.is_alive()


def check_a_late_rank() -> None:
    rank, exchange = dist.get_rank(), OnThread("stream/late", 0.6)
    exchange.call(1)
    assert exchange.reached(1, 1)
    if rank != 1:
        exchange.call(2)
        exchange.call(3)  # never comes to run
        assert exchange.aborted.wait(30.0)
        text = raised(lambda: exchange.call(4), TimeoutError)
        assert text.startswith("the exchange of all_gather, call 2, was given up: "), text
        assert "ranks [1] did not come within 0.6 s" in text or "because ranks [1] did not come" in text, text
        for later in (lambda: exchange.agree([1]), lambda: exchange.start(PART, PART)):
            assert raised(later, TimeoutError) == text
        exchange.watch.store.set(f"rank {rank} has given up", "")
        assert exchange._marks[:2].tolist() == [2, 1]
    else:
        exchange.watch.store.wait(["rank 0 has given up", "rank 2 has given up"])
        text = raised(lambda: exchange.agree([1]), TimeoutError)
        assert "gave up at call 2, because ranks [1] did not come" in text, text
        exchange.call(2)  # too late; lets gloo come to its end
        assert exchange.reached(2, 2)
    assert rank == 1 or exchange.trapped.wait(30.0)
    exchange.close(2)


@pytest.mark.parametrize("check", [check_exchanges_that_end, check_a_late_rank], ids=lambda check: check.__name__)
def test_a_stream_that_waits_for_ranks_is_watched(check: Any) -> None:
    run_ranks(check, 3)


def check_a_dead_rank() -> str:
    exchange = OnThread("stream/dead", 60.0)
    exchange.call(1)
    assert exchange.reached(1, 1)
    if dist.get_rank() == 1:
        kill_myself()
    exchange.call(2)
    assert exchange.aborted.wait(30.0)
    assert exchange.trapped.wait(30.0)
    return raised(lambda: exchange.call(3), PeerLostError)


def test_a_dead_rank_is_named_long_before_the_deadline() -> None:
    outcomes = run_ranks_outcomes(check_a_dead_rank, 3)
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.finished, outcome.error
        text = outcome.value
        assert text.startswith("the exchange of all_gather, call 2, was given up: "), text
        assert "ranks [1] died" in text or "because ranks [1] were lost" in text, text
