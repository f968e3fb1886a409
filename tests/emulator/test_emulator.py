"""What the emulator leaves out: the PTX of device.cuh. Counted in what nvcc makes of every kernel over peers.

The counts are in golden_ptx.json; after a change of a kernel `python -m tests.emulator.test_emulator` writes them anew:
look at the difference before you commit it. A kernel must not lose a release or an acquire, nor read what peers
have written by ld.global.nc, through a cache that does not hear of it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.harness.cuda_build import OBSTACLE, nvcc_release, ptx_of

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc/cuda/kernels"
GOLDEN = Path(__file__).with_name("golden_ptx.json")
INSTRUCTIONS = {
    "ld.acquire.sys": r"\bld\.acquire\.sys\b",
    "ld.relaxed.sys": r"\bld\.relaxed\.sys\b",
    "st.release.sys": r"\bst\.release\.sys\b",
    "st.relaxed.sys": r"\bst\.relaxed\.sys\b",
    "red.release.sys": r"\bred\.release\.sys\b",
    "atom.acq_rel.gpu": r"\batom\.acq_rel\.gpu\b",
    "fence.sys": r"\bfence\.(?:acq_rel|sc)\.sys\b|\bmembar\.sys\b",
    "fence.gpu": r"\bfence\.(?:acq_rel|sc)\.gpu\b|\bmembar\.gl\b",
    "fence.proxy.alias": r"\bfence\.proxy\.alias\b",
    "fence.proxy.async.global": r"\bfence\.proxy\.async\.global\b",
    "fence.proxy.async.shared": r"\bfence\.proxy\.async\.shared::cta\b",
    "cp.async.bulk": r"\bcp\.async\.bulk\.(?:shared::cluster\.global|global\.shared::cta)\b",
    "cp.async.bulk.tensor.store": r"\bcp\.async\.bulk\.tensor\.2d\.global\.shared::cta\b",
    "cp.async.bulk.wait_group": r"\bcp\.async\.bulk\.wait_group \d",
    "cp.async.bulk.wait_group.read": r"\bcp\.async\.bulk\.wait_group\.read\b",
    "ld.global.nc": r"\bld\.global(?:\.\w+)*\.nc\b",
    "ld.volatile": r"\bld\.volatile\b",
    "multimem": r"\bmultimem\.",
    "trap": r"\btrap;",
}

# {kernel: the counts of its instances, each once}, of one file.
Counts = dict[str, list[dict[str, int]]]


def over_peers() -> list[str]:
    """The files whose kernels exchange with other ranks."""
    talks = re.compile(r'#include "(?:peer|fused_block)\.cuh"')
    return sorted(path.name for path in KERNELS.glob("*.cu") if talks.search(path.read_text()))


def name_of(mangled: str) -> str:
    """The function's own name: the last of the (length, name) pairs that a mangled name starts with."""
    rest, last = mangled.removeprefix("_ZN").removeprefix("_Z"), mangled
    while found := re.match(r"\d+", rest):
        start, length = found.end(), int(found[0])
        last, rest = rest[start : start + length], rest[start + length :]
    return last


def counts_in(ptx: str) -> Counts:
    parts = re.split(r"\.entry (\w+)\(", ptx)
    counts: Counts = {}
    for mangled, body in zip(parts[1::2], parts[2::2], strict=True):
        of_entry = {name: len(re.findall(pattern, body)) for name, pattern in INSTRUCTIONS.items()}
        instances = counts.setdefault(name_of(mangled), [])
        found = {name: count for name, count in of_entry.items() if count > 0}
        if found not in instances:
            instances.append(found)
    return {name: sorted(instances, key=lambda c: sorted(c.items())) for name, instances in sorted(counts.items())}


def which(counts: Counts) -> dict[str, list[str]]:
    """The instructions of each kernel, however many there are."""
    return {name: sorted({key for one in instances for key in one}) for name, instances in counts.items()}


def test_names_and_counts_are_read_from_ptx() -> None:
    ptx = """
    .visible .entry _ZN3tpk4cuda12_GLOBAL__N_18two_shotIfEEvPT_(
        ld.acquire.sys.global.u32 %r1, [%rd1];  st.release.sys.global.u32 [%rd2], %r1;
    .visible .entry _ZN3tpk4cuda12_GLOBAL__N_18two_shotIdEEvPT_(
        ld.acquire.sys.global.u32 %r1, [%rd1];  ld.global.v4.nc.u32 {}, [%rd2]; trap;
    .visible .entry _Z5plainv(
        ld.global.u32 %r1, [%rd1];
    """
    assert name_of("_ZN3tpk4cuda12_GLOBAL__N_18two_shotIfEEvPT_") == "two_shot"
    assert counts_in(ptx) == {
        "plain": [{}],
        "two_shot": [
            {"ld.acquire.sys": 1, "ld.global.nc": 1, "trap": 1},
            {"ld.acquire.sys": 1, "st.release.sys": 1},
        ],
    }


@pytest.mark.nightly
@pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
@pytest.mark.parametrize("name", over_peers())
def test_ptx_of_a_kernel_over_peers_has_the_flags_it_had(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert name in golden["files"], f"{name} has no golden counts: run python -m tests.emulator.test_emulator"
    expected, counts = golden["files"][name], counts_in(ptx_of(name))
    assert which(counts) == which(expected)
    if nvcc_release() == golden["nvcc"]:  # others unroll differently
        assert counts == expected, "look at what changed, then run python -m tests.emulator.test_emulator"


def test_every_flag_that_is_raised_is_heard_and_no_peer_is_read_through_the_wrong_cache() -> None:
    golden = json.loads(GOLDEN.read_text())["files"]
    assert set(golden) == set(over_peers())
    for instructions in (found for counts in golden.values() for found in which(counts).values()):
        assert ("st.release.sys" in instructions) == ("ld.acquire.sys" in instructions)
        assert "ld.volatile" not in instructions
        if "ld.acquire.sys" in instructions:
            assert "ld.global.nc" not in instructions
        # Memory of a rank at its own address and at the switch's; what threads wrote and what is loaded as tiles.
        assert ("multimem" in instructions) == ("fence.proxy.alias" in instructions)
        # Staged by threads, stored by TMA: seen by it, read before its place is written again, written before its flag.
        if "cp.async.bulk.tensor.store" in instructions:
            stored = {"fence.proxy.async.shared", "cp.async.bulk.wait_group", "cp.async.bulk.wait_group.read"}
            assert stored <= set(instructions)
    assert all("cp.async.bulk.tensor.store" in found for found in which(golden["fused_gemm_sm90.cu"]).values())
    assert "fence.proxy.async.global" in which(golden["fused_gemm_sm90.cu"])["all_gather_gemm_kernel"]


def test_every_primitive_of_the_device_has_an_emulated_twin() -> None:
    real = re.sub(r"//.*", "", (KERNELS / "device.cuh").read_text())
    twins = (ROOT / "tests/csrc/emu/override/cuda/kernels/device.cuh").read_text()
    names = set(re.findall(r"__device__ __forceinline__ \w+ (\w+)(?:<\w+>)?\(", real))
    assert {"load_acquire_sys", "multicast_add16", "warp_max"} <= names
    assert {name for name in names if not re.search(rf"\b{name}\(", twins)} == set()


if __name__ == "__main__":
    files = {name: counts_in(ptx_of(name)) for name in over_peers()}
    GOLDEN.write_text(json.dumps({"nvcc": nvcc_release(), "files": files}, indent=2) + "\n")
    print(f"wrote {GOLDEN}")
