"""The rules of the house that no compiler checks: who imports whom, how long files are, what is said in one place."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}
LONGEST_FILE = 400

# Imports point down: a module may import its own level and lower ones. Everything in a folder has the folder's level.
LEVELS = [
    {"_C", "_C_cuda", "_build", "errors"},
    {
        "choose",
        "connections",
        "device_exchange",
        "devices",
        "exchange",
        "group",
        "meeting",
        "opening",
        "peer",
        "process_groups",
        "rendezvous",
        "tune",
    },
    {"compress", "ops", "optimizers", "shard"},
    {"layers"},
    {"checkpoint", "ckpt_async", "ckpt_cuts", "ckpt_export", "ckpt_files", "ckpt_load", "ckpt_manifest", "ckpt_place"}
    | {"ckpt_reshard", "ckpt_residuals", "ckpt_room", "ckpt_schema", "ckpt_state"}
    | {
        "data_parallel",
        "derive",
        "derive_attention",
        "derive_calls",
        "derive_flow",
        "derive_groups",
        "derive_inputs",
        "derive_labels",
        "guards",
    }
    | {"derive_names", "derive_run", "plan", "plan_alibi", "plan_apply", "plan_attention", "plan_heads", "plan_units"}
    | {"plan_doors", "plan_experts", "plan_tokens"}
    | {
        "plan_layers",
        "plan_loss",
        "plan_alike",
        "plan_outputs",
        "plan_peft",
        "plan_peft_load",
        "plan_peft_refuse",
        "plan_random",
        "plan_refuse",
        "plan_save",
        "plan_sequence",
        "plan_shared",
        "plan_table",
        "plan_trainer",
        "plan_trainer_models",
    }
    | {"plan_styles", "plans", "ranks"},
    {
        "data",
        "gpt",
        "hf",
        "hf_files",
        "hf_fresh",
        "hf_gguf",
        "job",
        "launch",
        "layout",
        "parity",
        "progress",
        "replicas",
        "report",
        "runlog",
        "settings",
        "train",
    }
    | {"generate", "serve", "train"},
    {"__init__", "__main__", "cli", "cli_errors", "cli_plan", "cli_reshard", "cli_serve", "info", "testing"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def tracked_files() -> list[Path]:
    """Every file that git knows; tests of an unpacked archive have none to look at."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def package_files() -> list[Path]:
    return sorted((ROOT / "tpkernels").rglob("*.py"))


def imported_parts(path: Path) -> set[str]:
    """The parts of tpkernels that a file imports, also inside functions: {"ops", "group", ...}."""
    parts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            assert node.level == 1 and path.parent.name != "tpkernels", (
                f"{path.name}: only siblings in a folder by a dot"
            )
            continue
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("tpkernels.")}
    return parts


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "tpkernels").parts[0].removesuffix(".py")


def cmake_list(name: str) -> list[str]:
    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    found = re.search(rf"set\({name}\s+(.*?)\)", text, re.S)
    assert found, f"CMakeLists.txt has no list {name}"
    return found[1].split()


def emulated_tests() -> list[str]:
    files = (ROOT / "CMakeLists.txt", ROOT / "tests/csrc/planted_fused.cmake")
    text = re.sub(r"#.*", "", "".join(file.read_text() for file in files))
    calls = re.findall(r"tpk_emu_test\(\w+ VARIANTS [^)]*?SOURCES ([^)]*?)(?:KERNELS[^)]*)?\)", text)
    return [source for call in calls for source in call.split()]


# The lists of CMakeLists.txt, and those of them that know neither torch nor Python.
TORCH_FREE_LISTS = [
    "TORCH_FREE_SOURCES", "CUDA_KERNEL_SOURCES", "CUDA_HOPPER_SOURCES", "CUDA_NCCL_SOURCES", "CUDA_HOST_SOURCES",
    "TEST_SOURCES", "EMU_SOURCES", "EMU_RACE_SOURCES",
]  # fmt: skip
MODULE_LISTS = ["MODULE_SOURCES", "CUDA_MODULE_SOURCES", "EMU_MODULE_SOURCES"]
TORCH_FREE = [*(source for name in TORCH_FREE_LISTS for source in cmake_list(name)), *emulated_tests()]
MODULES = [source for name in MODULE_LISTS for source in cmake_list(name)]
# Where headers are looked for that do not lie beside who includes them.
HEADERS = [ROOT / "csrc", ROOT / "tests/csrc", ROOT / "tests/csrc/emu"]
# What makes Python modules, or is a short way from Python into one.
SPEAKS_PYTHON = {
    "csrc/module.cpp",
    "csrc/python_engines.cpp",
    "csrc/python_side.cpp",
    "csrc/short_way.cpp",
    "csrc/cuda/module.cpp",
    "csrc/cuda/python_device.cpp",
    "tests/csrc/emu/module_emu.cpp",
}


