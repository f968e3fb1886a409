"""Tests in this folder need a GPU; elsewhere they are skipped and say what is missing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.ops import place_for
from tests.harness.thread_team import end_resting_thread_teams
from tpkernels.comm.group import Group


@pytest.fixture(autouse=True)
def a_gpu_is_there() -> None:
    place_for("virtual", 1)


@pytest.fixture
def alone(a_gpu_is_there: None) -> Iterator[Group]:
    """A group of this process on its GPU."""
    with Group.open(device="cuda") as group:
        yield group


@pytest.fixture(scope="session", autouse=True)
def no_process_of_threads_is_left() -> Iterator[None]:
    yield
    end_resting_thread_teams()
