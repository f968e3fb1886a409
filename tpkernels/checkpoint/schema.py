"""The types of the fields of a manifest: one with a right digest may still have been written by another program.

All fields are checked before anything is loaded, so that no later reader finds one of another type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tpkernels.checkpoint.files import DTYPES
from tpkernels.errors import CheckpointError

DTYPE_NAMES = {str(dtype).removeprefix("torch.") for dtype in DTYPES}
MOST_BYTES = 1 << 62


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether a value of JSON is an integer from `least` to the largest int64."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 63


def is_shape(value: Any) -> bool:
    """Whether a value is the shape of a tensor that can exist."""
    if not isinstance(value, list) or not all(map(is_whole, value)):
        return False
    size = 1
    for n in value:
        size *= max(n, 1)
    return size < MOST_BYTES


def check_manifest(manifest: dict[str, Any]) -> None:
    """Check types, ranges and names of everything but the entries of tensors, which `Entry.from_json` checks.

    Raises:
        CheckpointError: a field has another type; names it, the expected type and the value.
    """
    for field, fits, expected in FIELDS:
        _need(field in manifest and fits(manifest[field]), field, expected, manifest.get(field))
    layout, tensors = manifest["layout"], manifest["tensors"]
    for size, otherwise in (("tp", None), ("dp", None), ("pp", 1)):
        number = layout.get(size, otherwise)
        _need(is_whole(number, 1), f"layout[{size!r}]", "a whole number of 1 or more", number)
    for name in tensors:
        kind, _, rest = name.partition("/")
        named = rest != "" if kind == "model" else kind == "optimizer" and "" not in rest.rpartition("/")
        _need(named, "tensors", "called model/<name> or optimizer/<parameter>/<field>", name)
    for second, first in manifest["aliases"].items():
        known = isinstance(first, str) and f"model/{first}" in tensors and f"model/{second}" not in tensors
        _need(known, f"aliases[{second!r}]", "the name of a tensor of the model", first)
    for file, own in manifest["own"].items():
        _check_own(f"own[{file!r}]", own)
    if manifest["optimizer"] is not None:
        _check_optimizer(manifest["optimizer"])


def _need(fits: bool, where: str, expected: str, got: Any) -> None:
    if not fits:
        text = repr(got)
        raise CheckpointError(f"the manifest's {where} must be {expected}, got {text[:60]}{'...' * (len(text) > 60)}")


def _is_map(value: Any) -> bool:
    return isinstance(value, dict)


FIELDS: list[tuple[str, Callable[[Any], bool], str]] = [
    ("step", lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number"),
    ("extra", _is_map, "a mapping"),
    ("layout", _is_map, "a mapping of tp and dp"),
    ("files", lambda v: _is_map(v) and all(isinstance(d, str) for d in v.values()), "{file: sha-256}"),
    ("tensors", lambda v: _is_map(v) and all(map(_is_map, v.values())), "{name: entry}"),
    ("own", lambda v: _is_map(v) and all(map(_is_map, v.values())), "{file: tensors of its own}"),
    ("aliases", _is_map, "{second name: first name}"),
    ("optimizer", lambda v: v is None or _is_map(v), "a mapping or null"),
]


def _check_own(where: str, own: dict[str, Any]) -> None:
    tensors: Any = own.get("tensors")
    _need(_is_map(tensors) and all(map(_is_map, tensors.values())), f"{where}['tensors']", "{name: kind}", tensors)
    _need("aggregator" in own, where, "with an aggregator, or null", list(own))
    for name, kind in tensors.items():
        known = isinstance(kind.get("dtype"), str) and kind["dtype"] in DTYPE_NAMES
        _need(known and is_shape(kind.get("shape")), f"{where}['tensors'][{name!r}]", "a dtype and a shape", kind)
    _need("rng/cpu" in tensors, f"{where}['tensors']", "with rng/cpu among them", list(tensors))


def _check_optimizer(optimizer: dict[str, Any]) -> None:
    groups: Any = optimizer.get("groups")
    state: Any = optimizer.get("state", {})
    _need(isinstance(optimizer.get("class"), str), "optimizer['class']", "a name", optimizer.get("class"))
    _need(isinstance(groups, list) and all(map(_is_map, groups)), "optimizer['groups']", "a list of mappings", groups)
    for number, group in enumerate(groups):
        names = group.get("params")
        where = f"optimizer['groups'][{number}]['params']"
        _need(isinstance(names, list) and all(isinstance(n, str) for n in names), where, "a list of names", names)
    _need(_is_map(state) and all(map(_is_map, state.values())), "optimizer['state']", "{parameter: numbers}", state)
