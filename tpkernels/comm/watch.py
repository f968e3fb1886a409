"""Watch: raises PeerLostError or TimeoutError when a rank of the group died, left or is late."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from tpkernels.comm.asking import Asking
from tpkernels.comm.process_groups import store_of
from tpkernels.errors import PeerLostError

SLICE_SECONDS = 0.2  # of a wait, between two checks of the other ranks
_REPORT_SECONDS = 1.0
_STORE_SECONDS = 1.0  # for an answer of the store


@dataclass(frozen=True)
class _Trouble:
    text: str
    culprits: list[int]
    late: bool


class Watch:
    """Detects lost ranks: by the processes of this host, and by the final message of each rank in the store.

    Args:
        process_group: of the ranks.
        label: the name of the group in messages, and the prefix of its keys in the store.
        timeout_s: seconds that one exchange may take.
        pids: process of each rank that runs on this host, None for the others.

    Attributes:
        label, timeout_s: as given.
        rank, world_size: of the process group.
        store: of the process group, under a prefix; None where its backend has none (MPI).
    """

    def __init__(
        self, process_group: dist.ProcessGroup, label: str, timeout_s: float, pids: Sequence[int | None]
    ) -> None:
        self.label, self.timeout_s, self._pids = label, timeout_s, list(pids)
        self.rank, self.world_size = process_group.rank(), process_group.size()
        store = store_of(process_group)
        self._asking, self._answered = Asking(), True
        # A store object of its own: process_groups.when_destroyed waits until nothing holds that of the process group.
        self.store: Any = None if store is None else dist.distributed_c10d.PrefixStore("tpkernels", store)

    def look(self, call: int, late: bool, ended: bool, backend: str) -> None:
        """Raise if a rank is lost; always raise when the deadline has passed or the wait ended without its bytes.

        Args:
            call: number of the call that waits.
            late: the deadline has passed.
            ended: the wait ended; no more bytes arrive.
            backend: the message of the transport, for the text.

        Raises:
            TimeoutError: not within the deadline; names the ranks that were silent.
            PeerLostError: a rank died, closed the group or gave up, or the backend failed.
        """
        trouble = self._trouble(call, late or ended)
        if trouble is None and (late or ended):
            trouble = self._silence(call, late or "imed out" in backend, backend)
        if trouble is not None:
            self._post("failed", call, trouble.culprits, trouble.late)
            raise (TimeoutError if trouble.late else PeerLostError)(trouble.text) from None

    def close(self, last_call: int) -> None:
        """Leave the message that this rank closed the group after `last_call`."""
        self._post("closed", last_call, [], False)

    def _trouble(self, call: int, gives_up: bool) -> _Trouble | None:
        """The first fault found: a dead process, a rank that closed the group, a rank that gave up.

        A process that ends because its rank gave up is no fault. Its message says so; where this rank gives up, too,
        and the store is behind a cut link, that message cannot be read, and ranks of other hosts are at fault.
        """
        messages = self._final_messages()
        dead = [
            r for r in self._others()
            if (pid := self._pids[r]) is not None and is_dead(pid) and not (r in messages and messages[r][2])
        ]  # fmt: skip
        if dead and not (gives_up and self._asking.is_silent):
            return _Trouble(f"ranks {dead} died (processes {[self._pids[r] for r in dead]})", dead, False)
        for r, (what, last, culprits, late) in messages.items():
            if what == "closed" and last < call:
                return _Trouble(f"rank {r} closed the group; it was last seen at call {last}", [r], False)
            if what == "failed" and culprits:
                how = "did not come" if late else "were lost"
                return _Trouble(f"rank {r} gave up at call {last}, because ranks {culprits} {how}", culprits, late)
        return None

    def _silence(self, call: int, late: bool, backend: str) -> _Trouble:
        """The ranks at fault for a wait that failed: those that do not report the same within a second."""
        self._post("failed", call, [], late)
        deadline = time.monotonic() + _REPORT_SECONDS
        while (
            time.monotonic() < deadline
            and not self._asking.is_silent
            and len(self._final_messages()) < len(self._others())
        ):
            if (known := self._trouble(call, True)) is not None:
                return known  # a socket closes a moment before its process is gone
            time.sleep(0.02)
        reported = self._final_messages()
        silent = [r for r in self._others() if r not in reported]
        if not self._answered:  # then nothing is known but of the processes of this host
            silent = [r for r in silent if self._pids[r] is None] or silent
        if late or any(was_late for *_, was_late in reported.values()):  # then a connection ended for that
            hint = f"within {self.timeout_s:g} s. If they are only slow, raise Group.open(timeout_s=...)"
            return _Trouble(f"ranks {silent} did not come {hint}. The backend reported: {backend}", silent, True)
        return _Trouble(f"ranks {silent} were lost. The backend reported: {backend}", silent, False)

    def _others(self) -> list[int]:
        return [r for r in range(self.world_size) if r != self.rank]

    def _post(self, what: str, call: int, culprits: list[int], late: bool) -> None:
        message = json.dumps([what, call, culprits, late])
        self._asked(lambda: self.store.set(f"{self.label}/{self.rank}", message))

    def _final_messages(self) -> dict[int, tuple[str, int, list[int], bool]]:
        """The final messages of other ranks, of those that have left one."""
        found: dict[int, tuple[str, int, list[int], bool]] = {}

        def read() -> None:
            for r in self._others():
                key = f"{self.label}/{r}"
                if self.store.check([key]):
                    found[r] = tuple(json.loads(self.store.get(key)))

        self._asked(read)
        return dict(found)

    def _asked(self, access: Callable[[], object]) -> None:
        """Access the store, a second at most, and not again before it has answered."""
        if self._asking.is_silent:
            return
        self._answered = False
        with contextlib.suppress(Exception):  # the store may be gone with the rank that held it
            self._asking(access, _STORE_SECONDS)
            self._answered = True


def is_dead(pid: int) -> bool:
    """Whether a process of this host is gone; a zombie that is not reaped yet counts as gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in ("Z", "X") or not os.path.exists(f"/proc/{pid}")
