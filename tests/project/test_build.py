"""The decisions of a build, the facts that it records, and the scripts of CI."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from setuptools import Distribution

import tpkernels as tpk
from tpkernels.cli import info

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    """Import a file that belongs to no package; it does not run as __main__."""
    spec = importlib.util.spec_from_file_location("loaded_" + Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load("setup.py")
backend = load("build_backend/tpk_backend.py")
count_tests = load("scripts/count_tests.py")
readme_commands = load("scripts/readme_commands.py")

CPU_TORCH = setup.Torch(Path("torch"), "2.13.0+cpu", None)
CUDA_TORCH = setup.Torch(Path("torch"), "2.13.0+cu130", "13.0")
NVCC = "/toolkit/bin/nvcc"


def tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n" + script + "\n")
    path.chmod(0o755)


# ---- CPU or CPU + CUDA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nvcc", [None, NVCC])
@pytest.mark.parametrize("built_for", [CPU_TORCH, CUDA_TORCH])
def test_cuda_is_built_exactly_when_everything_it_needs_is_there(nvcc: str | None, built_for: Any) -> None:
    possible = nvcc is not None and built_for is CUDA_TORCH
    decision = setup.decide_cuda("auto", nvcc, built_for)
    assert decision.cuda == possible and decision.reason
    assert not setup.decide_cuda("0", nvcc, built_for).cuda
    if possible:
        assert setup.decide_cuda("1", nvcc, built_for).cuda
    else:
        with pytest.raises(ValueError, match="TPKERNELS_CUDA=1 demands a CUDA build, but"):
            setup.decide_cuda("1", nvcc, built_for)


@pytest.mark.parametrize(
    ("nvcc", "built_for", "reason"),
    [
        (None, CUDA_TORCH, "nvcc is neither on PATH nor in CUDA_HOME"),
        (NVCC, CPU_TORCH, "torch 2.13.0+cpu is built without CUDA"),
        (NVCC, CUDA_TORCH, "nvcc is /toolkit/bin/nvcc and torch 2.13.0+cu130 has CUDA 13.0"),
    ],
)
def test_the_decision_names_its_reason(nvcc: str | None, built_for: Any, reason: str) -> None:
    assert setup.decide_cuda("auto", nvcc, built_for).reason == reason


def test_another_value_of_the_variable_is_an_error() -> None:
    with pytest.raises(ValueError, match="TPKERNELS_CUDA must be 0, 1 or auto, got 'yes'"):
        setup.decide_cuda("yes", NVCC, CUDA_TORCH)


def test_nvcc_is_found_below_cuda_home_where_path_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path / "bin", "nvcc", "exit 0")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup.find_nvcc() == str(tmp_path / "bin" / "nvcc")
    monkeypatch.delenv("CUDA_HOME")
    assert setup.find_nvcc() is None


def test_setup_finds_torch_and_its_headers_without_importing_it() -> None:
    found = setup.find_torch()
    assert (found.version, found.cuda) == (torch.__version__, torch.version.cuda)
    assert (found.root / "include/torch/csrc/stable/library.h").exists()
    assert (found.root / "include/pybind11/pybind11.h").exists()
    program = "import runpy, sys; m = runpy.run_path('setup.py'); m['find_torch'](); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("cuda", [False, True])
def test_the_cuda_module_is_built_exactly_when_cuda_is_on(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    decision = setup.Decision(cuda, "for this test")
    monkeypatch.setattr(setup, "decide", lambda: (CUDA_TORCH, NVCC, decision))
    command = setup.CMakeBuild(Distribution({"ext_modules": [setup.Extension("tpkernels._C", sources=[])]}))
    command.ensure_finalized()
    assert [ext.name for ext in command.extensions] == ["tpkernels._C"] + ["tpkernels._C_cuda"] * cuda
    assert sum("_C_cuda" in path for path in command.get_outputs()) == cuda


def test_torchs_pybind11_is_included_where_it_refuses_the_stable_abi(tmp_path: Path) -> None:
    """torch 2.11 wraps it so."""
    (tmp_path / "pybind11").mkdir()
    for name in ("pybind11.h", "stl.h"):
        (tmp_path / "pybind11" / name).write_text("#ifdef TORCH_TARGET_VERSION\n#error refused\n#endif\n")
    source = tmp_path / "some.cpp"
    source.write_text('#include "python/pybind.h"\nstatic_assert(TORCH_TARGET_VERSION == 7);\n')
    command = ["g++", "-std=c++17", "-fsyntax-only", "-DTORCH_TARGET_VERSION=7", "-I", str(ROOT / "csrc"), "-I"]
    subprocess.run([*command, str(tmp_path), str(source)], check=True)
    includes = [path.name for path in (ROOT / "csrc").rglob("*.[hc]*") if "#include <pybind11/" in path.read_text()]
    assert includes == ["pybind.h"]


def test_metadata_can_be_asked_for_where_there_is_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    command = setup.CMakeBuild(Distribution({"ext_modules": [setup.Extension("tpkernels._C", sources=[])]}))
    command.ensure_finalized()
    assert [ext.name for ext in command.extensions] == ["tpkernels._C"]


# ---- the build backend -----------------------------------------------------------------------------------------------


def test_the_backend_asks_for_nothing_that_is_already_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "cmake", "echo cmake version 4.1.0")
    tool(tmp_path, "ninja", "echo 1.13.0")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    assert backend.build_requirements() == []


def test_the_backend_asks_for_torch_only_where_the_environment_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    monkeypatch.setattr(backend, "target_site_packages", list)
    assert backend.TORCH_AT_LEAST in backend.build_requirements()


def test_the_backend_shows_a_torch_that_isolation_hides() -> None:
    site = str(Path(torch.__file__).parent.parent)
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'build_backend')!r}); import tpk_backend as b\n"
        f"hidden = {site!r}; import setuptools; sys.path.remove(hidden); sys.path_importer_cache.clear()\n"
        "assert b.find_spec('torch') is None\n"
        "assert b.show_torch() and sys.path[-1] == hidden\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd="/", check=True)


@pytest.mark.parametrize("script", ["echo broken interpreter >&2; exit 1", "echo cmake version 3.10.2", "echo hello"])
def test_a_tool_that_is_broken_or_too_old_counts_as_missing(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path, "cmake", script)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    assert not backend.tool_works("cmake", backend.CMAKE_AT_LEAST)


def test_backend_and_cmake_agree_on_the_oldest_cmake() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    assert "cmake_minimum_required(VERSION {}.{})".format(*backend.CMAKE_AT_LEAST) in text


def test_the_source_archive_has_every_file_of_the_checkout(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {path for path in listed.split("\0") if path and (ROOT / path).exists()}
    for path in tracked:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    program = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    with tarfile.open(tmp_path / "dist" / done.stdout.split()[-1]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked <= packed, sorted(tracked - packed)


# ---- what was built --------------------------------------------------------------------------------------------------


def test_build_info_says_what_was_built_and_why() -> None:
    built = tpk.build_info()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert built.version == project["version"] == tpk.__version__
    assert "-O3" in built.flags and "-DNDEBUG" in built.flags
    assert built.compiler and built.python.startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert not built.cuda and built.cuda_reason


def test_a_folder_that_was_never_built_says_how_to_build(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tpkernels" / "_build.py", tmp_path)
    program = "import _build; _build.build_info()"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "RuntimeError: tpkernels is not built" in done.stderr and "pip install ." in done.stderr


def test_info_reports_build_machine_and_what_is_off() -> None:
    text = info.render()
    assert text.startswith(f"tpkernels {tpk.__version__}\n")
    for fact in (torch.__version__, tpk.build_info().compiler, "CUDA", "off:", "/dev/shm", "codecs", "none fp16 bf16"):
        assert fact in text


def test_info_says_whether_torch_distributed_has_the_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = "built for another torch"
    for obstacle, says in ((None, f"yes, back end {tpk.c10d.NAME}"), (lacks, f"no: {lacks}")):
        monkeypatch.setattr(tpk.c10d, "obstacle", lambda obstacle=obstacle: obstacle)
        (line,) = (line for line in info.render().splitlines() if line.startswith("  torch.distributed"))
        assert line.endswith(says)


def test_info_names_the_loops_that_a_cpu_gets() -> None:
    v3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
    v4 = v3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    assert info.vector_width(v4) == "AVX-512 (x86-64-v4)"
    assert info.vector_width(v4 - {"avx512vl"}) == info.vector_width(v3) == "AVX2 (x86-64-v3)"
    assert info.vector_width(v3 - {"fma"}) == "baseline"


def test_a_machine_without_shared_memory_is_told_so(tmp_path: Path) -> None:
    assert info.shm_verdict(tmp_path / "none") == (False, f"{tmp_path / 'none'} does not exist")
    assert info.shm_verdict(tmp_path)[0]


# ---- what CI trusts --------------------------------------------------------------------------------------------------

REPORT = """<testsuites><testsuite><testcase name="a"/><testcase name="b"/>
<testcase name="c"><skipped/></testcase>{more}</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("more", "floor", "status", "says"),
    [
        ("", 2, 0, "2 passed, 0 failed"),
        ("", 3, 1, "has 2 passed tests, there must be 3 or more"),
        ('<testcase name="d"><failure/></testcase>', 2, 1, "2 passed, 1 failed"),
        ('<testcase name="d"><error/></testcase>', 2, 1, "2 passed, 1 failed"),
    ],
)
def test_ci_fails_when_tests_failed_or_vanished(
    more: str, floor: int, status: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT.format(more=more))
    assert count_tests.main([f"{report}={floor}"]) == status
    assert says in capsys.readouterr().out


