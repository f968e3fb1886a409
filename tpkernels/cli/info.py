"""`tpkernels info`: the build, the machine, and the reasons for everything that is off."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tpkernels import c10d
from tpkernels._build import build_info
from tpkernels._native import _C
from tpkernels.comm.devices import cuda_facts, load_cuda

# The CPU features of the compiler's "arch=x86-64-v3" and "-v4", as in /proc/cpuinfo.
_V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_GIB = 1 << 30


def render() -> str:
    """Return the report as text, a line for each fact."""
    sections = {"built": _built(), "machine": _machine(), "cuda": _cuda(), "can run": _can_run()}
    width = max(len(name) for facts in sections.values() for name in facts)
    lines = [f"tpkernels {build_info().version}"]
    for title, facts in sections.items():
        lines += ["", title, *(f"  {name:<{width}}  {fact}" for name, fact in facts.items())]
    return "\n".join(lines)


def vector_width(flags: set[str]) -> str:
    """Name the version of the vector loops that runs on a CPU with these flags (the loader picks by the same rule)."""
    if flags >= _V4:
        return "AVX-512 (x86-64-v4)"
    return "AVX2 (x86-64-v3)" if flags >= _V3 else "baseline"


def shm_verdict(folder: Path = Path("/dev/shm")) -> tuple[bool, str]:
    """Whether ranks of this machine can share memory, and the free space or the obstacle."""
    if not folder.is_dir():
        return False, f"{folder} does not exist"
    if not os.access(folder, os.W_OK | os.X_OK):
        return False, f"{folder} is not writable"
    room = os.statvfs(folder)
    free, size = room.f_bavail * room.f_frsize / _GIB, room.f_blocks * room.f_frsize / _GIB
    return free > 0, f"{free:.1f} of {size:.1f} GiB free in {folder}"


def _built() -> dict[str, str]:
    built = build_info()
    return {
        "for torch": f"{built.torch} and every later one from 2.11 on",
        "for python": built.python,
        "by": built.compiler,
        "flags": built.flags,
        "commit": built.commit or "none: not built in a git checkout",
        "CUDA": _cuda_build(),
        "module": str(_C.__file__),
    }


def _cuda_build() -> str:
    built = build_info()
    made = [" ".join(built.cuda_archs) and f"for {' '.join(built.cuda_archs)}", built.nvcc and f"by nvcc {built.nvcc}"]
    how = ", ".join(part for part in made if part)
    return f"{'on' if built.cuda else 'off'}: {built.cuda_reason}{f' ({how})' if how else ''}"


def _cuda() -> dict[str, str]:
    """CUDA on this machine, and the first reason why it cannot be used."""
    facts = cuda_facts()
    driver = "none" if facts.driver is None else f"supports CUDA up to {facts.driver[0]}.{facts.driver[1]}"
    _, obstacle = load_cuda()
    rows = {"usable": "yes" if obstacle is None else f"no: {obstacle}", "driver": driver}
    if facts.gpus == 0:
        return rows | {"gpus": "none that torch sees"}
    peers = range(facts.gpus)
    rows["gpus"] = "; ".join(f"{i}: {_gpu(i)}" for i in peers)
    rows["peer access"] = peer_access(facts.gpus, torch.cuda.can_device_access_peer)
    rows["multicast"] = "yes" if all(_has_multicast(i) for i in peers) else "no"
    rows["NCCL"] = ".".join(map(str, _nccl_version())) if torch.distributed.is_nccl_available() else "not in this torch"
    return rows


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name} (sm_{found.major}{found.minor}, {found.total_memory / _GIB:.0f} GiB)"


def peer_access(count: int, reaches: Callable[[int, int], bool]) -> str:
    """The GPUs whose memory each GPU can access, as one line."""
    if count == 1:
        return "one GPU"
    rows = {i: [j for j in range(count) if j != i and reaches(i, j)] for i in range(count)}
    if all(len(row) == count - 1 for row in rows.values()):
        return "every GPU reaches every other one"
    return "; ".join(f"{i} reaches {' '.join(map(str, row)) or 'none'}" for i, row in rows.items())


def _has_multicast(index: int) -> bool:
    from torch._C._distributed_c10d import _SymmetricMemory

    kinds: Any = torch._C._autograd.DeviceType
    return bool(_SymmetricMemory.has_multicast_support(kinds.CUDA, index))


def _nccl_version() -> tuple[int, ...]:
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return version


def _machine() -> dict[str, str]:
    model, flags = _cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model,
        "cores": f"{cores} for this process, {os.cpu_count()} in all",
        "vector loops": vector_width(flags),
        "shared memory": shm_verdict()[1],
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
    }


def _can_run() -> dict[str, str]:
    shm, why = shm_verdict()
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    onednn = torch._C._has_mkldnn
    ops = [name.removeprefix("tpkernels::") for name in torch._C._dispatch_get_all_op_names()
           if name.startswith("tpkernels::")]  # fmt: skip
    codecs = ["none", *(str(name) for name, *_ in _C.codecs())]
    return {
        "ranks of one machine": f"yes, transport shm: {why}" if shm else f"only through a process group: {why}",
        "ranks of several": "yes, transports group and hierarchical" if gloo else "no: this torch has no gloo",
        "torch.distributed": f"no: {obstacle}" if (obstacle := c10d.obstacle()) else f"yes, back end {c10d.NAME}",
        "GEMMs by": "gemv up to 8 rows, " + ("oneDNN or aten, the faster one" if onednn else "aten: no oneDNN"),
        "codecs": " ".join(codecs),
        "ops": f"{len(ops)} on CPU" + (" and CUDA" if load_cuda()[0] else ", none on CUDA: see cuda above"),
    }


def _cpu() -> tuple[str, set[str]]:
    """Model name and feature flags of the first core."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found.get("model name") or platform.processor() or platform.machine(), set(found.get("flags", "").split())
