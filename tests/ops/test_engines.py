"""Which engine multiplies on which CPU, and that every one of them is right: all CPUs are tried on each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from tests.harness.gemms import SHAPES, sizes
from tests.harness.ops import assert_same_on_all_ranks, check_forward, check_gradient, on_cpu
from tpkernels._native import _C
from tpkernels.comm.group import Group
from tpkernels.testing.cases import GEMMS

CPUS = {"AMD, AVX-512": (True, True), "AMD, AVX2": (True, False), "AVX-512": (False, True), "AVX2": (False, False)}
LARGE = 2048  # N and K of weights that the caches do not hold
# dtype, M, N, K, and the engine on each of CPUS
RULES = [
    ("float32", 1, 64, 64, "gemv gemv gemv gemv"),
    ("float32", 8, 64, 64, "gemv gemv gemv gemv"),
    ("float32", 9, 64, 64, "onednn aten aten aten"),
    ("float32", 4096, 64, 64, "onednn aten aten aten"),
    ("float32", 8, LARGE, LARGE, "gemv gemv gemv gemv"),
    ("float32", 9, LARGE, LARGE, "onednn onednn aten aten"),
    ("float32", 128, LARGE, LARGE, "onednn onednn aten aten"),
    ("float32", 129, LARGE, LARGE, "onednn aten aten aten"),
    ("float32", 0, 64, 64, "aten aten aten aten"),
    ("float64", 1, 64, 64, "aten aten aten aten"),
    ("float16", 8, 64, 64, "gemv gemv gemv gemv"),
    ("float16", 9, 64, 64, "aten aten aten aten"),
    ("bfloat16", 1, 64, 64, "gemv gemv gemv gemv"),
    ("bfloat16", 8, 64, 64, "gemv gemv gemv gemv"),
    ("bfloat16", 9, 64, 64, "aten aten aten aten"),
]


def chosen(dtype: str, M: int, N: int, K: int) -> tuple[str, str]:
    """The engine and the reason, in a group that has measured nothing."""
    with Group.open() as group:
        group._communicator.forget_measured()
        return _C.choose_engine(group._communicator, dtype, M, N, K)


@contextmanager
def assumed(cpu: str) -> Iterator[None]:
    """The rule decides as on this CPU."""
    _C.assume_cpu(*CPUS[cpu])
    try:
        yield
    finally:
        _C.forget_assumed_cpu()


def wanted(engine: str) -> str:
    """The engine, as far as this torch has it."""
    return "aten" if engine == "onednn" and not torch.backends.mkldnn.is_available() else engine


@pytest.mark.parametrize("cpu", CPUS)
def test_the_rule_takes_the_engine_that_was_measured_fastest_on_that_cpu(cpu: str) -> None:
    with assumed(cpu):
        for dtype, M, N, K, engines in RULES:
            engine = wanted(engines.split()[list(CPUS).index(cpu)])
            assert chosen(dtype, M, N, K)[0] == engine, (dtype, M, N, K)


def test_without_onednn_aten_multiplies_and_says_so() -> None:
    with assumed("AMD, AVX-512"):
        _C.set_onednn_available(False)
        try:
            assert chosen("float32", 64, 64, 64) == ("aten", "this torch has no oneDNN")
        finally:
            _C.set_onednn_available(torch.backends.mkldnn.is_available())


def check_every_way(group: Group, cpu: str) -> None:
    """What explain says; forward and gradients of every GEMM; ranks of one group hold the same bits."""
    R = group.world_size
    with assumed(cpu):
        explained = group.explain("gemm_all_reduce", M=256, N=144, K=192)
        engine, why = _C.choose_engine(group._communicator, "float32", 256, 144, 192)
        assert f"GEMM by {engine} ({why})" in explained.reason
        assert explained.path == "unfused"
        for case in GEMMS:
            for shape in ("even", "uneven", "one", "no tokens", "large"):
                for dtype in (torch.float32, torch.bfloat16):
                    for bias in (True, False):
                        s = replace(sizes(R, shape), dtype=dtype, bias=bias)
                        y = check_forward(case, s, group)
                        if case.output_cut(s) is None:
                            assert_same_on_all_ranks(group, f"{case.name} {s}", y)
                        check_gradient(case, s, group)


@pytest.mark.parametrize("cpu", CPUS)
def test_products_are_right_whatever_the_rule_of_a_cpu_takes(cpu: str) -> None:
    assert "large" in SHAPES
    on_cpu(check_every_way, 2, "auto", cpu)


def test_an_assumed_cpu_is_forgotten() -> None:
    here = [chosen(*rule[:4]) for rule in RULES]
    for cpu in CPUS:
        with assumed(cpu):
            pass
        assert [chosen(*rule[:4]) for rule in RULES] == here
