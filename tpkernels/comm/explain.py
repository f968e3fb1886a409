"""What `Group.explain` answers: which path a call takes on this machine, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tpkernels._native import _C
from tpkernels.comm.devices import load_cuda
from tpkernels.comm.engines import measure

_COLLECTIVES = ("all_reduce", "all_reduce_", "reduce_scatter", "all_gather")
_GEMMS = ("gemm_all_reduce", "gemm_reduce_scatter", "all_gather_gemm", "replicated_gemm")
_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Explanation:
    """Why a call takes the path it takes.

    Attributes:
        path: the name of the path.
        reason: one sentence.
        measured: microseconds by candidate, empty when nothing was measured.
    """

    path: str
    reason: str
    measured: dict[str, float] = field(default_factory=dict)


def explain(
    communicator: Any,
    is_cpu: bool,
    op: str,
    *,
    M: int = 0,
    N: int = 0,
    K: int = 0,
    numel: int = 0,
    dtype: torch.dtype = torch.float32,
    codec: str = "none",
    tune: bool = False,
) -> Explanation:
    """The path of one call; see Group.explain. tune=True measures the GEMM engines of the CPU first (engines.py).

    Raises:
        ValueError: no such op, or a dtype that it does not take.
    """
    if op not in _COLLECTIVES + _GEMMS:
        raise ValueError(f"explain: op must be one of {[*_COLLECTIVES, *_GEMMS]}, got {op!r}")
    device: Any = _C if is_cpu else load_cuda()[0]
    asks_device = hasattr(device, "explain")  # a GPU, or an emulated one
    if dtype not in _DTYPES and (asks_device or op in _GEMMS):
        raise ValueError(f"explain: dtype must be one of {list(_DTYPES)}, got {dtype}")
    if asks_device:
        return Explanation(*device.explain(communicator, op, _DTYPES[dtype], M, N, K, numel, codec))
    if op in _COLLECTIVES:
        return Explanation(*_collective_path(communicator, op, numel * dtype.itemsize, codec))
    measured: dict[str, float] = {}
    if tune and dtype == torch.float32 and min(M, N, K) > 0 and torch._C._has_mkldnn:
        measured = measure(communicator, M, N, K, dtype)
    engine, why = _C.choose_engine(_DTYPES[dtype], M, N, K)
    path, travel = _collective_path(communicator, "all_reduce", M * N * dtype.itemsize, codec)
    if op in ("gemm_all_reduce", "gemm_reduce_scatter") and _in_arena(
        communicator, engine, M * N * dtype.itemsize, codec
    ):
        return Explanation("fused", f"GEMM by {engine} ({why}) writes into the arena, summed where it lies", measured)
    return Explanation("unfused", f"GEMM by {engine} ({why}), then {path}: {travel}", measured)


def _in_arena(communicator: Any, engine: str, nbytes: int, codec: str) -> bool:
    limits: dict[str, Any] = _C.limits()
    fits = limits["smallest_in_arena"] <= nbytes <= communicator.heap_bytes
    return engine != "onednn" and codec == "none" and fits


def _collective_path(communicator: Any, op: str, nbytes: int, codec: str) -> tuple[str, str]:
    if communicator.transport == "local":
        return "local", "one rank: nothing travels"
    if communicator.transport == "group":
        return "exchange", "all-to-all between the ranks, sums taken locally in rank order"
    limits: dict[str, Any] = _C.limits()
    if op.startswith("all_reduce") and nbytes <= limits["one_shot_bytes"]:
        return "one_shot", f"{nbytes} bytes: every rank reads all inputs, up to {limits['one_shot_bytes']} bytes"
    if op.startswith("all_reduce"):
        return "two_shot", f"{nbytes} bytes: each rank sums a part, in pieces of {limits['piece_bytes']} bytes"
    return "direct", f"each rank reads what it needs, in pieces of {limits['piece_bytes']} bytes"
