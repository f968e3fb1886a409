"""Files of this kind of machine in the user's folder of caches."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path


def cache_file(name: str, suffix: str, *key: object) -> Path:
    """Return a file of this kind of machine in the user's folder of caches.

    Args:
        name, suffix: of the file.
        key: what it depends on besides the CPU.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(repr([*_cpu(), *key]).encode()).hexdigest()[:16]
    return folder / "tpkernels" / f"{name}-{digest}{suffix}"


@cache
def _cpu() -> list[str]:
    """Vendor, family, model and flags of the CPU; empty on kinds of machines whose kernel lists none."""
    keys = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        pairs = [line.partition(":") for line in lines[: lines.index("")] if ":" in line]
        return [value.strip() for name, _, value in pairs if name.strip() in keys]
    return []


def replace_file(file: Path, text: str) -> None:
    """Write a file whose readers find the old text or the new one, and make its folder.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as new:
        new.write(text)
    os.replace(new.name, file)
