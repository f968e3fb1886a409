"""Decide between a CPU and a CPU+CUDA build, say so in one line, and hand the compiling to CMake.

Thin on purpose: sources, flags and targets are in CMakeLists.txt, metadata in pyproject.toml. torch is located but
never imported (an import takes seconds and needs numpy).
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_INFO = "_build_info.json"
CPU_MODULE, C10D_MODULE, CUDA_MODULE = "tpkernels._C", "tpkernels._C_c10d", "tpkernels._C_cuda"


class Torch(NamedTuple):
    """The torch to build against, as its files describe it."""

    root: Path
    version: str
    cuda: str | None


class Decision(NamedTuple):
    """Whether CUDA code is built, and why (the reason is printed and kept for `tpkernels info`)."""

    cuda: bool
    reason: str


def find_torch() -> Torch:
    """Read the version of the installed torch without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("tpkernels: no torch in this environment. Install one (pip install torch), then build again.")
    root = Path(spec.origin).parent
    version = runpy.run_path(str(root / "version.py"))
    return Torch(root, str(version["__version__"]), version.get("cuda"))


def has_c10d(torch: Torch) -> bool:
    """Whether a back end for torch.distributed can be compiled: a torch without it has no such headers."""
    return (torch.root / "include/torch/csrc/distributed/c10d/Backend.hpp").exists()


def find_nvcc() -> str | None:
    """The CUDA compiler: on PATH, or below CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None)


def decide_cuda(wanted: str, nvcc: str | None, torch: Torch) -> Decision:
    """CUDA is on if and only if nvcc is found and torch has CUDA. A demand that cannot be met is an error.

    Args:
        wanted: the variable TPKERNELS_CUDA: "0", "1" or "auto".
        nvcc: path of the compiler, or None.
        torch: what the build is for.

    Raises:
        ValueError: another value, or "1" where something is missing (named).
    """
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"TPKERNELS_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return Decision(False, "TPKERNELS_CUDA is 0")
    missing = None
    if torch.cuda is None:
        missing = f"torch {torch.version} is built without CUDA"
    elif nvcc is None:
        missing = "nvcc is neither on PATH nor in CUDA_HOME"
    if missing is None:
        return Decision(True, f"nvcc is {nvcc} and torch {torch.version} has CUDA {torch.cuda}")
    if wanted == "1":
        raise ValueError(f"TPKERNELS_CUDA=1 demands a CUDA build, but {missing}")
    return Decision(False, missing)


def git_commit() -> str | None:
    """The commit that is built, with "+changes" where the checkout differs from it; None outside a checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "") if commit else None


def need(tool: str) -> str:
    """Path of a build tool, or a message that says how to get it."""
    path = shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))
    return path or sys.exit(f"tpkernels: {tool} is not on PATH. pip install {tool}, then build again.")


def decide() -> tuple[Torch, str | None, Decision]:
    """The torch and the nvcc of this environment, and whether CUDA code is built with them."""
    torch, nvcc = find_torch(), find_nvcc()
    return torch, nvcc, decide_cuda(os.environ.get("TPKERNELS_CUDA", "auto"), nvcc, torch)


class CMakeBuild(build_ext):
    """Build the modules by CMakeLists.txt: `_C`, `_C_c10d` where torch has c10d, and `_C_cuda` where CUDA is on."""

    def finalize_options(self) -> None:
        """Add the modules that there will be. Asked for metadata alone, there need not even be a torch."""
        with contextlib.suppress(ValueError):  # build_extension says what is wrong
            if find_spec("torch") is not None:
                torch, _, cuda = decide()
                more = {C10D_MODULE: has_c10d(torch), CUDA_MODULE: cuda.cuda}
                names = [CPU_MODULE, *(name for name, built in more.items() if built)]
                self.distribution.ext_modules = [Extension(name, sources=[]) for name in names]
        super().finalize_options()

    def build_extension(self, ext: Extension) -> None:
        """Configure and build in build/<python and torch>; put modules and build info into the package."""
        if ext.name != CPU_MODULE:
            return  # built with the first one
        python_include = sysconfig.get_path("include")
        if not Path(python_include, "Python.h").exists():
            sys.exit(f"tpkernels: no Python.h in {python_include}. Install Python's headers (Debian: python3-dev).")
        try:
            torch, nvcc, cuda = decide()
        except ValueError as error:
            sys.exit(f"tpkernels: {error}")
        what = "CPU + CUDA" if cuda.cuda else "CPU only"
        print(f"tpkernels: building {what} for torch {torch.version}, because {cuda.reason}", flush=True)

        module = Path(self.get_ext_fullpath(CPU_MODULE)).resolve()
        folder = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.version}"
        module.parent.mkdir(parents=True, exist_ok=True)
        options, targets = [f"-DTPKERNELS_CUDA={'ON' if cuda.cuda else 'OFF'}"], ["_C"]
        if has_c10d(torch):
            options += [f"-DTPKERNELS_C10D_MODULE_FILE={Path(self.get_ext_fullpath(C10D_MODULE)).resolve()}"]
            targets += ["_C_c10d"]
        else:
            print(f"tpkernels: no back end for torch.distributed: torch {torch.version} has no headers of c10d")
        if cuda.cuda:
            cuda_module = Path(self.get_ext_fullpath(CUDA_MODULE)).resolve()
            options += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DTPKERNELS_CUDA_MODULE_FILE={cuda_module}"]
            targets += ["_C_cuda"]
        self.spawn([
            need("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={need('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release", "-DTPKERNELS_MODULE=ON", f"-DTPKERNELS_TORCH={torch.root}",
            f"-DTPKERNELS_PYTHON_INCLUDE={python_include}", f"-DTPKERNELS_MODULE_FILE={module}", *options,
        ])  # fmt: skip
        self.spawn([need("cmake"), "--build", str(folder), "--target", *targets])
        built: dict[str, Any] = json.loads((folder / "compiler.json").read_text())
        built |= {"torch": torch.version, "python": sys.version.split()[0], "commit": git_commit()}
        built |= {"cuda": cuda.cuda, "cuda_reason": cuda.reason}
        built |= json.loads((folder / "cuda.json").read_text()) if cuda.cuda else {}
        module.with_name(BUILD_INFO).write_text(json.dumps(built, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        """For an editable install the build info belongs next to the modules, too."""
        for name in (CPU_MODULE, C10D_MODULE, CUDA_MODULE):  # in the checkout: setuptools builds in place
            Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)  # processes that run keep the old file mapped
        super().copy_extensions_to_source()
        info = Path(self.get_ext_fullpath(CPU_MODULE)).with_name(BUILD_INFO)
        shutil.copyfile(Path(self.build_lib, "tpkernels", BUILD_INFO), info)

    def get_outputs(self) -> list[str]:
        """Name every file that the build makes, so that the wheel's record is complete."""
        return [*super().get_outputs(), str(Path(self.build_lib, "tpkernels", BUILD_INFO))]


if __name__ == "__main__":
    setup(ext_modules=[Extension(CPU_MODULE, sources=[])], cmdclass={"build_ext": CMakeBuild})
