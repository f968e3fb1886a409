"""Fixtures of all tests."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tpkernels.devices import load_cuda
from tpkernels.testing.spawn import end_resting_teams
from tpkernels.testing.thread_team import end_resting_thread_teams

SHM = "/dev/shm"


@pytest.fixture
def nothing_is_left_in_shared_memory() -> Iterator[None]:
    before = set(os.listdir(SHM))
    yield
    deadline = time.monotonic() + 5.0
    while (left := set(os.listdir(SHM)) - before) and time.monotonic() < deadline:
        time.sleep(0.1)  # between two looks: files of other programs come and go
    assert not [name for name in left if "tpk" in name or "tpkernels" in name], left


@pytest.fixture
def cuda_is_looked_for_anew() -> Iterator[None]:
    """Neither this test nor the next takes over whether the one before found CUDA."""
    load_cuda.cache_clear()
    yield
    load_cuda.cache_clear()


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A small file that a model can learn something from."""
    path = tmp_path / "text.py"
    path.write_text("".join(f"def function_{i}(x):\n    return x + {i}\n\n" for i in range(300)))
    return str(path)


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Rank processes that rest between two tests end with the last one."""
    yield
    end_resting_teams()
    end_resting_thread_teams()
