"""`Group.explain`: the path of a call on this machine, as the C++ code that takes it decides, and the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tpkernels._native import _C
from tpkernels.comm.devices import load_cuda
from tpkernels.comm.paths import PathCall, gpu_name, measure_paths
from tpkernels.comm.profile import Product, measure_shape

_COLLECTIVES = ("all_reduce", "all_reduce_", "reduce_scatter", "all_gather")
_GEMMS = ("gemm_all_reduce", "gemm_reduce_scatter", "all_gather_gemm", "replicated_gemm")
_SUMMED = frozenset(dtype for dtype, _, _ in _C.wires())


@dataclass(frozen=True)
class Explanation:
    """Why a call takes the path it takes.

    Attributes:
        path: the name of the path.
        reason: one sentence; of a GEMM on CUDA also the path of its backward.
        measured: microseconds by candidate, where this call measured them.
        engine: of the product, on the CPU; "" for a collective.
        profile: the file of the machine's profile that the group read, "" where the rule decides.
    """

    path: str
    reason: str
    measured: dict[str, float] = field(default_factory=dict)
    engine: str = ""
    profile: str = ""


def explain(
    communicator: Any,
    is_cpu: bool,
    op: str,
    *,
    M: int,
    N: int,
    K: int,
    numel: int,
    dtype: torch.dtype,
    codec: str,
    dim: int,
    tune: bool,
) -> Explanation:
    """Return the path of one call and the reason: `Group.explain` of an op, which has the other arguments.

    Args:
        communicator: of the group.
        is_cpu: whether it works on CPU tensors.
    """
    if op not in _COLLECTIVES + _GEMMS:
        raise ValueError(f"explain: op must be one of {[*_COLLECTIVES, *_GEMMS]}, got {op!r}")
    device: Any = _C if is_cpu else load_cuda()[0]
    measured: dict[str, float] = {}
    if tune and op in _GEMMS and hasattr(communicator, "note_shards"):
        call = PathCall(op, _name(dtype), codec, M, N, K, backward=False)
        where = torch.device("cpu") if is_cpu else torch.device("cuda", communicator.device)
        measured = measure_paths(communicator, device, gpu_name(where), where, call)
    elif tune and is_cpu and op in _GEMMS and dtype.is_floating_point and min(M, N, K) > 0:
        rows = M * communicator.world_size if op == "all_gather_gemm" else M
        measured = measure_shape(communicator, Product(_name(dtype), rows, N, K))
    path, reason, engine = device.explain(communicator, op, _name(dtype), codec, M, N, K, numel, dim)
    return Explanation(path, reason, measured, engine)


def _name(dtype: torch.dtype) -> str:
    """The name of a dtype in C++: that of its size where values are moved and not summed."""
    name = str(dtype).removeprefix("torch.")
    return name if name in _SUMMED else f"{dtype.itemsize}-byte values"
