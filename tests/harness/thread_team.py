"""The process in which all ranks of a test are threads (threads.py), seen from the test."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from tpkernels.testing.spawn import DUMP_S, PATIENCE_S, Outcome

_ROOT = Path(__file__).resolve().parents[2]
_STDERR_CHARS = 4000
MOST_CALLS = 100  # of a process, whose start takes 1.4 s

# What the process runs first: on an emulated device, another module takes the place of _C before anything asks for it.
_BOOT = """
import importlib.util, json, sys
from multiprocessing.connection import Connection
fd, place, module, stack, seed, path = sys.argv[1:]
sys.path[:] = json.loads(path)
import torch
if module:
    spec = importlib.util.spec_from_file_location("tpkernels._C_emu", module)
    sys.modules["tpkernels._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tpkernels._C"])
from tests.harness.threads import serve
serve(Connection(int(fd)), place, stack, int(seed))
"""

_ENVIRONMENT = {
    "emu": {},
    # Streams must not share a work queue, and no kernel may be loaded while another one waits for it.
    "virtual": {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"},
}


def emulated_module() -> Path | None:
    """The compiled emulated module (make emu), None where there is none."""
    return next(iter(sorted((_ROOT / "build" / "emu").glob("_C_emu*.so"))), None)


@dataclass(frozen=True)
class ThreadCall:
    """A call of body(group, *args) on R ranks.

    Attributes:
        opening: of the group.
        timeout: seconds for all of it.
        faulty: it leaves a device behind that failed: nobody asks it anything more, and its process ends.
    """

    body: Callable[..., Any]
    R: int
    args: tuple[Any, ...]
    opening: dict[str, Any]
    timeout: float
    faulty: bool


def call_threads(place: str, seed: int, call: ThreadCall) -> list[Outcome]:
    """Make a call in a new or resting process; return what became of each rank."""
    key = (place, seed)
    team = _resting.pop(key, None) or ThreadTeam(place, seed)
    try:
        outcomes = team.call(call)
        if not call.faulty and all(outcome.finished for outcome in outcomes) and team.calls < MOST_CALLS:
            _resting[key] = team
        return outcomes
    finally:
        if _resting.get(key) is not team:
            team.end()


class ThreadTeam:
    """A process whose threads are ranks, waiting for bodies to call."""

    def __init__(self, place: str, seed: int) -> None:
        self.calls = 0
        self._folder = Path(tempfile.mkdtemp(prefix="tpkernels-threads-"))
        self._pipe, theirs = Pipe()
        module = emulated_module() if place == "emu" else None
        told = [theirs.fileno(), place, module or "", self._folder / "stack", seed, json.dumps(sys.path)]
        arguments = [str(one) for one in told]
        environment = {**_ENVIRONMENT[place], **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with open(self._folder / "stderr", "wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *arguments],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
            )
        theirs.close()

    def call(self, call: ThreadCall) -> list[Outcome]:
        """Make it on every rank. After a failure the others have PATIENCE_S seconds left."""
        self.calls += 1
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send_bytes(pickle.dumps((call.body, call.R, call.args, call.opening, call.faulty)))
        outcomes: dict[int, Outcome] = {}
        threads: dict[int, int] = {}
        deadline, why = time.monotonic() + call.timeout, f"did not end within {call.timeout:g} s"
        while (message := _next(self._pipe, deadline)) is not None:
            rank, finished, value = message
            if finished is None:
                threads[rank] = value
                continue
            outcomes[rank] = Outcome(rank, value=value, finished=True) if finished else Outcome(rank, error=value)
            if not finished and time.monotonic() + PATIENCE_S < deadline:
                deadline = time.monotonic() + PATIENCE_S
                why = f"did not end within {PATIENCE_S:g} s after rank {rank} failed"
        if len(outcomes) < call.R:
            stacks, code = self._stacks(), self._exitcode()
            for rank in set(range(call.R)) - set(outcomes):
                where = f"{why}; it stood at:\n{stacks.get(threads.get(rank, 0), '  (no stack)')}"
                died = f"the process of all ranks died, exit code {code}\n{self._stderr()}"
                outcomes[rank] = Outcome(rank, error=where if code is None else died, exitcode=code)
        return [outcomes[rank] for rank in sorted(outcomes)]

    def _exitcode(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(DUMP_S)
        return None

    def _stacks(self) -> dict[int, str]:
        """Where each thread stands, by its identity."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
        time.sleep(DUMP_S)
        text = (self._folder / "stack").read_text(errors="replace") if (self._folder / "stack").exists() else ""
        parts = re.split(r"^(?:Current thread|Thread) (0x[0-9a-f]+).*$", text, flags=re.M)
        return {int(ident, 16): stack.strip("\n") for ident, stack in zip(parts[1::2], parts[2::2], strict=True)}

    def _stderr(self) -> str:
        return (self._folder / "stderr").read_text(errors="replace")[-_STDERR_CHARS:]

    def end(self) -> None:
        """Kill the process and forget its files."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _next(pipe: Connection, deadline: float) -> Any:
    """The next message; None at the end of the call, of the process, or of the time."""
    try:
        return pickle.loads(pipe.recv_bytes()) if pipe.poll(max(0.0, deadline - time.monotonic())) else None
    except (EOFError, ConnectionResetError):
        return None


_resting: dict[tuple[str, int], ThreadTeam] = {}


@atexit.register
def end_resting_thread_teams() -> None:
    """Kill the processes that wait for further calls."""
    while _resting:
        _resting.popitem()[1].end()
