"""README.zh-CN.md has the commands, tables, numbers, names and links of README.md; every path in a document exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
FENCED = re.compile(r"^(?:<!-- ci: [^\n]*? -->\n)?```\w*\n.*?^```$", re.M | re.S)
MEASURED = re.compile(r"<!-- bench:\w+ -->\n.*?<!-- /bench -->", re.S)
# A path of the repository, in backticks, in a link or in a command; the end of one (`group.py`) in backticks alone.
PATH = re.compile(
    r"(?<![\w./-])(?:tpkernels|csrc|tests|docs|bench|scripts|examples|build_backend|\.ci)/[\w./-]*\w", re.ASCII
)
END_OF_PATH = re.compile(r"`([\w./-]+\.(?:py|pyi|h|cpp|cu|cuh|md|toml|jsonl))`", re.ASCII)


def texts() -> tuple[str, str]:
    if not (ENGLISH.exists() and CHINESE.exists()):
        pytest.skip("needs both README files, which a tree without documents lacks")
    return ENGLISH.read_text(), CHINESE.read_text()


def rest_of(text: str) -> str:
    return MEASURED.sub("", FENCED.sub("", text))


def tables(text: str) -> list[int]:
    """The number of lines of each table."""
    found = re.findall(r"(?:^\|.*\n)+", rest_of(text), re.M)
    return [table.count("\n") for table in found]


def names(text: str) -> list[str]:
    return sorted(re.findall(r"`([^`\n]+)`", rest_of(text)))


def links(text: str) -> list[str]:
    return sorted(set(re.findall(r"\]\(([^)]+)\)", rest_of(text))) - {"README.md", "README.zh-CN.md"})


def test_both_have_the_same_commands_and_programs() -> None:
    english, chinese = texts()
    assert FENCED.findall(english) == FENCED.findall(chinese)
    assert len(FENCED.findall(english)) >= 5


def test_both_have_the_same_measured_tables() -> None:
    english, chinese = texts()
    assert MEASURED.findall(english) == MEASURED.findall(chinese)
    assert MEASURED.findall(english)


def test_both_have_the_same_sections_tables_names_and_links() -> None:
    english, chinese = texts()
    assert len(re.findall(r"^## ", rest_of(english), re.M)) == len(re.findall(r"^## ", rest_of(chinese), re.M))
    assert tables(english) == tables(chinese)
    assert names(english) == names(chinese)
    assert links(english) == links(chinese)


@cache
def known_paths() -> set[str]:
    """Every tracked file and its folders, relative to the root."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]
    return {str(path) for file in files for path in (file, *file.parents)}


def missing_paths(text: str) -> set[str]:
    """The paths in a document that the repository does not have."""
    paths = known_paths()
    ends = {name for name in END_OF_PATH.findall(text) if not any(f"/{path}".endswith(f"/{name}") for path in paths)}
    return ends | (set(PATH.findall(text)) - paths)


def test_every_path_in_a_document_exists() -> None:
    missing = {name: missing_paths((ROOT / name).read_text()) for name in known_paths() if name.endswith(".md")}
    assert {name: sorted(found) for name, found in missing.items() if found} == {}


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("see `tpkernels/comm/group.py`, `csrc/core/` and `comm/group.py`", set()),
        ("see `tpkernels/group.py`", {"tpkernels/group.py"}),
        ("see `tpkernels/comm/no_such_folder/`", {"tpkernels/comm/no_such_folder"}),
        ("run `python scripts/no_such.py --all`", {"scripts/no_such.py"}),
        ("runs `no_such.cuh` under `torchrun file.py`", {"no_such.cuh"}),
        ("a word/tests/word and runs/bench are no paths", set()),
    ],
)
def test_a_path_that_does_not_exist_is_found(text: str, missing: set[str]) -> None:
    assert missing_paths(text) == missing


def test_ci_runs_every_page_that_has_commands() -> None:
    if not (ROOT / ".ci/run").exists():
        pytest.skip("needs .ci/run, which a tree without documents lacks")
    run = re.findall(r"[\w/.-]+\.md", (ROOT / ".ci/run").read_text())
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    with_commands = {str(p.relative_to(ROOT)) for p in pages if re.search(r"^```(?:sh|python)$", p.read_text(), re.M)}
    assert with_commands - {"docs/tutorial.md"} == set(run)  # test_tutorial.py runs that one
    assert len(run) > 5