def includes(path: Path) -> tuple[set[Path], set[str]]:
    """All project headers that a C++ file reaches, and all headers of others that they or it include."""
    own, foreign, queue = set[Path](), set[str](), [path]
    while queue:
        current = queue.pop()
        text = current.read_text()
        foreign |= set(re.findall(r"#include <([^>]+)>", text))
        for name in re.findall(r'#include "([^"]+)"', text):
            places = [current.parent, *HEADERS]
            header = next((folder / name).resolve() for folder in places if (folder / name).exists())
            if header not in own:
                own.add(header)
                queue.append(header)
    return own, foreign


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(ROOT / "tpkernels")))
def test_imports_point_down(path: Path) -> None:
    assert part_of(path) in LEVEL, f"give {part_of(path)} a level in LEVELS"
    for part in imported_parts(path):
        assert part in LEVEL, f"{path.name} imports {part}, which has no level in LEVELS"
        assert LEVEL[part] <= LEVEL[part_of(path)], f"{part_of(path)} must not import {part}: it is above"


def test_an_import_that_points_up_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "shard.py"
    file.write_text("def f():\n    from tpkernels.layers import linear\n    from tpkernels import cli\n")
    assert imported_parts(file) == {"layers", "cli"}
    assert all(LEVEL[part] > LEVEL["shard"] for part in imported_parts(file))


def test_no_code_file_is_longer_than_four_hundred_lines() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in tracked_files() if path.suffix in CODE}
    assert {str(path): n for path, n in lines.items() if n > LONGEST_FILE} == {}


def test_cmake_builds_every_source_file_and_lists_none_that_is_gone() -> None:
    there = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "tests/csrc")
        for path in (ROOT / folder).rglob("*.c*")
        if path.suffix in (".cpp", ".cu")
    }
    assert set(TORCH_FREE) | set(MODULES) == there


def test_sources_and_flags_are_listed_in_cmake_alone() -> None:
    for name in ("setup.py", "build_backend/tpk_backend.py", "Makefile", "pyproject.toml"):
        text = (ROOT / name).read_text()
        assert not re.search(r"csrc/[\w/]+\.cpp|-O[0-9s]\b|-std=|-march", text), name


@pytest.mark.parametrize("source", TORCH_FREE)
def test_torch_free_code_includes_neither_torch_nor_python(source: str) -> None:
    _, foreign = includes(ROOT / source)
    assert not {name for name in foreign if re.match(r"torch/|ATen/|c10/|pybind11/|Python\.h", name)}


def test_only_module_files_and_the_short_way_speak_python_in_cpp() -> None:
    for source in MODULES:
        _, foreign = includes(ROOT / source)
        speaks = {name for name in foreign if re.match(r"pybind11/|Python\.h", name)}
        assert bool(speaks) == (source in SPEAKS_PYTHON), source


@pytest.mark.parametrize("source", MODULES)
def test_cpp_includes_only_stable_headers_of_torch(source: str) -> None:
    _, foreign = includes(ROOT / source)
    torch = {name for name in foreign if re.match(r"torch/|ATen/|c10/", name)}
    assert not {
        name for name in torch if not re.match(r"torch/(csrc/stable|csrc/inductor/aoti_torch|headeronly)/", name)
    }


def test_kernels_leave_ptx_to_device_cuh_and_launches_to_launch_h() -> None:
    for path in (ROOT / "csrc/cuda").rglob("*.cu*"):
        text = re.sub(r"//.*", "", path.read_text())
        assert "<<<" not in text, path.name
        assert path.name in ("device.cuh", "hopper.cuh") or not re.search(r"\basm\b|__CUDA_ARCH__", text), path.name


def test_there_are_at_most_three_environment_variables_of_our_own() -> None:
    names = {
        name
        for path in tracked_files()
        if path.suffix in CODE and "tests" not in path.parts
        for name in re.findall(r'"(TPK(?:ERNELS)?_[A-Z_]+)"', path.read_text())
    }
    assert len(names) <= 3, names


def test_no_file_names_a_place_on_one_machine_or_holds_unfinished_work() -> None:
    suspicious = re.compile("|".join([r"(?<![\w.])/(?:root|home|work)/", "TO" + "DO", "FIX" + "ME", "XX" + "X"]))
    found = []
    for path in tracked_files():
        if path.name == "LICENSE" or path.suffix in {".png", ".jsonl"}:
            continue  # not ours, or not text that people write
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if suspicious.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


def test_links_between_documents_lead_somewhere() -> None:
    for path in tracked_files():
        if path.suffix == ".md":
            for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", path.read_text()):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"
