"""Rank processes for tests: a function, called on every rank of a real process group, with a deadline.

Processes come from a fork server that has imported torch already (0.2 s for four ranks instead of 14 s), and a team of
them serves several calls before it is replaced. Any failure ends the team, so that nothing leaks into the next test.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

from .worker import serve

CALLS_PER_TEAM = 25  # groups that a test leaves open keep shared memory until their process ends
# The fork server imports these before it forks the first rank, and the slow modules of libraries that the test process
# has imported by then. (torch imports its compiler when an optimizer is made.)
PRELOAD = ("torch", "torch.distributed", "torch._dynamo", "pytest", "tpkernels")
SLOW = {
    "transformers": ("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"),
    "peft": ("peft",),
    "torch._inductor.compile_fx": ("torch._inductor.compile_fx",),
}
PATIENCE_S = 10.0  # after one rank failed, for the others to report
DUMP_S = 0.5  # for a rank to write its stack


def fork_server() -> Any:
    """The context of multiprocessing whose processes are forked from a server that has imported torch, one per process.

    All that start ranks take it from here: what the server imports is decided when it starts.
    """
    context = multiprocessing.get_context("forkserver")
    slow = [name for library, names in SLOW.items() if library in sys.modules for name in names]
    context.set_forkserver_preload([*PRELOAD, *slow, "tpkernels.testing.frozen"])
    with _one_thread():
        multiprocessing.forkserver.ensure_running()
    return context


@dataclass(frozen=True)
class Outcome:
    """The result of one rank in one call.

    Attributes:
        rank: which.
        value: what the function returned; None unless finished.
        error: the traceback of an exception, or the stack of the rank when it was killed; empty when it returned.
        exitcode: of a process that died in the call (-9: SIGKILL), else None.
        finished: the function returned.
    """

    rank: int
    value: Any = None
    error: str = ""
    exitcode: int | None = None
    finished: bool = False


class RankError(RuntimeError):
    """A rank raised, died, or did not end in time; the text shows every rank.

    Attributes:
        outcomes: one for each rank.
    """

    def __init__(self, message: str, outcomes: Sequence[Outcome]) -> None:
        super().__init__(message)
        self.outcomes = list(outcomes)


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, fresh: bool = False
) -> list[Any]:
    """Call fn(*args) on every rank of a new or resting team of processes; return what the ranks returned.

    Every rank has the default process group (gloo over loopback), one thread, and torch seeded with 0.

    Args:
        fn: a function at the top of a module, so that it can be pickled.
        world_size: how many ranks.
        args: passed to fn on every rank; pickled.
        timeout: seconds for the whole call. Then every rank's stack is shown and all are killed.
        fresh: processes that no other call has used or will use.

    Returns:
        the values that fn returned, in rank order.

    Raises:
        RankError: a rank raised or died, or the deadline passed; the text shows every rank.
    """
    outcomes = call_ranks(fn, world_size, args, timeout, fresh)
    if not all(outcome.finished for outcome in outcomes):
        raise RankError(report(fn, outcomes), outcomes)
    return [outcome.value for outcome in outcomes]


def run_ranks_outcomes(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, stopped_for_good: bool = False
) -> list[Outcome]:
    """Call fn(*args) on every rank of new processes, some of which may die; return the outcome of each.

    A rank that runs when the deadline passes is killed; its outcome has its stack.

    Args:
        fn, world_size, args, timeout: as for run_ranks.
        stopped_for_good: end ranks that a signal has stopped as soon as the others have returned.
    """
    return call_ranks(fn, world_size, args, timeout, True, patience=None, stopped_for_good=stopped_for_good)


def call_ranks(
    fn: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    timeout: float,
    fresh: bool,
    backend: str = "gloo",
    patience: float | None = PATIENCE_S,
    stopped_for_good: bool = False,
) -> list[Outcome]:
    """Call fn(*args) on every rank; return the outcome of each.

    Args:
        fn, world_size, args, timeout, fresh: as for run_ranks.
        backend: of the process group.
        patience: seconds that the others have left after one rank has failed; None for all of `timeout`.
        stopped_for_good: as for run_ranks_outcomes.
    """
    key = (world_size, backend)
    team = None if fresh else _resting.pop(key, None)
    if team is None:
        team = Team(world_size, backend)
    try:
        outcomes = team.call(fn, args, timeout, patience, stopped_for_good)
        if not fresh and all(outcome.finished for outcome in outcomes) and team.calls < CALLS_PER_TEAM:
            _resting[key] = team
        return outcomes
    finally:
        if _resting.get(key) is not team:
            team.end()


class Team:
    """The processes of one process group, waiting for functions to call."""

    def __init__(self, world_size: int, backend: str) -> None:
        self.calls = 0
        self._folder = Path(tempfile.mkdtemp(prefix="tpkernels-ranks-"))
        context = fork_server()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, world_size, str(self._folder), backend)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def call(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        timeout: float,
        patience: float | None,
        stopped_for_good: bool = False,
    ) -> list[Outcome]:
        """Call fn(*args) on every rank.

        Args:
            fn, args, timeout, patience, stopped_for_good: as for call_ranks.
        """
        self.calls += 1
        message = pickle.dumps((fn, args))
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send_bytes(message)
        outcomes: dict[int, Outcome] = {}
        deadline, why = time.monotonic() + timeout, f"did not end within {timeout:g} s"
        while len(outcomes) < len(self._pipes):
            waiting = [rank for rank in range(len(self._pipes)) if rank not in outcomes]
            if stopped_for_good and all(_state(self._processes[rank].pid) == "T" for rank in waiting):
                deadline, why = time.monotonic(), "was stopped by the time the others were through"
            left = deadline - time.monotonic()
            if left <= 0:
                for rank in waiting:
                    outcomes[rank] = Outcome(rank, error=f"{why}{self._standstill(rank)}")
                break
            wait_for_any([x for r in waiting for x in (self._pipes[r], self._processes[r].sentinel)], left)
            for rank in waiting:
                outcome = self._outcome(rank)
                if outcome is not None:
                    outcomes[rank] = outcome
                    if patience is not None and not outcome.finished and time.monotonic() + patience < deadline:
                        deadline = time.monotonic() + patience
                        why = f"did not end within {patience:g} s after rank {rank} failed"
        return [outcomes[rank] for rank in sorted(outcomes)]

    def _outcome(self, rank: int) -> Outcome | None:
        """The outcome of a rank that has returned, raised or died; None while it runs."""
        pipe, process = self._pipes[rank], self._processes[rank]
        try:
            if pipe.poll():
                finished, value = pickle.loads(pipe.recv_bytes())
                return Outcome(rank, value=value, finished=True) if finished else Outcome(rank, error=value)
        except (EOFError, ConnectionResetError):
            process.join(5.0)
        if process.exitcode is None:
            return None
        return Outcome(rank, error=f"the process died, exit code {process.exitcode}", exitcode=process.exitcode)

    def _standstill(self, rank: int) -> str:
        process = self._processes[rank]
        state = _state(process.pid)
        dump = self._folder / f"stack-{rank}"
        if state != "T":
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
            time.sleep(DUMP_S)
        where = dump.read_text(errors="replace") if dump.exists() else ""
        stopped = " (the process is stopped by a signal)" if state == "T" else ""
        return f"{stopped}; it stood at:\n{where or '  (no stack)'}"

    def end(self) -> None:
        """Kill the processes and remove their files."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            pipe.close()
        for process in self._processes:
            process.join(5.0)
        shutil.rmtree(self._folder, ignore_errors=True)


_resting: dict[tuple[int, str], Team] = {}


@atexit.register
def end_resting_teams() -> None:
    """Kill the processes that wait for further calls."""
    while _resting:
        _resting.popitem()[1].end()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One OpenMP thread for processes started inside: several ranks share the cores."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _state(pid: int) -> str:
    """The letter of the process's state: R running, S sleeping, T stopped, Z dead; empty when it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0]
    return ""


def report(fn: Callable[..., Any], outcomes: Sequence[Outcome]) -> str:
    """The outcomes of all ranks as text."""
    lines = [
        f"{getattr(fn, '__name__', fn)} failed on {sum(not o.finished for o in outcomes)} of {len(outcomes)} ranks"
    ]
    for outcome in outcomes:
        text = "returned" if outcome.finished else outcome.error.rstrip()
        lines.append(f"--- rank {outcome.rank}: {text}")
    return "\n".join(lines)