README = """
'''sh
echo one
'''

<!-- ci: skip, needs two machines -->
'''sh
exit 7
'''
<!-- ci: set ARGS="--minutes 1" -->
'''sh
echo "two $ARGS"
'''
'''python
print("three")
'''
'''
never run
'''
"""


def markdown(text: str) -> str:
    return text.replace("'''", "```")


def test_readme_blocks_run_in_order_unless_a_reason_says_otherwise(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(markdown(README))
    assert readme_commands.main(str(page)) == 0
    printed_text = capfd.readouterr().out
    assert re.findall(r"^(one|two .*|three|--.*skipped.*)$", printed_text, re.M) == [
        "one", "-- skipped, needs two machines: exit 7", "two --minutes 1", "three",
    ]  # fmt: skip
    assert "3 blocks" in printed_text


def test_a_readme_command_that_fails_or_is_missing_fails_ci(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(markdown("'''sh\nfalse\necho not reached\n'''\n"))
    assert readme_commands.main(str(page)) == 1
    printed = capfd.readouterr().out
    assert "exit status 1" in printed and "\nnot reached" not in printed
    page.write_text("nothing here\n")
    assert readme_commands.main(str(page)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "<!-- ci: skip -->\n'''sh\nx\n'''\n",
        "<!-- ci: skpi, why -->\n'''sh\nx\n'''\n",
        "<!-- ci: ranks two -->\n'''python\nx\n'''\n",
        "'''sh never\nx\n'''\n",
    ],
)
def test_a_readme_note_or_fence_that_is_not_understood_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="readme_commands"):
        readme_commands.blocks(markdown(text))


