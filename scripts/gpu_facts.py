"""Print the facts of this machine in JSON: GPU, driver, torch, NCCL, compilers. Exit 1 without a GPU, 0 with --dry."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import torch

TOOLS = ("nvcc", "cmake", "ninja", "g++", "compute-sanitizer", "ncu", "nvidia-smi")
MODULES = ("pytest", "rich", "cupy", "pybind11", "safetensors", "numpy")


def output_of(*command: str) -> str | None:
    """The last line that a program prints, None where there is none."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else None


def gpus() -> list[dict[str, Any]]:
    """What torch says of each GPU."""
    found = []
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        found.append({
            "name": of.name, "capability": f"{of.major}.{of.minor}", "multiprocessors": of.multi_processor_count,
            "GiB": round(of.total_memory / 2**30, 1),
        })  # fmt: skip
    return found


def facts() -> dict[str, Any]:
    """Everything, for people and programs."""
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "nccl": nccl,
        "gpus": gpus(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": output_of("nvcc", "--version"),
        "g++": output_of("g++", "-dumpfullversion"),
        "cores": os.cpu_count(),
        "tools": {tool: shutil.which(tool) is not None for tool in TOOLS},
        "modules": {module: importlib.util.find_spec(module) is not None for module in MODULES},
    }


if __name__ == "__main__":
    found = facts()
    print(json.dumps(found, indent=2))
    names = ", ".join(gpu["name"] for gpu in found["gpus"]) or "no GPU"
    print(f"{names}; torch {found['torch']}")
    sys.exit(0 if found["gpus"] or "--dry" in sys.argv else 1)
