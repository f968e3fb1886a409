"""The real CUDA module as `make cuda` builds it, incrementally, and what nvcc left beside its objects."""

from __future__ import annotations

import fcntl
import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/cuda"
OBJECTS = ROOT / f"build/{sys.implementation.cache_tag}-torch-{torch.__version__}/CMakeFiles"
ARCH = "90a"
HOPPER = "fused_gemm_sm90.cu"  # for sm_90a alone
OBSTACLE = (
    "needs nvcc on PATH and a checkout, to build build/cuda/_C_cuda.so"
    if shutil.which("nvcc") is None or not (ROOT / "Makefile").exists()
    else None
)


@functools.cache
def build(archs: str = ARCH) -> Path:
    """The module for these architectures; "" is for all, and PTX."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # of the processes that run tests: ninja has none
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["make", "cuda", f"CUDA_ARCHS={archs}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=2400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return BUILD / "_C_cuda.so"


def object_of(file: str) -> Path:
    """Where the build has put the object of a file of kernels."""
    library = "kernels_sm90" if file == HOPPER else "kernels"
    return OBJECTS / f"{library}.dir/csrc/cuda/kernels/{file}.o"


def ptx_of(file: str) -> str:
    """The kernels of a file as nvcc hands them to ptxas for sm_90a."""
    build()
    made = str(object_of(file))
    one, of_several = Path(f"{made}.ptx"), Path(f"{made}.compute_{ARCH}.ptx")
    return (one if one.exists() else of_several).read_text()


@functools.cache
def nvcc_release() -> str | None:
    """'13.0', or None where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return None
    says = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", says)
    assert found, says
    return found[1]
