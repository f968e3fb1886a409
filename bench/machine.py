"""The machine of a row: a class that rows of like machines share, and the CPU in words and numbers."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")

# The widest of them names the class: what a product or a codec runs on depends on it.
ISAS = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2", "sve2": "SVE2", "sve": "SVE", "asimd": "NEON"}
VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel", "0x41": "Arm"}
# AMD's family, or the flag that tells two generations of a family apart.
ZEN = {"23": "Zen", "23 clwb": "Zen 2", "25": "Zen 3", "25 avx512f": "Zen 4", "26": "Zen 5"}


def fields(cpuinfo: str) -> dict[str, str]:
    """What the text says of its first core."""
    found: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found


def flags_of(found: dict[str, str]) -> set[str]:
    """Instruction sets; x86 calls them flags, arm64 features."""
    return set((found.get("flags") or found.get("Features") or "").split())


def machine_class(cpuinfo: str) -> str:
    """Vendor, generation where the vendor counts them by family, and ISA: "AMD Zen 4, AVX-512", "Intel, AMX".

    Args:
        cpuinfo: the text of /proc/cpuinfo.
    """
    found = fields(cpuinfo)
    flags, family = flags_of(found), found.get("cpu family", "")
    vendor = found.get("vendor_id") or found.get("CPU implementer") or "unknown"
    name = VENDORS.get(vendor, vendor)
    if vendor == "AuthenticAMD":
        zen = [ZEN[key] for key in (f"{family} {flag}" for flag in sorted(flags)) if key in ZEN]
        name += f" {next(iter(zen), ZEN.get(family, f'family {family}'))}"
    elif "CPU part" in found:
        name += f" part {found['CPU part']}"
    return ", ".join([name, *[isa for flag, isa in ISAS.items() if flag in flags][:1]])


def machine(cpuinfo: str | None = None) -> dict[str, Any]:
    """The CPU in words and numbers.

    Args:
        cpuinfo: the text of /proc/cpuinfo; None: that of this machine, if it has one.
    """
    if cpuinfo is None:
        cpuinfo = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else ""
    found = fields(cpuinfo)
    mhz = found.get("cpu MHz")
    return {
        "class": machine_class(cpuinfo),
        "cpu": f"{found.get('model name', platform.machine())} (family {found.get('cpu family', '?')}, "
        f"model {found.get('model', '?')})",
        "cores": len(os.sched_getaffinity(0)),
        "mhz": round(float(mhz)) if mhz else None,
        "virtual": "hypervisor" in flags_of(found),
    }
