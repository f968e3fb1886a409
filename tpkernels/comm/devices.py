"""Whether this process can work on a GPU, and if not, what to do about it, in one sentence.

The facts are collected by `cuda_facts` and judged by `obstacle_to_cuda`, so that every sentence can be tested on a
machine without a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from tpkernels._build import build_info
from tpkernels.comm.process_groups import NewGroup
from tpkernels.errors import PeerLostError, RankMismatchError


@dataclass(frozen=True)
class CudaFacts:
    """The facts that CUDA depends on.

    Attributes:
        torch: its version.
        torch_cuda: the CUDA that torch was built for, None for a CPU torch.
        built: whether this build of tpkernels has CUDA kernels.
        built_reason: why, or why not.
        driver: the newest CUDA that the driver supports, (13, 0) for 13.0; None without a driver.
        gpus: how many this process sees.
        visible: CUDA_VISIBLE_DEVICES, None when it is not set.
    """

    torch: str
    torch_cuda: str | None
    built: bool
    built_reason: str
    driver: tuple[int, int] | None
    gpus: int
    visible: str | None


def cuda_facts() -> CudaFacts:
    """Collect the facts of this process. Starts no CUDA context."""
    built = build_info()
    return CudaFacts(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        built=built.cuda,
        built_reason=built.cuda_reason,
        driver=_driver(),
        gpus=torch.cuda.device_count(),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _driver() -> tuple[int, int] | None:
    """The version of the driver, from its library: a CPU torch has no call for it."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    failed = library.cuDriverGetVersion(ctypes.byref(version))
    return None if failed or not version.value else (version.value // 1000, version.value % 1000 // 10)


def obstacle_to_cuda(facts: CudaFacts) -> str | None:
    """Why CUDA cannot be used, and what to do; None when nothing is in the way."""
    if facts.torch_cuda is None:
        return (
            f"torch {facts.torch} is built without CUDA: install a torch with CUDA and build tpkernels again, "
            f"or open the group with device='cpu'"
        )
    if not facts.built:
        return (
            f"this build of tpkernels has no CUDA kernels, because {facts.built_reason}: put that right and build "
            f"again with TPKERNELS_CUDA=1, or open the group with device='cpu'"
        )
    if facts.driver is None:
        return "no NVIDIA driver is installed: install one, or open the group with device='cpu'"
    if facts.driver[0] < int(facts.torch_cuda.split(".")[0]):
        return (
            f"the NVIDIA driver is too old, it supports CUDA up to {facts.driver[0]}.{facts.driver[1]} and torch "
            f"{facts.torch} needs {facts.torch_cuda}: update the driver, or install a torch for an older CUDA"
        )
    if facts.gpus == 0:
        hidden = f" (CUDA_VISIBLE_DEVICES is {facts.visible!r})" if facts.visible is not None else ""
        return f"this process sees no GPU{hidden}: run it where there is one, or open the group with device='cpu'"
    return None


@cache
def load_cuda() -> tuple[ModuleType | None, str | None]:
    """The compiled CUDA half of tpkernels, or why there is none.

    It is loaded when the first group on a GPU is opened. What fails once is not tried again.
    """
    obstacle = obstacle_to_cuda(cuda_facts())
    if obstacle is not None:
        return None, obstacle
    try:
        module: Any = importlib.import_module("tpkernels._C_cuda")
    except (ImportError, OSError) as error:
        return None, (
            f"the CUDA kernels of tpkernels, built for torch {build_info().torch}, cannot be loaded ({error}): build "
            f"tpkernels again in this environment"
        )
    module.set_error_types(RankMismatchError, PeerLostError)
    return module, None


def device_of(process_group: dist.ProcessGroup | None, asked: torch.device | str | int | None) -> torch.device:
    """The device that a group works on.

    Args:
        process_group: what the group is opened over.
        asked: the argument of Group.open; None means CUDA where tensors on a GPU go through NCCL, else CPU.

    Returns:
        torch.device("cpu"), or a CUDA device with its index.

    Raises:
        ValueError: another kind of device, or an index that does not exist.
    """
    if asked is None:
        asked = "cuda" if process_group is not None and backend_of(process_group, "cuda") == "nccl" else "cpu"
    try:
        device = torch.device(asked)
    except (RuntimeError, TypeError):
        raise ValueError(f"Group.open: device must be 'cpu' or 'cuda', got {asked!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Group.open: device must be 'cpu' or 'cuda', got {str(asked)!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        return torch.device("cuda", device.index or 0)  # the error of load_cuda names what is missing
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise ValueError(f"Group.open: device must be one of the {count} GPUs of this process, got {str(asked)!r}")
    return torch.device("cuda", index)


def backend_of(process_group: dist.ProcessGroup, device_type: str) -> str | None:
    """The c10d backend that carries tensors of a kind of device ("gloo", "nccl"), None when there is none."""
    made: Any = process_group
    if isinstance(made, NewGroup):
        return "gloo" if device_type == "cpu" else None
    config: str = dist.get_backend_config(process_group)
    pairs = dict(part.split(":", 1) for part in config.split(",") if ":" in part)
    return pairs.get(device_type)
