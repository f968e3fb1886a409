"""The exchange of bytes under transport `group`: an all-to-all of a c10d group, with a deadline and named ranks."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tpkernels.errors import PeerLostError

_REPORT_SECONDS = 1.0


class ProcessGroupExchange:
    """Sends bytes to every rank of a process group and receives theirs, through two buffers of its own.

    The C++ communicator writes into the send buffer, calls `start` and `wait`, and reads the receive buffer.

    Args:
        process_group: any c10d group whose backend has all-to-all (gloo, NCCL, MPI).
        label: what messages call the group.
        timeout_s: seconds that one exchange may take.
        capacity: bytes of each buffer.
        pids: process of each rank that runs on this host, None for the others.
    """

    def __init__(
        self, process_group: dist.ProcessGroup, label: str, timeout_s: float, capacity: int, pids: Sequence[int | None]
    ) -> None:
        self._group = process_group
        self._label = label
        self._timeout_s = timeout_s
        self._rank = process_group.rank()
        self._pids = list(pids)
        self._store = dist.distributed_c10d._get_process_group_store(process_group)
        self._send = torch.empty(capacity, dtype=torch.uint8)
        self._receive = torch.empty(capacity, dtype=torch.uint8)
        self._work: Any = None
        self.capacity = capacity
        self.send_pointer = self._send.data_ptr()
        self.receive_pointer = self._receive.data_ptr()

    def start(self, send_bytes: list[int], receive_bytes: list[int]) -> None:
        """Begin to send `send_bytes[r]` bytes to rank r and to receive `receive_bytes[r]` from it, in rank order."""
        options = dist.AllToAllOptions()
        options.timeout = timedelta(seconds=self._timeout_s)
        self._work = self._group.alltoall_base(
            self._receive[: sum(receive_bytes)], self._send[: sum(send_bytes)], receive_bytes, send_bytes, options
        )

    def wait(self, call: int) -> None:
        """Return when everything has arrived.

        Raises:
            TimeoutError: not within the deadline; names the ranks that did not report the failure of this call.
            PeerLostError: a rank died or left, or the backend failed.
        """
        started = time.monotonic()
        try:
            self._work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise self._explained(error, call, time.monotonic() - started) from None

    def _explained(self, error: RuntimeError, call: int, waited: float) -> Exception:
        dead, silent = self._culprits(call)
        if dead:
            return PeerLostError(f"ranks {dead} died (processes {[self._pids[r] for r in dead]})")
        backend = str(error).strip().splitlines()[0]
        if waited >= 0.95 * self._timeout_s or "imed out" in backend:
            return TimeoutError(
                f"ranks {silent} did not come within {self._timeout_s:g} s. If they are only slow, raise "
                f"Group.open(timeout_s=...). The backend said: {backend}"
            )
        return PeerLostError(f"ranks {silent} were lost. The backend said: {backend}")

    def _culprits(self, call: int) -> tuple[list[int], list[int]]:
        """Ranks of this host that are dead, and ranks that did not report this failure.

        Every survivor writes a key, so those without one are the cause. A socket closes a moment before its process is
        gone, which is why the processes are looked at again until the time for reports is over.
        """
        prefix = f"tpkernels/{self._label}/failed/{call}"
        others = [r for r in range(self._group.size()) if r != self._rank]
        reported: set[int] = set()
        dead: list[int] = []
        deadline = time.monotonic() + _REPORT_SECONDS
        with contextlib.suppress(Exception):  # the store may be gone with the rank that held it
            self._store.set(f"{prefix}/{self._rank}", "1")
        while not dead and len(reported) < len(others) and time.monotonic() < deadline:
            dead = [r for r in others if (pid := self._pids[r]) is not None and _is_dead(pid)]
            with contextlib.suppress(Exception):
                reported = {r for r in others if self._store.check([f"{prefix}/{r}"])}
            time.sleep(0.02)
        return dead, [r for r in others if r not in reported]


def _is_dead(pid: int) -> bool:
    """Whether a process of this host is gone; a zombie that nobody has reaped yet counts as gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in ("Z", "X") or not os.path.exists(f"/proc/{pid}")
