"""The exchange of bytes under transport `group` on a GPU: the stream waits for them, and a thread watches the stream.

The stream marks its progress in pinned memory (csrc/cuda/kernels/exchange_marks.cu), so that the thread needs no CUDA:
it neither disturbs the capture of a graph nor misses a launch of one. An exchange that has begun and does not end
within the group's deadline is given up: the thread finds out which ranks are missing, as on the CPU, writes that down
for the next call, and aborts NCCL, so that the stream goes on. Behind the exchange the device traps, because what
should have arrived has not.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import weakref
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tpkernels._native import _C
from tpkernels.comm.exchange import ProcessGroupExchange
from tpkernels.comm.watch import SLICE_SECONDS
from tpkernels.errors import PeerLostError

_BEGUN, _ENDED, _OP, _CALL, _GIVEN_UP, _WORDS = range(6)  # a Travel of csrc/cuda/kernels/kernels.h

_STILL = "the stream is still waiting for NCCL"

_log = logging.getLogger("tpkernels")


class DeviceExchange(ProcessGroupExchange):
    """An exchange between buffers on a GPU: everything is enqueued, and nothing waits but streams.

    An exchange that is given up aborts the process group's NCCL communicators, of which other groups over the same
    process group have no use any more either. Where torch handles errors of NCCL itself
    (TORCH_NCCL_ASYNC_ERROR_HANDLING, on unless it is 0), it may end the process then; the reason has been logged.

    Args:
        process_group: a c10d group whose backend for CUDA is NCCL.
        label, timeout_s, capacity, pids: as for ProcessGroupExchange.
        device: the GPU.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        label: str,
        timeout_s: float,
        capacity: int,
        pids: Sequence[int | None],
        device: torch.device,
    ) -> None:
        self.device = device
        self._agreed = self._call = 0
        super().__init__(process_group, label, timeout_s, capacity, pids)
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
        """The numbers of every rank, in rank order, over the hosts: NCCL hangs where sizes differ, so ranks ask first.

        Raises:
            TimeoutError, PeerLostError: as `wait` on the CPU.
        """
        self.raise_given_up()  # before this rank says anything: nobody may take it for one that goes on
        self._agreed += 1
        self._call += 1  # it belongs to the call after the last one; `wait` knows its number
        keys = [f"{self._label}/agree/{self._agreed}/{r}" for r in range(self._world_size)]
        self._store.set(keys[self._rank], json.dumps(numbers))
        deadline = time.monotonic() + self._timeout_s
        while True:
            self.raise_given_up()
            try:
                self._store.wait(keys, timedelta(seconds=SLICE_SECONDS))
                return [json.loads(self._store.get(key)) for key in keys]
            except RuntimeError as error:
                late = time.monotonic() >= deadline
                self.look(self._call, late, False, str(error).strip().splitlines()[0])

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
            self.look(call, False, False, _STILL)
        except (TimeoutError, PeerLostError) as error:
            self.give_up(error)
            raise

    def raise_given_up(self) -> None:
        """Raise why an exchange was given up, if one was."""
        if self._error is not None:
            raise type(self._error)(str(self._error)) from None

    def give_up(self, error: TimeoutError | PeerLostError) -> None:
        """Write the reason down for later calls, then abort NCCL. The first reason stays."""
        with self._giving_up:
            if self._error is not None:
                return
            self._error = error
            self._marks[_GIVEN_UP] = 1  # first: nothing behind the exchange may run when NCCL has let go
        _log.error("group '%s', rank %d: %s", self._label, self._rank, error)
        try:
            self._abort()
        except RuntimeError as failed:
            _log.error("group '%s', rank %d: NCCL cannot be aborted: %s", self._label, self._rank, failed)

    def close(self, last_call: int) -> None:
        """Tell the others that this rank leaves after `last_call`, and watch no more."""
        self._stop.set()
        super().close(last_call)

    def _pinned(self, words: int) -> Tensor:
        return torch.zeros(words, dtype=torch.int32, pin_memory=self.device.type == "cuda")

    def _abort(self) -> None:
        self._group._get_backend(self.device).abort()

    def _watch_once(self, seen: tuple[int, int], since: float) -> bool:
        """Look at the ranks for which the stream has been waiting `since`; whether all is well."""
        _, _, op, call, *_ = self._marks.tolist()
        try:
            self.look(call, time.monotonic() - since >= self._timeout_s, False, _STILL)
        except (TimeoutError, PeerLostError) as error:
            if tuple(self._marks[:2].tolist()) == seen:  # else it has ended in the last moment
                self.give_up(type(error)(f"the exchange of {_C.op_name(op)}, call {call}, was given up: {error}"))
                return False
        return True


def _watch(of: weakref.ref[DeviceExchange], stop: threading.Event) -> None:
    """Give the exchange up in which the stream is stuck; end with the exchange."""
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
