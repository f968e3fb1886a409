"""The exchange of bytes under transport `group`: an all-to-all of a c10d group, with a deadline and named ranks.

Here the host waits for the bytes. On a GPU the stream does: device_exchange.py.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from tpkernels.comm.watch import SLICE_SECONDS, Watch

_CPU = torch.device("cpu")
_PIECE = 64 << 10  # bytes
_PROBE = 256 << 10  # bytes by which a link is timed when it is opened
_SLOW = 40e6  # bytes a second in such a probe: a link of 100 Mbit is slower, one of 1 Gbit without a long way is not


class ProcessGroupExchange:
    """Sends bytes to every rank of a process group and receives theirs, through two buffers of its own.

    The C++ communicator writes into the send buffer, calls `start` and `wait`, and reads the receive buffer.

    Args:
        process_group: any c10d group whose backend has all-to-all (gloo, NCCL, MPI).
        watch: detects its lost ranks; one exchange may take its `timeout_s`.
        capacity: bytes of each buffer.
        device: of the buffers.

    Attributes:
        watch, capacity: as given.
        in_pieces: between two ranks, send large messages in pieces; the same on both. See `open`.
        send_pointer, receive_pointer: addresses of the buffers.
    """

    def __init__(
        self, process_group: dist.ProcessGroup, watch: Watch, capacity: int, device: torch.device = _CPU
    ) -> None:
        self._group, self.watch, self.capacity = process_group, watch, capacity
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written to outside of it
            self._send = torch.empty(capacity, dtype=torch.uint8, device=device)
            self._receive = torch.empty(capacity, dtype=torch.uint8, device=device)
        self.send_pointer = self._send.data_ptr()
        self.receive_pointer = self._receive.data_ptr()
        self.in_pieces = False
        self._works: list[dist.Work] = []

    @classmethod
    def open(cls, process_group: dist.ProcessGroup, watch: Watch, capacity: int) -> Self:
        """Make the exchange, and time the link of two ranks to set `in_pieces`; collective.

        Raises:
            TimeoutError, PeerLostError: as `wait`.
        """
        exchange = cls(process_group, watch, capacity)
        exchange.in_pieces = watch.world_size == 2 and exchange._is_slow()
        return exchange

    def start(self, send_bytes: list[int], receive_bytes: list[int]) -> None:
        """Begin to send `send_bytes[r]` bytes to rank r and to receive `receive_bytes[r]` from it, in rank order."""
        send, receive = self._send[: sum(send_bytes)], self._receive[: sum(receive_bytes)]
        if self.in_pieces:
            self._works = self._start_pair(send, receive, send_bytes, receive_bytes)
        else:
            self._works = [self._begin(send, receive, send_bytes, receive_bytes)]

    def _is_slow(self) -> bool:
        """Whether the link between two ranks is slow enough for pieces, which take more of a core; the same on both."""
        part = [_PROBE, _PROBE]
        self._send[: 2 * _PROBE].zero_()
        took = []
        for _ in range(3):
            began = time.monotonic_ns()
            self._works = [self._begin(self._send[: 2 * _PROBE], self._receive[: 2 * _PROBE], part, part)]
            self.wait(0)
            took.append(time.monotonic_ns() - began)
        self._send[:16].view(torch.int64).fill_(min(took))
        self._works = [self._begin(self._send[:16], self._receive[:16], [8, 8], [8, 8])]
        self.wait(0)
        return int(self._receive[:16].view(torch.int64).max()) * 1e-9 > _PROBE / _SLOW

    def _start_pair(
        self, send: Tensor, receive: Tensor, send_bytes: list[int], receive_bytes: list[int]
    ) -> list[dist.Work]:
        """Between two ranks, in pieces that are under way at the same time.

        One large message after the other's is what gloo makes of a large all-to-all: over a link of 100 Mbit 6 MB each
        way took 1.05 s, in pieces 0.54 s, as long as one way takes. On fast links pieces cost more than they gain (10
        Gbit, ranks of one core, 13 MB: 0.28 s against 0.02). Both ranks count the same pieces.
        """
        mine, other = self.watch.rank, 1 - self.watch.rank
        parts_out, parts_in = torch.split(send, send_bytes), torch.split(receive, receive_bytes)
        parts_in[mine].copy_(parts_out[mine])
        works = []
        for first in range(0, max(send_bytes[other], receive_bytes[other], 1), _PIECE):
            out, into = parts_out[other][first : first + _PIECE], parts_in[other][first : first + _PIECE]
            sizes = [[part.numel() if r == other else 0 for r in range(2)] for part in (out, into)]
            works.append(self._begin(out, into, *sizes))
        return works

    def _begin(self, send: Tensor, receive: Tensor, send_bytes: list[int], receive_bytes: list[int]) -> dist.Work:
        options = dist.AllToAllOptions()
        options.timeout = timedelta(seconds=self.watch.timeout_s)
        return self._group.alltoall_base(receive, send, receive_bytes, send_bytes, options)

    def wait(self, call: int) -> None:
        """Return when everything has arrived.

        Waits in short slices and checks the other ranks in between: a backend detects a lost rank only on its own
        connection to it, and a rank that waits for a survivor would wait until the deadline.

        Args:
            call: the number of the call, for messages.

        Raises:
            TimeoutError: not within the deadline; names the ranks that were silent.
            PeerLostError: a rank died, closed the group or gave up, or the backend failed.
        """
        deadline = time.monotonic() + self.watch.timeout_s
        for work in self._works:
            self._wait_for(work, call, deadline)

    def close(self, last_call: int) -> None:
        """Leave the message that this rank closed the group after `last_call`, and release the process group."""
        self.watch.close(last_call)
        # A process group of gloo that ends waits for its work, which a lost rank never answers: then it is kept.
        if all(work.is_completed() for work in self._works):
            self._works = []
            self._send = self._receive = torch.empty(0, dtype=torch.uint8)  # C++ has made its last call
            del self._group

    def _wait_for(self, work: dist.Work, call: int, deadline: float) -> None:
        while True:
            ended = work.is_completed()  # read before the wait: it may complete while a slice runs out
            try:
                work.wait(timedelta(seconds=SLICE_SECONDS))
                return
            except RuntimeError as error:
                late = time.monotonic() >= deadline
                self.watch.look(call, late, ended, str(error).strip().splitlines()[0])
