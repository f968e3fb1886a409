"""The exchange of bytes under transport `group`: an all-to-all of a c10d group, with a deadline and named ranks.

Here the host waits for the bytes. On a GPU the stream does: device_exchange.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpkernels.comm.watch import SLICE_SECONDS, Watch

_PIECE = 64 << 10
_PROBE = 256 << 10  # bytes by which a link is timed when it is opened
_SLOW = 40e6  # bytes a second in such a probe: a link of 100 Mbit is slower, one of 1 Gbit without a long way is not


class ProcessGroupExchange(Watch):
    """Sends bytes to every rank of a process group and receives theirs, through two buffers of its own.

    The C++ communicator writes into the send buffer, calls `start` and `wait`, and reads the receive buffer.

    Args:
        process_group: any c10d group whose backend has all-to-all (gloo, NCCL, MPI).
        label: what messages call the group.
        timeout_s: seconds that one exchange may take.
        capacity: bytes of each buffer.
        pids: process of each rank that runs on this host, None for the others.
    """

    device = torch.device("cpu")

    def __init__(
        self, process_group: dist.ProcessGroup, label: str, timeout_s: float, capacity: int, pids: Sequence[int | None]
    ) -> None:
        super().__init__(process_group, label, timeout_s, pids)
        self._group = process_group
        with torch.inference_mode(False):  # wherever it is opened: they are written to everywhere
            self._send = torch.empty(capacity, dtype=torch.uint8, device=self.device)
            self._receive = torch.empty(capacity, dtype=torch.uint8, device=self.device)
        self._work: Any = None
        self._works: list[Any] = []
        self.capacity = capacity
        self.send_pointer = self._send.data_ptr()
        self.receive_pointer = self._receive.data_ptr()
        self._in_pieces = self.device.type == "cpu" and self._world_size == 2 and self._is_slow()

    def start(self, send_bytes: list[int], receive_bytes: list[int]) -> None:
        """Begin to send `send_bytes[r]` bytes to rank r and to receive `receive_bytes[r]` from it, in rank order."""
        send, receive = self._send[: sum(send_bytes)], self._receive[: sum(receive_bytes)]
        if self._in_pieces:
            self._works = self._start_pair(send, receive, send_bytes, receive_bytes)
        else:
            self._works = [self._begin(send, receive, send_bytes, receive_bytes)]

    def _is_slow(self) -> bool:
        """Whether the link between two ranks is slow enough for pieces, which cost a core more; both say the same."""
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
        mine, other = self._rank, 1 - self._rank
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
        options.timeout = timedelta(seconds=self._timeout_s)
        return self._group.alltoall_base(receive, send, receive_bytes, send_bytes, options)

    def wait(self, call: int) -> None:
        """Return when everything has arrived.

        Waits in short slices and looks at the other ranks in between: a backend notices a rank that is gone only where
        it talks to that rank, and a rank that waits for a survivor would sit there until the deadline.

        Raises:
            TimeoutError: not within the deadline; names the ranks that were silent.
            PeerLostError: a rank died, closed the group or gave up, or the backend failed.
        """
        deadline = time.monotonic() + self._timeout_s
        for work in self._works:
            self._wait_for(work, call, deadline)

    def close(self, last_call: int) -> None:
        """Tell the others that this rank leaves after `last_call`, and let go of the process group."""
        super().close(last_call)
        # The end of a process group of gloo waits for what is under way, which a lost rank never answers.
        if self.device.type == "cpu" and all(work.is_completed() for work in self._works):
            self._works = []
            self._send = self._receive = torch.empty(0, dtype=torch.uint8)  # C++ has made its last call
            del self._group

    def _wait_for(self, work: dist.Work, call: int, deadline: float) -> None:
        while True:
            ended = work.is_completed()  # asked before: it may end well while a slice runs out
            try:
                work.wait(timedelta(seconds=SLICE_SECONDS))
                return
            except RuntimeError as error:
                late = time.monotonic() >= deadline
                self.look(call, late, ended, str(error).strip().splitlines()[0])
