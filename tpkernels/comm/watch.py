"""Watch: raises PeerLostError or TimeoutError when a rank of the group died, left or is late."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from tpkernels.errors import PeerLostError

SLICE_SECONDS = 0.2


_REPORT_SECONDS = 1.0


@dataclass(frozen=True)
class _Trouble:
    text: str
    culprits: list[int]
    late: bool


class Watch:
    """What a rank knows of the fate of the others: processes of this host, and last words in the group's store.

    Args:
        process_group: of the ranks.
        label: what messages call the group.
        timeout_s: seconds that one exchange may take.
        pids: process of each rank that runs on this host, None for the others.
    """

    def __init__(
        self, process_group: dist.ProcessGroup, label: str, timeout_s: float, pids: Sequence[int | None]
    ) -> None:
        self._label, self._timeout_s, self._pids = label, timeout_s, list(pids)
        self._rank, self._world_size = process_group.rank(), process_group.size()
        store = dist.distributed_c10d._get_process_group_store(process_group)
        # By a name of our own: who holds the object itself keeps group.py from noticing that the process group is gone.
        self._store: Any = None if store is None else dist.distributed_c10d.PrefixStore("tpkernels", store)

    def look(self, call: int, late: bool, ended: bool, backend: str) -> None:
        """Raise what is known to have gone wrong, and something has when the deadline has passed or the wait ended.

        Args:
            call: number of the call that waits.
            late: the deadline has passed.
            ended: nothing more can come.
            backend: how it looks to what carries the bytes.

        Raises:
            TimeoutError: not within the deadline; names the ranks that were silent.
            PeerLostError: a rank died, closed the group or gave up, or the backend failed.
        """
        trouble = self._trouble(call)
        if trouble is None and (late or ended):
            trouble = self._silence(call, late or "imed out" in backend, backend)
        if trouble is not None:
            self._tell("failed", call, trouble.culprits, trouble.late)
            raise (TimeoutError if trouble.late else PeerLostError)(trouble.text) from None

    def close(self, last_call: int) -> None:
        """Tell the others that this rank leaves after `last_call`."""
        self._tell("closed", last_call, [], False)

    def _trouble(self, call: int) -> _Trouble | None:
        """What is known to have gone wrong: a dead process, a rank that left, a rank that gave up."""
        dead = [r for r in self._others() if (pid := self._pids[r]) is not None and is_dead(pid)]
        if dead:
            return _Trouble(f"ranks {dead} died (processes {[self._pids[r] for r in dead]})", dead, False)
        for r, (what, last, culprits, late) in self._told().items():
            if what == "closed" and last < call:
                return _Trouble(f"rank {r} closed the group; it was last seen at call {last}", [r], False)
            if what == "failed" and culprits:
                how = "did not come" if late else "were lost"
                return _Trouble(f"rank {r} gave up at call {last}, because ranks {culprits} {how}", culprits, late)
        return None

    def _silence(self, call: int, late: bool, backend: str) -> _Trouble:
        """Whom to blame for a wait that ended badly: those that do not report the same within a second."""
        self._tell("failed", call, [], late)
        deadline = time.monotonic() + _REPORT_SECONDS
        while time.monotonic() < deadline and len(self._told()) < len(self._others()):
            if (known := self._trouble(call)) is not None:
                return known  # a socket closes a moment before its process is gone
            time.sleep(0.02)
        silent = [r for r in self._others() if r not in self._told()]
        if late:
            hint = f"within {self._timeout_s:g} s. If they are only slow, raise Group.open(timeout_s=...)"
            return _Trouble(f"ranks {silent} did not come {hint}. The backend said: {backend}", silent, True)
        return _Trouble(f"ranks {silent} were lost. The backend said: {backend}", silent, False)

    def _others(self) -> list[int]:
        return [r for r in range(self._world_size) if r != self._rank]

    def _tell(self, what: str, call: int, culprits: list[int], late: bool) -> None:
        with contextlib.suppress(Exception):  # the store may be gone with the rank that held it
            self._store.set(f"{self._label}/{self._rank}", json.dumps([what, call, culprits, late]))

    def _told(self) -> dict[int, tuple[str, int, list[int], bool]]:
        """The last words of other ranks."""
        told: dict[int, tuple[str, int, list[int], bool]] = {}
        with contextlib.suppress(Exception):
            for r in self._others():
                key = f"{self._label}/{r}"
                if self._store.check([key]):
                    told[r] = tuple(json.loads(self._store.get(key)))
        return told


def is_dead(pid: int) -> bool:
    """Whether a process of this host is gone; a zombie that nobody has reaped yet counts as gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in ("Z", "X") or not os.path.exists(f"/proc/{pid}")
