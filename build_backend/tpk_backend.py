"""PEP 517 backend: setuptools, plus the answer to "where is torch?" and "are cmake and ninja here?".

A build must use the torch that it will run with. pip's isolation hides that torch from the build, and listing torch as
a build requirement would download another one, of several GB and perhaps of another version. So each hook first makes
the environment that pip installs into visible again (at the end of sys.path: isolated requirements keep precedence),
and torch is asked for only where that environment has none.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import build_meta

CMAKE_AT_LEAST = (3, 22)  # what cmake_minimum_required in CMakeLists.txt says
TORCH_AT_LEAST = "torch>=2.11"
Config = dict[str, Any] | None


def target_site_packages() -> list[str]:
    """Folders where the environment that runs pip keeps its packages, nearest first."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    config = Path(sys.prefix, "pyvenv.cfg")
    shares_base = not config.exists() or re.search(r"(?mi)^include-system-site-packages\s*=\s*true", config.read_text())
    if shares_base:
        folders += [*site.getsitepackages([sys.base_prefix]), site.getusersitepackages()]
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]


def show_torch() -> bool:
    """Make torch findable by find_spec; False where the target environment has none."""
    if find_spec("torch") is None:
        sys.path += [folder for folder in target_site_packages() if Path(folder, "torch", "version.py").exists()]
    return find_spec("torch") is not None


def tool_works(name: str, at_least: tuple[int, int] = (0, 0)) -> bool:
    """Whether `name` is on PATH, starts (a script of a hidden environment does not) and is new enough."""
    path = shutil.which(name)
    if path is None:
        return False
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"(\d+)\.(\d+)", answer.stdout)
    return answer.returncode == 0 and version is not None and (int(version[1]), int(version[2])) >= at_least


def build_requirements() -> list[str]:
    """What must come from the package index for a build here: nothing on most machines."""
    wanted = [] if show_torch() else [TORCH_AT_LEAST]
    wanted += [] if tool_works("cmake", CMAKE_AT_LEAST) else ["cmake>={}.{}".format(*CMAKE_AT_LEAST)]
    wanted += [] if tool_works("ninja") else ["ninja"]
    return wanted


def get_requires_for_build_wheel(config_settings: Config = None) -> list[str]:  # noqa: D103
    return build_meta.get_requires_for_build_wheel(config_settings) + build_requirements()


def get_requires_for_build_editable(config_settings: Config = None) -> list[str]:  # noqa: D103
    return build_meta.get_requires_for_build_editable(config_settings) + build_requirements()


def build_wheel(wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None) -> str:  # noqa: D103
    show_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None) -> str:  # noqa: D103
    show_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


# These do not compile, so setuptools' own hooks do.
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_sdist = build_meta.build_sdist
