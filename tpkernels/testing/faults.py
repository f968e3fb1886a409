"""Planted faults: a rank that dies, stops or is late, a disk that is full, at a chosen moment.

Signals come from a helper process, so that they strike in the middle of a C++ call, too.
"""

from __future__ import annotations

import errno
import itertools
import os
import pkgutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


def kill_myself(after_s: float = 0.0) -> None:
    """Send SIGKILL to this process after some seconds, whatever it is doing then."""
    _signal_myself("KILL", after_s)


def stop_myself(after_s: float = 0.0, for_s: float | None = None) -> None:
    """Send SIGSTOP to this process after some seconds, and SIGCONT `for_s` seconds later (None: never)."""
    _signal_myself("STOP", after_s, for_s)


def come_late(seconds: float) -> None:
    """Do nothing for some seconds, as a rank that still computes."""
    time.sleep(seconds)


def _signal_myself(name: str, after_s: float, continue_s: float | None = None) -> None:
    pid = os.getpid()
    if after_s <= 0 and continue_s is None:
        os.kill(pid, signal.Signals[f"SIG{name}"])
        return
    script = f"sleep {after_s}; kill -{name} {pid}"
    if continue_s is not None:
        script += f"; sleep {continue_s}; kill -CONT {pid}"
    subprocess.Popen(["sh", "-c", script], stdin=subprocess.DEVNULL)


@contextmanager
def at_call(target: str, number: int, do: Callable[[], object]) -> Iterator[None]:
    """Do something right before the number-th call, counted from 1, of a function of this process.

    Args:
        target: the function by its name where it is looked up: "os.fsync", "tpkernels.checkpoint.write_manifest".
        do: kills the process, raises an error in the place of the call, or notes that the call came.
    """
    real = pkgutil.resolve_name(target)
    calls = itertools.count(1)

    def planted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            do()
        return real(*args, **kwargs)

    with mock.patch(target, planted):
        yield


def full_disk() -> None:
    """Raise the error of a write to a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def short_writes(most: int) -> Iterator[None]:
    """Let every os.write of this process take no more than so many bytes, as a disk under pressure may."""
    real = os.write
    with mock.patch("os.write", lambda file, data: real(file, data[:most])):
        yield
