"""Where the ranks of a test run. One body, four places:

    cpu      a process for each rank, transports `shm` and `group` over gloo
    emu      a thread for each rank in one process; the CUDA sources run on an emulated device for each of them
    virtual  a thread and a stream for each rank in one process, all on one GPU
    real     a process and a GPU for each rank

A body is a function at the top of a module, `body(group, *args)`. It sees the ranks through its group and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tpkernels.comm.devices import cuda_facts, obstacle_to_cuda
from tpkernels.comm.group import Group
from tpkernels.testing.spawn import Outcome, RankError, call_ranks, report

from .thread_team import ThreadCall, call_threads, emulated_module
from .threads import open_beside, where

__all__ = ["PLACES", "Place", "RankError", "open_beside"]


@dataclass(frozen=True)
class Place:
    """Somewhere to run a body on R ranks.

    Attributes:
        name: "cpu", "emu", "virtual" or "real".
        device: of the tensors that groups take there: "cpu" or "cuda".
    """

    name: str
    device: str

    def lacks(self, R: int) -> str | None:
        """What R ranks need here and this machine does not have; None when they can run."""
        if self.name == "emu":
            return None if emulated_module() else "emu needs the emulated module: make emu"
        if self.device == "cpu":
            return None
        obstacle = obstacle_to_cuda(cuda_facts())
        if obstacle is not None:
            return f"{self.name} needs a CUDA GPU: {obstacle}"
        have = torch.cuda.device_count()
        return f"real needs {R} GPUs, this machine has {have}" if self.name == "real" and have < R else None

    def run(
        self,
        body: Callable[..., Any],
        R: int,
        *args: Any,
        timeout: float = 120.0,
        faulty: bool = False,
        seed: int = 0,
        **opening: Any,
    ) -> list[Any]:
        """Call body(group, *args) on every rank; return what the ranks returned.

        Args:
            body: a function at the top of a module, so that it can be pickled.
            R: how many ranks.
            args: pickled.
            timeout: seconds for the whole call. Then every rank's stack is shown and all are ended.
            faulty: the body breaks what it runs on: no call follows in these processes.
            seed: of the order in which an emulated device runs blocks and threads, 0: as they are numbered.
            opening: of the group: timeout_s, arena_bytes, transport, multicast.

        Raises:
            RankError: a rank raised or died, or the deadline passed; the text shows every rank.
        """
        outcomes = self.outcomes(body, R, *args, timeout=timeout, faulty=faulty, seed=seed, **opening)
        if not all(outcome.finished for outcome in outcomes):
            raise RankError(report(body, outcomes), outcomes)
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self,
        body: Callable[..., Any],
        R: int,
        *args: Any,
        timeout: float = 120.0,
        faulty: bool = False,
        seed: int = 0,
        **opening: Any,
    ) -> list[Outcome]:
        """The same, telling what became of each rank instead of raising."""
        if self.name in ("emu", "virtual"):
            return call_threads(self.name, seed, ThreadCall(body, R, args, opening, timeout, faulty))
        backend = "cpu:gloo,cuda:nccl" if self.device == "cuda" else "gloo"
        return call_ranks(in_group, R, (body, opening, args), timeout, faulty, backend)


def in_group(body: Callable[..., Any], opening: dict[str, Any], args: tuple[Any, ...]) -> Any:
    """The body of one rank that has a process of its own."""
    with Group.open(**opening) as group, where(group):
        return body(group, *args)


PLACES = {
    name: Place(name, device)
    for name, device in (("cpu", "cpu"), ("emu", "cpu"), ("virtual", "cuda"), ("real", "cuda"))
}
