"""The class of a machine from texts like those of /proc/cpuinfo."""

from __future__ import annotations

import pytest

from bench.machine import machine, machine_class

AVX2 = "fpu sse4_2 avx avx2 clwb"
AVX512 = f"{AVX2} avx512f avx512bw avx512_bf16"


def x86(vendor: str, family: int, model: int, flags: str) -> str:
    """Two cores, as Linux lists them."""
    core = (f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: Some CPU: fast\n"
            f"cpu MHz\t\t: 2595.124\nflags\t\t: {flags}\n")  # fmt: skip
    return f"processor\t: 0\n{core}\nprocessor\t: 1\n{core}\n"


ARM = (
    "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd {more}\nCPU implementer\t: {by}\nCPU part\t: {part}\n\n"
)


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (x86("AuthenticAMD", 23, 1, "avx2"), "AMD Zen, AVX2"),
        (x86("AuthenticAMD", 23, 49, AVX2), "AMD Zen 2, AVX2"),
        (x86("AuthenticAMD", 25, 1, AVX2), "AMD Zen 3, AVX2"),
        (x86("AuthenticAMD", 25, 17, AVX512), "AMD Zen 4, AVX-512"),
        (x86("AuthenticAMD", 26, 2, AVX512), "AMD Zen 5, AVX-512"),
        (x86("AuthenticAMD", 99, 2, AVX512), "AMD family 99, AVX-512"),
        (x86("GenuineIntel", 6, 173, f"{AVX512} amx_bf16 amx_tile"), "Intel, AMX"),
        (x86("GenuineIntel", 6, 85, AVX512), "Intel, AVX-512"),
        (x86("GenuineIntel", 6, 79, AVX2), "Intel, AVX2"),
        (x86("CentaurHauls", 7, 59, "sse4_2"), "CentaurHauls"),
        (ARM.format(more="sve", by="0x41", part="0xd40"), "Arm part 0xd40, SVE"),
        (ARM.format(more="sve sve2", by="0x41", part="0xd4f"), "Arm part 0xd4f, SVE2"),
        (ARM.format(more="aes", by="0xc0", part="0xac3"), "0xc0 part 0xac3, NEON"),
        ("", "unknown"),
    ],
)
def test_vendor_generation_and_instructions_name_the_class(cpuinfo: str, name: str) -> None:
    assert machine_class(cpuinfo) == name
    assert machine(cpuinfo)["class"] == name


def test_a_machine_is_said_in_words_and_numbers_also_where_little_is_known() -> None:
    known = machine(x86("AuthenticAMD", 25, 17, f"{AVX512} hypervisor"))
    assert (known["cpu"], known["mhz"], known["virtual"]) == ("Some CPU: fast (family 25, model 17)", 2595, True)
    unknown = machine("")
    assert unknown["mhz"] is None and unknown["virtual"] is False and unknown["cores"] >= 1
    assert machine()["class"]
