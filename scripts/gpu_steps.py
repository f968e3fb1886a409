"""The steps of scripts/gpu_check.py, as data: command, time limit, tests and files of each."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path


@functools.cache
def is_hopper() -> bool:
    """Whether the GPU that is here has compute capability 9.0."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split() == ["9.0"]
    return False


def archs() -> dict[str, str]:
    """What limits kernels to the GPU that is here, where it is a Hopper."""
    return {"CUDAARCHS": "90a"} if is_hopper() else {}


TOTAL_S = 530.0  # of all steps together: a little under nine minutes

PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--maxfail=5")
# Of our kernels alone: torch's are many and take minutes. Calls of the driver that fail inside torch are not reported,
# and pytest itself does not use CUDA where ranks are another process.
SANITIZER = ("compute-sanitizer", "--target-processes", "all", "--error-exitcode", "77", "--report-api-errors", "no",
             "--require-cuda-init", "no", "--kernel-name", "kernel_substring=tpk", "--tool")  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One thing to check.

    Attributes:
        name: also of its log file.
        command: without the tests; "{out}" is the folder of results.
        limit_s: seconds after which it is ended and has failed.
        tests: files or ids of pytest, the last arguments of the command. One of them at least must pass.
        files: what else must be there.
        environment: variables beside those of this process.
        tool: a program without which the step is left out.
        dry: the command of --dry, None when looking at tests and files is all.
        opens: whether the steps after it are pointless when it fails.
        hopper: whether it needs a GPU of compute capability 9.0, and is left out on others.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    tests: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    tool: str | None = None
    dry: tuple[str, ...] | None = None
    opens: bool = False
    hopper: bool = False


def sanitizer(tool: str, tests: tuple[str, ...], name: str | None = None) -> Step:
    """The tests under one tool of compute-sanitizer, several times slower than alone."""
    # Blocks that spin are slow there, too: torch's allocator must not hide what lies behind a tensor's end.
    # Ranks of one program load kernels in one order, so that loading them late is safe, and all of torch's is too long.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name is None else {"CUDA_MODULE_LOADING": "LAZY"}
    return Step(name or tool, (*SANITIZER, tool, *PYTEST), 45.0, tests, environment=alone, tool=SANITIZER[0])


LOCAL = ("tests/gpu/test_local.py",)
LIGHT = "build/first_light"
LIGHT_SOURCES = ("tests/csrc/gpu/first_light.cu", "csrc/cuda/comm/runtime.cpp", "csrc/cuda/comm/tensor_map.cpp")
NVCC = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc"))
# One file of ours and two of the library: neither cmake nor torch, and no more than 30 s.
BUILD_LIGHT = (NVCC, "-std=c++17", "-O2", "-gencode=arch=compute_90a,code=sm_90a", "-Icsrc", "-Itests/csrc",
               "-o", LIGHT, *LIGHT_SOURCES)  # fmt: skip


def light(tool: str, *checks: str) -> Step:
    """First light under one tool of compute-sanitizer."""
    command = ("compute-sanitizer", "--error-exitcode", "77", "--tool", tool, f"./{LIGHT}", *checks)
    return Step(f"{tool}_light", command, 30.0, files=LIGHT_SOURCES, tool="compute-sanitizer", hopper=True)


STEPS = (
    Step("facts", (sys.executable, "scripts/gpu_facts.py"), 30.0, dry=(sys.executable, "scripts/gpu_facts.py", "--dry"),
         files=("scripts/gpu_facts.py",)),
    # Every primitive alone, before anything that is made of them and whether or not the module builds.
    Step("build_light", BUILD_LIGHT, 60.0, files=LIGHT_SOURCES, hopper=True),
    Step("first_light", (f"./{LIGHT}",), 60.0, files=LIGHT_SOURCES, hopper=True),
    light("memcheck", "--here"),
    # Without what needs several kernels at a time, which these tools may run one after the other.
    light("racecheck", "words", "transactions", "warps", "tile", "products"),
    light("synccheck", "words", "transactions", "warps", "tile", "products"),
    Step("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 240.0,
         files=("setup.py", "CMakeLists.txt", "csrc/cuda/module.cpp"), opens=True,
         environment={"TPKERNELS_CUDA": "1", **archs()}),
    # Each in a process of its own: a kernel that fails takes the rest of its process along.
    Step("local", PYTEST, 60.0, LOCAL),
    Step("virtual", PYTEST, 90.0, ("tests/gpu/test_virtual.py",)),
    Step("fused", PYTEST, 60.0, ("tests/ops/test_fused_path.py",)),
    Step("cupy", PYTEST, 30.0, ("tests/gpu/test_cupy.py",)),
    Step("two_processes", PYTEST, 60.0, ("tests/gpu/test_two_processes.py",),
         environment={"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}),
    Step("nccl", PYTEST, 45.0, ("tests/gpu/test_nccl.py",)),
    Step("graphs", PYTEST, 45.0, ("tests/gpu/test_graphs.py",)),
    Step("bench", (sys.executable, "-m", "bench.gpu", "--out", "{out}/gpu.jsonl"), 200.0, files=("bench/gpu.py",),
         dry=(sys.executable, "-m", "bench.gpu", "--list")),
    sanitizer("memcheck", LOCAL),
    sanitizer("racecheck", LOCAL),
    sanitizer("synccheck", LOCAL),
    sanitizer("memcheck", ("tests/gpu/test_virtual.py::test_all_reduce_in_every_launch_shape[2]",), "memcheck_virtual"),
)  # fmt: skip