# ---- objects for an instruction set ----------------------------------------------------------------------------------


def weak_functions(objects: Path) -> list[str]:
    """Functions of an object file that the linker may take in place of those of another file."""
    listed = subprocess.run(["nm", "-C", "--defined-only", objects], capture_output=True, text=True, check=True).stdout
    return [line.partition(" W ")[2] for line in listed.splitlines() if " W " in line]


def test_no_function_of_an_instruction_set_is_taken_where_the_cpu_lacks_it() -> None:
    """The linker keeps one copy of a weak function: it must not come from a file compiled for AVX2 or AVX-512."""
    cmake = (ROOT / "CMakeLists.txt").read_text()
    sources = re.findall(r"set_source_files_properties\((csrc/\S+) PROPERTIES COMPILE_OPTIONS\s+\"?-m", cmake)
    assert {"csrc/core/moves_v3.cpp", "csrc/core/moves_v4.cpp"} < set(sources)
    built = [path for name in sources for path in ROOT.glob(f"build/*/CMakeFiles/torch_free.dir/{name}.o")]
    if not built:
        pytest.skip("needs the objects of a build in build/")
    assert {path.name.removesuffix(".o") for path in built} == {Path(name).name for name in sources}
    for path in built:
        assert not weak_functions(path), path


def test_weak_functions_are_found(tmp_path: Path) -> None:
    source = tmp_path / "two.cpp"
    source.write_text("inline int shared() { return 1; }\nstatic int own() { return 2; }\n"
                      "int (*both[])() = {shared, own};\n")  # fmt: skip
    subprocess.run(["g++", "-c", source, "-o", tmp_path / "two.o"], check=True)
    assert weak_functions(tmp_path / "two.o") == ["shared()"]
