"""Starts the ranks of the study on the two ends of a link, and yields their rows."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.study.links import Link
from bench.study.methods import LAYOUTS

ROOT = Path(__file__).resolve().parent.parent.parent
NAMESPACE_PORT = 29_500  # a namespace has all ports to itself
GRACE_S = 10.0  # for a rank to end after SIGTERM
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
SHOWN = 2_000  # characters of the output of a failed rank


class RanksFailed(RuntimeError):
    """A rank ended badly, or none of them ended in time."""


def run(job: dict[str, Any], link: Link, *, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Run a job (see rank.py) on a link; yields its rows. Ends all ranks, whatever happens.

    Raises:
        RanksFailed: a rank failed, or the job took longer than timeout_s; the text has the end of its output.
    """
    tp, dp = LAYOUTS[job["layout"]]
    world = tp * dp
    port = NAMESPACE_PORT if link.hosts[0].command else free_port()
    ranks: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world):
                ranks.append(start(job, link, rank, world, port, Path(folder)))
            yield from follow(ranks, Path(folder), time.monotonic() + timeout_s)
        finally:
            end(ranks)


def start(job: dict[str, Any], link: Link, rank: int, world: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    """One rank on its host; the first half of the ranks is on host 0. Ranks share the cores evenly, pinned."""
    host = link.hosts[rank * 2 // world]
    cores = sorted(os.sched_getaffinity(0))
    env = os.environ | {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": link.hosts[0].address, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": host.interface,
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [*host.command, sys.executable, "-m", "bench.study.rank", json.dumps(job)]
    with Path(folder, f"rows-{rank}").open("w") as output, Path(folder, f"errors-{rank}").open("w") as errors:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=errors,
            env=env,
            cwd=ROOT,
            preexec_fn=lambda: bind(cores[rank * len(cores) // world % len(cores)]),
        )


def bind(core: int) -> None:
    """In the new process: stay on a core, and end when the study ends, however it does."""
    os.sched_setaffinity(0, {core})
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def follow(ranks: list[subprocess.Popen[bytes]], folder: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """The rows of rank 0 until all ranks have ended."""
    with Path(folder, "rows-0").open() as output:
        pending = ""
        while True:
            ended = [rank.poll() for rank in ranks]  # polled before reading, so that all output before the end is read
            pending += output.read()
            *lines, pending = pending.split("\n")
            for line in lines:
                yield json.loads(line)
            failed = [rank for rank, code in enumerate(ended) if code]
            if failed or time.monotonic() > deadline:
                tails = {r: Path(folder, f"errors-{r}").read_text()[-SHOWN:] for r in failed or range(len(ranks))}
                text = "\n".join(f"rank {r}: {tail}" for r, tail in tails.items())
                raise RanksFailed(f"ranks {failed} failed:\n{text}" if failed else f"no end in time:\n{text}")
            if all(code == 0 for code in ended):
                return
            time.sleep(0.05)


def end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Terminate the ranks that still run, then kill them."""
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGTERM)
    for rank in ranks:
        try:
            rank.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
