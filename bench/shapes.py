"""Sizes and shapes: the sweep of the goals, and the linears of real models cut down to two cores.

A GEMM is M x N x K as everywhere (x[M, K], w[N, K]); N or K is cut over the ranks by the op.
"""

from __future__ import annotations

import re
from typing import NamedTuple

UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
COLLECTIVE_BYTES = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20]


class Gemm(NamedTuple):
    """M tokens, N outputs, K inputs, before any cut."""

    M: int
    N: int
    K: int


class Vocab(NamedTuple):
    """M tokens, N words, K hidden (0 where there is no hidden dimension)."""

    M: int
    N: int
    K: int


class Rows(NamedTuple):
    """M tokens of N values."""

    M: int
    N: int


GEMMS = [Gemm(m, 4096, 4096) for m in (1, 16, 128, 512)]
SMALL_GEMMS = [Gemm(1, 64, 128), Gemm(4, 256, 512), Gemm(16, 512, 1024)]  # of two ranks half of K each
FEW_ROWS = [Gemm(m, n, k) for n, k in ((4096, 4096), (768, 576)) for m in (1, 2, 4, 8)]

# Published shapes with M, N and K cut to the sizes of a rank of 8, so that two cores finish.
MODELS = {
    "llama8b_down": Gemm(128, 4096, 14336),
    "llama70b_qkv/8": Gemm(512, 1280, 8192),
    "llama70b_down/8": Gemm(512, 8192, 3584),
    "gpt3_fc1/8": Gemm(512, 6144, 1536),
    "gpt3_fc2/8": Gemm(512, 1536, 6144),
    "qwen2_72b_down/8": Gemm(512, 1024, 3696),  # K / R is no multiple of 128
    "qwen3_32b_mlp/8": Gemm(512, 3200, 5120),
    "decode": Gemm(8, 7168, 3072),
}
NORMS = [Rows(m, 4096) for m in (1, 16, 128, 2048)]
VOCABS = [Vocab(512, 32_000, 512), Vocab(64, 128_256, 512), Vocab(2048, 256, 256)]


def parse_bytes(text: str) -> int:
    """'64KiB' -> 65536.

    Raises:
        ValueError: no number, or a unit that is not one of B, KiB, MiB, GiB.
    """
    match = re.fullmatch(r"(\d+)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in UNITS:
        raise ValueError(f"sizes: expected a number of bytes such as 4096, 64KiB or 1MiB, got {text!r}")
    return int(match[1]) * UNITS[match[2]]


def format_bytes(count: int) -> str:
    """65536 -> '64 KiB'."""
    for name, unit in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= unit and count % unit == 0:
            return f"{count // unit} {name}"
    return f"{count} B"


def parse_gemm(text: str) -> Gemm:
    """'16' -> 16 x 4096 x 4096; '8x1024x512' as it says; 'gpt3_fc1/8' by its name.

    Raises:
        ValueError: none of these.
    """
    if text in MODELS:
        return MODELS[text]
    numbers = text.lower().split("x")
    if not all(n.isdecimal() for n in numbers) or len(numbers) not in (1, 3):
        raise ValueError(f"sizes: expected M, MxNxK or one of {', '.join(MODELS)}, got {text!r}")
    return Gemm(*(int(n) for n in numbers)) if len(numbers) == 3 else Gemm(int(numbers[0]), 4096, 4096)


def parse_vocab(text: str) -> Vocab:
    """'512x32000x512': tokens, words, hidden.

    Raises:
        ValueError: anything else.
    """
    numbers = text.lower().split("x")
    if len(numbers) != 3 or not all(n.isdecimal() for n in numbers):
        raise ValueError(f"sizes: expected tokens x words x hidden such as 512x32000x512, got {text!r}")
    return Vocab(*(int(n) for n in numbers))


def parse_rows(text: str) -> Rows:
    """'16x4096': tokens x values.

    Raises:
        ValueError: anything else.
    """
    numbers = text.lower().split("x")
    if len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise ValueError(f"sizes: expected tokens x values such as 16x4096, got {text!r}")
    return Rows(*(int(n) for n in numbers))
