"""The clock of a training step."""

from __future__ import annotations

import time

from tpkernels.comm.group import Group


class Clock:
    """Splits the time of a step into its phases, without their collectives, and the collectives."""

    def __init__(self, group: Group | None) -> None:
        self.group = group
        self.start = self.last = time.perf_counter()
        self.moved, self.waited = self._communication()
        self.seconds = {"communication": 0.0, "waiting": 0.0}

    def _communication(self) -> tuple[float, float]:
        if self.group is None:
            return 0.0, 0.0
        stats = self.group.stats()
        return stats["seconds"], stats["wait_seconds"]

    def lap(self, phase: str) -> None:
        """End a phase; "communication" is the time spent waiting for other replicas, which no other phase hides."""
        now, (moved, waited) = time.perf_counter(), self._communication()
        took, inside = now - self.last, moved - self.moved
        if phase != "communication":
            self.seconds[phase] = took - inside
            took = inside
        self.seconds["communication"] += took
        self.seconds["waiting"] += waited - self.waited
        self.last, self.moved, self.waited = now, moved, waited
        self.seconds["seconds"] = now - self.start
