"""`tpkernels info`: what was built, what this machine can run, and why something is off."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from tpkernels import _C
from tpkernels._build import build_info

# What the compiler's "arch=x86-64-v3" and "-v4" ask of a CPU, as /proc/cpuinfo spells it.
_V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_GIB = 1 << 30


def render() -> str:
    """Return the report as text, a line for each fact."""
    sections = {"built": _built(), "machine": _machine(), "can run": _can_run()}
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
    """Whether ranks of this machine can share memory, and the room there is or what is missing."""
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
        "CUDA": f"{'on' if built.cuda else 'off'}: {built.cuda_reason}",
        "module": str(_C.__file__),
    }


def _machine() -> dict[str, str]:
    model, flags = _cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = torch.cuda.device_count()
    no_gpu = f"none: torch {torch.__version__} is built without CUDA" if torch.version.cuda is None else "none found"
    return {
        "cpu": model,
        "cores": f"{cores} for this process, {os.cpu_count()} in all",
        "vector loops": vector_width(flags),
        "shared memory": shm_verdict()[1],
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "gpu": ", ".join(torch.cuda.get_device_name(i) for i in range(gpus)) or no_gpu,
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
        "ranks of several": "yes, transport group over gloo" if gloo else "no: this torch has no gloo",
        "GEMMs by": "oneDNN or aten, the faster one" if onednn else "aten: this torch has no oneDNN",
        "codecs": " ".join(codecs),
        "ops": f"{len(ops)} on CPU" + (" and CUDA" if build_info().cuda else ", none on CUDA: see CUDA above"),
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
