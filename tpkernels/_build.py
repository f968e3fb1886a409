"""What was built: read from the file that setup.py leaves next to the compiled module."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_FILE = Path(__file__).with_name("_build_info.json")


@dataclass(frozen=True)
class BuildInfo:
    """How the compiled part of tpkernels came to be.

    Attributes:
        version: of tpkernels.
        torch: the torch it was built against; it loads in torch 2.11 and later.
        python: the interpreter it was built for.
        compiler: name and version.
        flags: the options of the compiler.
        commit: of the checkout, with "+changes" where files differed from it; None outside a checkout.
        cuda: whether CUDA code was built.
        cuda_reason: why, or why not.
        cuda_archs: the GPUs that its kernels were compiled for, such as "sm_90a".
        nvcc: version of the CUDA compiler.
    """

    version: str
    torch: str
    python: str
    compiler: str
    flags: str
    commit: str | None
    cuda: bool
    cuda_reason: str
    cuda_archs: tuple[str, ...] = ()
    nvcc: str | None = None


@cache
def build_info() -> BuildInfo:
    """Say what was built, with what, and why without CUDA if so.

    Raises:
        RuntimeError: this is a source folder that was never built.
    """
    if not _FILE.exists():
        raise RuntimeError(f"tpkernels is not built: {_FILE} is missing. Run `pip install .`, or `make install`.")
    try:
        installed = version("tpkernels")
    except PackageNotFoundError:  # on PYTHONPATH and not installed
        installed = "unknown"
    known = {field.name for field in fields(BuildInfo)}
    built = {name: value for name, value in json.loads(_FILE.read_text()).items() if name in known}
    return BuildInfo(version=installed, **(built | {"cuda_archs": tuple(built.get("cuda_archs", ()))}))
