"""The rules of the house that no compiler checks: who imports whom, how long files are, what is said in one place."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}
LONGEST_FILE = 400

# Imports point down: a package imports itself and those in front of it.
ORDER = [
    "_C", "errors", "_build", "_native", "shard", "comm", "c10d", "compress", "ops", "optimizers", "layers", "launch",
    "data_parallel", "checkpoint", "plan", "pipeline", "planner", "guards", "hf", "generate", "serve", "train", "cli",
    "testing", "__init__", "__main__",
]  # fmt: skip
# Modules that import an optional package, or torch's compiler: imported where they are used.
LATE = {
    "tpkernels.generate.compiled": "torch._inductor", "tpkernels.generate.decoders": "transformers",
    "tpkernels.generate.seq2seq": "transformers", "tpkernels.generate.staged": "transformers",
    "tpkernels.serve.command": "fastapi",
}  # fmt: skip


def tracked_files() -> list[Path]:
    """Every file that git knows; tests of an unpacked archive have none to look at."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def package_files() -> list[Path]:
    return sorted((ROOT / "tpkernels").rglob("*.py"))


def name_of(path: Path) -> str:
    """tpkernels/plan/api.py: "tpkernels.plan.api"; a package has its own name."""
    parts = path.with_suffix("").parts
    start = len(parts) - 1 - parts[::-1].index("tpkernels")
    return ".".join(parts[start:]).removesuffix(".__init__")


def imports(text: str, module: str, is_package: bool) -> Iterator[tuple[str, str, int, bool]]:
    """Every import of tpkernels in a module: (module, name or "", line, whether inside a function or under an if)."""
    tree = ast.parse(text)
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", node.lineno, node not in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: None if is_package else -1]
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from ((source, alias.name, node.lineno, node not in top) for alias in node.names)


def own_imports(path: Path) -> Iterator[tuple[str, str, int, bool]]:
    found = imports(path.read_text(), name_of(path), path.name == "__init__.py")
    return (row for row in found if row[0].partition(".")[0] == "tpkernels")


def part_of(module: str, name: str = "") -> str:
    """The part of ORDER that a module, or a name imported from the root, belongs to."""
    parts = [*module.split(".")[1:], name]
    return parts[0] if parts[0] in ORDER else "__init__"


