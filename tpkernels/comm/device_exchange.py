"""The exchange of bytes under transport `group` on a GPU: the stream waits for them, and a thread watches the stream.

The stream marks its progress in pinned memory (csrc/cuda/kernels/exchange_marks.cu), so that the thread needs no CUDA:
it neither disturbs the capture of a graph nor misses a launch of one. An exchange that has begun and does not end
within the group's deadline is given up: the thread finds the missing ranks, as on the CPU, keeps the error for the next
call, and aborts NCCL, so that the stream runs on. The device traps behind the exchange, because its bytes are missing.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpkernels._native import _C
from tpkernels.comm.exchange import ProcessGroupExchange
from tpkernels.comm.watch import SLICE_SECONDS, Watch
from tpkernels.errors import PeerLostError

_BEGUN, _ENDED, _OP, _CALL, _GIVEN_UP, _WORDS = range(6)  # the words of ExchangeMarks, csrc/cuda/kernels/kernels.h

_STILL = "the stream is still waiting for NCCL"

_log = logging.getLogger("tpkernels")


class DeviceExchange(ProcessGroupExchange):
    """An exchange between buffers on a GPU: everything is enqueued, and nothing waits but streams.

    An exchange that is given up aborts the process group's NCCL communicators, also for other groups over the same
    process group. Where torch handles errors of NCCL itself
    (TORCH_NCCL_ASYNC_ERROR_HANDLING, on unless it is 0), it may end the process then; the reason has been logged.

    Args:
        process_group: a c10d group whose backend for CUDA is NCCL.
        watch, capacity: as for ProcessGroupExchange.
        device: the GPU.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        watch: Watch,
        capacity: int,
        device: torch.device,
    ) -> None:
        super().__init__(process_group, watch, capacity, device)
        self.device = device
        self._agreed = self._call = 0
        self._work: Any = None  # of the exchange that was enqueued last
        self._marks = self._pinned(_WORDS)
        self.marks_pointer = self._marks.data_ptr()
        self._error: TimeoutError | PeerLostError | None = None  # why an exchange was given up
        self._giving_up = threading.Lock()
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None

    def start(self, send_bytes: list[int], receive_bytes: list[int]) -> None:
        """Enqueue the exchange behind what the current stream does."""
        self.raise_given_up()
        if self._watcher is None:
            weakref.finalize(self, self._stop.set)  # also when Python ends
            arguments = (weakref.ref(self), self._stop)
            self._watcher = threading.Thread(target=_watch, args=arguments, daemon=True, name="tpkernels exchange")
            self._watcher.start()
        send, receive = self._send[: sum(send_bytes)], self._receive[: sum(receive_bytes)]
        # No timeout of its own: where NCCL's deadline passes, torch ends the process. Ours is kept by the watcher.
        self._work = self._group.alltoall_base(receive, send, receive_bytes, send_bytes, dist.AllToAllOptions())

    def wait(self, call: int) -> None:
        """Let the current stream wait until everything has arrived."""
        self._call = call
        self._work.wait()

    def agree(self, numbers: list[int]) -> list[list[int]]:
        """All-gather numbers over the hosts, in rank order: NCCL hangs where sizes differ, so they are compared first.

        Raises:
            TimeoutError, PeerLostError: as `wait` on the CPU.
        """
        self.raise_given_up()  # first: the numbers of this rank would let the others go on
        self._agreed += 1
        self._call += 1  # it belongs to the call after the last one; `wait` knows its number
        watch, store = self.watch, self.watch.store
        keys = [f"{watch.label}/agree/{self._agreed}/{r}" for r in range(watch.world_size)]
        store.set(keys[watch.rank], json.dumps(numbers))
        deadline = time.monotonic() + watch.timeout_s
        while True:
            self.raise_given_up()
            try:
                store.wait(keys, timedelta(seconds=SLICE_SECONDS))
                return [json.loads(store.get(key)) for key in keys]
            except RuntimeError as error:
                late = time.monotonic() >= deadline
                watch.look(self._call, late, False, str(error).strip().splitlines()[0])

    def synchronise(self, call: int) -> None:
        """Return when the current stream has done all that was asked of it.

        The deadline is that of the exchanges in it; what else runs there may take its time.

        Raises:
            TimeoutError, PeerLostError: as `wait` on the CPU.
        """
        try:
            done = torch.cuda.current_stream(self.device).record_event()
            look = time.monotonic() + SLICE_SECONDS
            while not done.query():
                self.raise_given_up()
                if time.monotonic() >= look:
                    self._look_while_waiting(call)
                    look = time.monotonic() + SLICE_SECONDS
                time.sleep(0)
        except RuntimeError:  # of CUDA, when the device has trapped
            self.raise_given_up()
            raise
        self.raise_given_up()

    def _look_while_waiting(self, call: int) -> None:
        try:
            self.watch.look(call, False, False, _STILL)
        except (TimeoutError, PeerLostError) as error:
            self.give_up(error)
            raise

    def raise_given_up(self) -> None:
        """Raise why an exchange was given up, if one was."""
        if self._error is not None:
            raise type(self._error)(str(self._error)) from None

    def give_up(self, error: TimeoutError | PeerLostError) -> None:
        """Keep the error for later calls, then abort NCCL. The first error is kept."""
        with self._giving_up:
            if self._error is not None:
                return
            self._error = error
            self._marks[_GIVEN_UP] = 1  # before the abort, after which the stream runs on
        _log.error("group '%s', rank %d: %s", self.watch.label, self.watch.rank, error)
        try:
            self._abort()
        except RuntimeError as failed:
            _log.error("group '%s', rank %d: NCCL cannot be aborted: %s", self.watch.label, self.watch.rank, failed)

    def close(self, last_call: int) -> None:
        """Leave the message that this rank closed the group after `last_call`, and end the thread."""
        self._stop.set()
        self.watch.close(last_call)

    def _pinned(self, words: int) -> Tensor:
        return torch.zeros(words, dtype=torch.int32, pin_memory=self.device.type == "cuda")

    def _abort(self) -> None:
        assert isinstance(self._group, dist.ProcessGroup)  # torch has made it: GPUs have no back end of ours
        self._group._get_backend(self.device).abort()

    def _watch_once(self, seen: tuple[int, int], since: float) -> bool:
        """Check the ranks for which the stream has been waiting since `since`; whether none is lost."""
        _, _, op, call, *_ = self._marks.tolist()
        try:
            self.watch.look(call, time.monotonic() - since >= self.watch.timeout_s, False, _STILL)
        except (TimeoutError, PeerLostError) as error:
            if tuple(self._marks[:2].tolist()) == seen:  # else it has ended in the last moment
                self.give_up(type(error)(f"the exchange of {_C.op_name(op)}, call {call}, was given up: {error}"))
                return False
        return True


def _watch(of: weakref.ref[DeviceExchange], stop: threading.Event) -> None:
    """The thread: gives up an exchange in which the stream is stuck, and ends with it."""
    seen, since = (0, 0), time.monotonic()
    while not stop.wait(SLICE_SECONDS):
        exchange = of()
        if exchange is None:
            return
        begun, ended = exchange._marks[:2].tolist()
        if begun == ended or (begun, ended) != seen:
            seen, since = (begun, ended), time.monotonic()
        elif not exchange._watch_once(seen, since):
            return
        del exchange
