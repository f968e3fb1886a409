"""Faults on purpose: a rank that dies, stands still or comes late, at a chosen moment.

Signals come from a helper process, so that they strike in the middle of a C++ call, too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time


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
