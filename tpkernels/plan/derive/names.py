"""Globs in the place of module names that differ in their numbers only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase


def generalise(styles: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    """Return {glob: style} that gives every module of `styles` its style, and no other of `names` any.

    Numbers become "*". Of several rules that match the last one counts, so the longer globs come later, and where
    layers differ (the first one has a table that the others lack) the exceptions follow with their names.
    """
    globs: dict[str, dict[str, int]] = {}
    for name, style in styles.items():
        counts = globs.setdefault(glob_of(name), {})
        counts[style] = counts.get(style, 0) + 1
    order = list(globs)
    order = sorted(
        order, key=lambda glob: sum(fnmatchcase(other.replace("*", "0"), glob) for other in order), reverse=True
    )
    plan = {glob: max(globs[glob], key=lambda style: globs[glob][style]) for glob in order}
    caught = {glob for glob in plan for name in names if name not in styles and fnmatchcase(name, glob)}
    plan = {glob: style for glob, style in plan.items() if glob not in caught}
    wrong = {name: style for name, style in styles.items() if resolve(plan, name) != style}
    plan |= wrong
    idle = {glob for glob in plan if not any(fnmatchcase(name, glob) for name in styles)}
    return {glob: style for glob, style in plan.items() if glob not in idle}


def resolve(plan: dict[str, str], name: str) -> str | None:
    """Return the style that a plan gives a module: that of the last rule which matches."""
    return next((style for glob, style in reversed(plan.items()) if fnmatchcase(name, glob)), None)


def glob_of(name: str) -> str:
    """Return a module name with "*" in the place of its numbers."""
    return ".".join("*" if re.fullmatch(r"\d+", part) else part for part in name.split("."))