def target(module: str, name: str, modules: set[str]) -> str:
    """The module that `from module import name` loads last."""
    return f"{module}.{name}" if f"{module}.{name}" in modules else module


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, directly or by way of others."""
    sorter = TopologicalSorter(arrows)
    try:
        sorter.prepare()
    except CycleError as error:
        return [error.args[1]]
    return []


def cmake_list(name: str) -> list[str]:
    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    found = re.search(rf"set\({name}\s+(.*?)\)", text, re.S)
    assert found, f"CMakeLists.txt has no list {name}"
    return found[1].split()


def emulated_tests() -> list[str]:
    files = (ROOT / "CMakeLists.txt", ROOT / "tests/csrc/planted_fused.cmake")
    text = re.sub(r"#.*", "", "".join(file.read_text() for file in files))
    calls = re.findall(r"tpk_emu_test\(\w+ (?:VARIANTS|NIGHTLY) [^)]*?SOURCES ([^)]*?)(?:LIBRARIES[^)]*)?\)", text)
    return [source for call in calls for source in call.split()]


# The lists of CMakeLists.txt, and those of them that know neither torch nor Python.
TORCH_FREE_LISTS = [
    "TORCH_FREE_SOURCES", "CUDA_KERNEL_SOURCES", "CUDA_HOPPER_SOURCES", "CUDA_HOST_SOURCES",
    "TEST_SOURCES", "EMU_SOURCES", "EMU_RACE_SOURCES",
]  # fmt: skip
MODULE_LISTS = ["MODULE_SOURCES", "CUDA_MODULE_SOURCES", "EMU_MODULE_SOURCES"]
C10D = cmake_list("C10D_MODULE_SOURCES")  # for one torch
TORCH_FREE = [*(source for name in TORCH_FREE_LISTS for source in cmake_list(name)), *emulated_tests()]
MODULES = [source for name in MODULE_LISTS for source in cmake_list(name)]
# Where headers are looked for that do not lie beside who includes them.
HEADERS = [ROOT / "csrc", ROOT / "tests/csrc", ROOT / "tests/csrc/emu"]
# What makes Python modules, or is the fast path from Python into one.
SPEAKS_PYTHON = {
    "csrc/python/module.cpp",
    "csrc/python/engines.cpp",
    "csrc/python/fast_gemm.cpp",
    "csrc/python/fast_packing.cpp",
    "csrc/python/bindings.cpp",
    "csrc/python/decode_step.cpp",
    "csrc/python/fast_path.cpp",
    "csrc/c10d/backend.cpp",
    "csrc/c10d/module.cpp",
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


PATHS = pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(ROOT / "tpkernels")))


def faults_of(path: Path) -> list[str]:
    """What the imports of a file do that they must not do."""
    module, faults = name_of(path), []
    mine = part_of(module) if module != "tpkernels" else "__init__"
    assert mine in ORDER, f"{path.name}: give {mine} a place in ORDER"
    for source, name, line, late in own_imports(path):
        part, where = part_of(source, name), f"{path.name}:{line}"
        if ORDER.index(part) > ORDER.index(mine):
            faults.append(f"{where}: {mine} imports {part}, which is above it")
        if late and target(source, name, set(LATE)) not in LATE:
            faults.append(f"{where}: an import of {source} that is not at the top")
        if (
            "_C" in (name, source.rpartition(".")[2])
            and source != "tpkernels._native"
            and module != "tpkernels._native"
        ):
            faults.append(f"{where}: only _native.py imports _C")
        private = [p for p in (*source.split("."), name) if p.startswith("_") and p not in ("_C", "_native", "_build")]
        if private and part != mine and not name.startswith("__"):
            faults.append(f"{where}: {private[-1]} of {part} is private")
    return faults


@PATHS
def test_imports_point_down_and_stand_at_the_top_and_respect_what_is_private(path: Path) -> None:
    assert faults_of(path) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("def f():\n    from tpkernels.layers import linear\n", "above"),
        ("from tpkernels import cli\n", "above"),
        ("from ..layers import base\n", "above"),
        ("if TYPE_CHECKING:\n    from tpkernels.comm.objects import gather\n", "not at the top"),
        ("def f():\n    from tpkernels.shard import part\n", "not at the top"),
        ("from tpkernels import _C\n", "only _native"),
        ("from tpkernels._C import limits\n", "only _native"),
        ("from tpkernels.shard import _attach\n", "private"),
    ],
)
def test_a_fault_of_imports_is_noticed(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "tpkernels" / "comm" / "group.py"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert any(fault in found for found in faults_of(file)), faults_of(file)


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {name_of(path): path for path in package_files()}
    arrows: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for source, imported, _, _ in own_imports(path):
            found = target(source, imported, set(modules))
            if found in modules and found != name and not name.startswith(f"{found}."):
                arrows[name].add(found)
    assert circles(arrows) == []
    arrows["tpkernels.shard"].add("tpkernels.cli.main")
    assert circles(arrows) != []


def test_importing_the_package_imports_nothing_optional() -> None:
    code = "import sys, tpkernels; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"transformers", "fastapi", "uvicorn", "matplotlib", "typer", "peft", "accelerate", "gguf"}


def test_at_most_a_dozen_files_stand_at_the_top_of_the_package() -> None:
    assert len(list((ROOT / "tpkernels").glob("*.py"))) <= 12


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
    assert set(TORCH_FREE) | set(MODULES) | set(C10D) == there


def test_sources_and_flags_are_listed_in_cmake_alone() -> None:
    for name in ("setup.py", "build_backend/tpk_backend.py", "Makefile", "pyproject.toml"):
        text = (ROOT / name).read_text()
        assert not re.search(r"csrc/[\w/]+\.cpp|-O[0-9s]\b|-std=|-march", text), name


@pytest.mark.parametrize("source", TORCH_FREE)
def test_torch_free_code_includes_neither_torch_nor_python(source: str) -> None:
    _, foreign = includes(ROOT / source)
    assert not {name for name in foreign if re.match(r"torch/|ATen/|c10/|pybind11/|Python\.h", name)}


def test_only_module_files_and_the_fast_path_include_python() -> None:
    for source in (*MODULES, *C10D):
        _, foreign = includes(ROOT / source)
        speaks = {name for name in foreign if re.match(r"pybind11/|Python\.h|torch/csrc/utils/pybind", name)}
        assert bool(speaks) == (source in SPEAKS_PYTHON), source


@pytest.mark.parametrize("source", MODULES)
def test_cpp_includes_only_stable_headers_of_torch(source: str) -> None:
    _, foreign = includes(ROOT / source)
    torch = {name for name in foreign if re.match(r"torch/|ATen/|c10/", name)}
    assert not {
        name for name in torch if not re.match(r"torch/(csrc/stable|csrc/inductor/aoti_torch|headeronly)/", name)
    }


@pytest.mark.parametrize(("folder", "allowed"), [("core", ["core"]), ("torch_side", ["core", "torch_side"])])
def test_what_both_back_ends_share_includes_neither_of_them(folder: str, allowed: list[str]) -> None:
    inside = [ROOT / "csrc" / name for name in allowed]
    for path in sorted((ROOT / "csrc" / folder).rglob("*")):
        if path.suffix in CODE:
            own, foreign = includes(path)
            outside = {str(header) for header in own if not any(header.is_relative_to(place) for place in inside)}
            outside |= {name for name in foreign if folder == "core" and name.startswith(("torch/", "ATen/", "c10/"))}
            assert not outside, f"{path.name} includes {outside}"


def test_only_tests_have_code_for_the_emulator() -> None:
    # The emulated build has files of tests/csrc/emu/override in place of some of csrc, which must be there.
    override = ROOT / "tests/csrc/emu/override"
    replaced = [path.relative_to(override) for path in sorted(override.rglob("*")) if path.is_file()]
    assert replaced and all((ROOT / "csrc" / path).exists() for path in replaced)
    for path in tracked_files():
        if path.suffix in CODE | {".txt"} and "tests" not in path.parts:
            text = path.read_text()
            assert "TPK_EMU" not in text, path
            near = re.findall(r'#include "([^"]+)"', text)
            assert not {file.name for file in replaced if file.name in near}, f"{path}: include by path from csrc"


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


# --- tests


def python_tests() -> dict[str, ast.Module]:
    """The module name and the syntax of every file below tests/."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in files}


