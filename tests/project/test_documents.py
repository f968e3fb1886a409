"""README.zh-CN.md says the same as README.md: the same commands, tables, numbers, names and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
FENCED = re.compile(r"^(?:<!-- ci: [^\n]*? -->\n)?```\w*\n.*?^```$", re.M | re.S)
MEASURED = re.compile(r"<!-- bench:\w+ -->\n.*?<!-- /bench -->", re.S)


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
    assert len(FENCED.findall(english)) > 8


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
