"""Times of the paths of sharded GEMMs on GPUs, measured on request, kept in a file: they overrule the rule's model.

A group over peer memory reads the file of its kind of GPU and number of ranks when it opens, if all ranks have the
same. `group.explain(op, M=..., N=..., K=..., tune=True)` measures one shape. TPKERNELS_PROFILE is as in profile.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tpkernels._build import build_info
from tpkernels.comm.cache import cache_file, replace_file
from tpkernels.comm.profile import mode

_ROUNDS = 5
_CALLS = 4  # between two clocks
_log = logging.getLogger("tpkernels")


class PathCall(NamedTuple):
    """A sharded GEMM with this rank's sizes, x[M, K] and w[N, K], the same on all ranks; or its backward."""

    op: str
    dtype: str
    codec: str
    M: int
    N: int
    K: int
    backward: bool


Measured = dict[PathCall, tuple[float, float]]  # microseconds of path fused, and of the rule's other path


def gpu_name(device: torch.device) -> str:
    """Return the kind of a GPU; emulated ones, whose tensors are on the CPU, are a kind of their own."""
    return "emulated" if device.type == "cpu" else torch.cuda.get_device_name(device)


def paths_file(gpu: str, world_size: int) -> Path:
    """Return the file: one for each kind of GPU, number of ranks, torch and build.

    Args:
        gpu: its name.
        world_size: of the group.
    """
    if mode() not in ("auto", "off"):
        return Path(mode())
    built = build_info()
    return cache_file("paths", ".json", gpu, world_size, torch.__version__, built.version, built.commit)


def read_paths(gpu: str, world_size: int) -> Measured:
    """Read what was measured; nothing where there is no such file, or where it is switched off."""
    if mode() == "off":
        return {}
    try:
        rows = json.loads(paths_file(gpu, world_size).read_text(encoding="utf-8"))["paths"]
        found = {PathCall(*call): (float(fused), float(others)) for *call, fused, others in rows}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return found if all(0 < us < math.inf for both in found.values() for us in both) else {}


def open_with_paths(communicator: Any, gpu: str) -> Path | None:
    """Give a communicator that opens what was measured, if all ranks read the same; all ranks call this.

    Args:
        communicator: over peer memory.
        gpu: the name of its GPU.

    Returns:
        the file; None where nothing was measured.
    """
    found = read_paths(gpu, communicator.world_size)
    digests = set(communicator.exchange(int.from_bytes(hashlib.sha256(_text(found).encode()).digest()[:7], "big")))
    if len(digests) > 1 and communicator.rank == 0:
        _log.warning("group '%s': the ranks have different times of paths; none is used", communicator.label)
    if len(digests) > 1 or not found:
        return None
    for call, us in found.items():
        communicator.add_measured_path(*call, *us)
    return paths_file(gpu, communicator.world_size)


def _text(measured: Measured) -> str:
    return '{"paths": [\n' + ",\n".join(json.dumps([*call, *us]) for call, us in measured.items()) + "\n]}\n"


def measure_paths(communicator: Any, kernels: Any, gpu: str, device: torch.device, call: PathCall) -> dict[str, float]:
    """Time both paths of a GEMM and of its backward where path fused can take them; use and keep the result.

    Args:
        communicator: over peer memory, whose ranks all call this.
        kernels: the module of the communicator.
        gpu: the name of its GPU.
        device: where tensors of the group are.
        call: the forward.

    Returns:
        microseconds by path, of the slowest rank; the same on all ranks.
    """
    found: Measured = {}
    for way in (call, call._replace(backward=True)):
        if way.op != ("gemm_all_reduce" if way.backward else "replicated_gemm"):
            us = _measure(communicator, kernels, device, way)
            found |= {} if us is None else {way: us}
    if communicator.rank == 0 and found and mode() == "auto":
        try:
            replace_file(paths_file(gpu, communicator.world_size),
                         _text(read_paths(gpu, communicator.world_size) | found))  # fmt: skip
        except OSError as error:
            _log.warning("group '%s': times of paths cannot be kept: %s", communicator.label, error)
    communicator.barrier()
    return {
        f"{'backward ' if way.backward else ''}{path}": us
        for way, both in found.items()
        for path, us in zip(("fused", "others"), both, strict=True)
    }


def _measure(communicator: Any, kernels: Any, device: torch.device, call: PathCall) -> tuple[float, float] | None:
    """The least time of each path over some rounds, of the slowest rank; None where path fused cannot take it."""
    run, add = _runner(communicator, device, call), communicator.add_measured_path
    order = {"fused": (1.0, 2.0), "others": (2.0, 1.0)}  # times with which the rule takes this path
    add(*call, *order["fused"])
    path, reason, _ = kernels.explain(communicator, *call[:-1], 0, 0)
    if "backward: fused" not in reason if call.backward else path != "fused":
        add(*call, *order["others"])
        return None
    best = dict.fromkeys(order, math.inf)
    for _ in range(_ROUNDS):
        for name, times in order.items():
            add(*call, *times)
            run()
            communicator.check()
            communicator.barrier()
            started = time.perf_counter_ns()
            for _ in range(_CALLS):
                run()
            communicator.check()
            best[name] = min(best[name], (time.perf_counter_ns() - started) // _CALLS)
    us = [max(communicator.exchange(int(ns))) / 1e3 for ns in best.values()]
    add(*call, *us)
    return us[0], us[1]


def _runner(communicator: Any, device: torch.device, call: PathCall) -> Callable[[], object]:
    """The call, on tensors of its sizes."""
    R, op, dtype = communicator.world_size, call.op, getattr(torch, call.dtype)
    name, rank, codec = communicator.name, communicator.rank, call.codec

    def full(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0.5, dtype=dtype, device=device)

    x, w, rows = full(call.M, call.K), full(call.N, call.K), call.M * R
    if not call.backward:
        of: dict[str, tuple[Any, ...]] = {
            "gemm_all_reduce": (name, R, codec),
            "gemm_reduce_scatter": (name, R, rank, 0, codec, codec),
            "all_gather_gemm": (name, R, rank, 0, rows, codec, codec),
        }
        forward = getattr(torch.ops.tpkernels, op)
        return lambda: forward(x, w, None, *of[op])
    mine = call.M // R + (rank < call.M % R)
    dy = full({"gemm_reduce_scatter": mine, "all_gather_gemm": rows}.get(op, call.M), call.N)
    of = {
        "replicated_gemm": (name, R, codec),
        "gemm_reduce_scatter": (name, R, 0, call.M, codec),
        "all_gather_gemm": (name, R, rank, 0, rows, codec, codec),
    }
    backward = getattr(torch.ops.tpkernels, f"{op}_backward")
    return lambda: backward(dy, x, w, True, True, False, *of[op])