def unused_checks(modules: dict[str, ast.Module]) -> list[str]:
    """Functions check_* that no test calls, names or registers by on_ranks."""
    used = {
        node.id if isinstance(node, ast.Name) else node.attr
        for tree in modules.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute)
    }
    found = []
    for name, tree in modules.items():
        run = {call for call in ("on_processes", "on_devices") if f"@{call}(globals())" in decorators(tree)}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("check_") and node.name not in used:
                registered = [d for d in node.decorator_list if ast.unparse(d).startswith("on_ranks(")]
                needs = {"on_devices"} if "devices=" in "".join(map(ast.unparse, registered)) else set()
                if not registered or not run >= {"on_processes", *needs}:
                    found.append(f"{name}.{node.name}")
    return found


def decorators(tree: ast.Module) -> set[str]:
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f"@{ast.unparse(decorator)}" for node in functions for decorator in node.decorator_list}


def imported_tests(modules: dict[str, ast.Module]) -> list[str]:
    """Imports of test modules by others."""
    return [
        f"{name} imports {source}"
        for name, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for source in [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        if source in modules and source.rpartition(".")[2].startswith("test_") and source != name
    ]


def test_every_check_is_run() -> None:
    assert unused_checks(python_tests()) == []


def test_what_tests_share_lies_in_the_harness() -> None:
    assert imported_tests(python_tests()) == []


@pytest.mark.parametrize(
    ("text", "unused"),
    [
        ("def check_a(): ...", True),
        ("def check_a(): ...\ndef test_a(): check_a()", False),
        ("@on_ranks(1)\ndef check_a(): ...", True),
        ("@on_ranks(1)\ndef check_a(): ...\n@on_processes(globals())\ndef test_a(run): run()", False),
        ("@on_ranks(1, devices=(2,))\ndef check_a(): ...\n@on_processes(globals())\ndef test_a(run): run()", True),
    ],
)
def test_a_check_that_is_not_run_is_noticed(text: str, unused: bool) -> None:
    assert unused_checks({"tests.test_x": ast.parse(text)}) == (["tests.test_x.check_a"] if unused else [])


def test_an_import_of_a_test_module_is_noticed() -> None:
    text = "from tests.a.test_b import f\nfrom tests.a import test_b"
    modules = {"tests.x": ast.parse(text), "tests.a.test_b": ast.parse("")}
    assert imported_tests(modules) == ["tests.x imports tests.a.test_b"] * 2
