"""Calibration: a fit finds the machine that made its times, and what is measured is kept for later plans."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from tpkernels import planner
from tpkernels.cli import app
from tpkernels.comm.group import Group
from tpkernels.errors import UserError
from tpkernels.planner import Cluster, calibrate, hardware
from tpkernels.planner.calibrate import Calibrated, fit, line_through
from tpkernels.planner.hardware import calibrated_file, device, link
from tpkernels.planner.measured import VOCAB, Sizes, Times
from tpkernels.planner.recipe import WIRE_BYTES
from tpkernels.planner.terms import RAMP, TILE, all_reduce_s, head_s, layer_s
from tpkernels.testing import run_ranks

FEW = Sizes(
    rows=(16,), widths=(64,), layers=((1, 8, 128), (2, 16, 256)), left_out=((1, 16, 256),),
    messages=(1 << 10, 4 << 10, 16 << 10), copied=1 << 14, updated=1 << 12,
)  # fmt: skip


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of this machine's device, of few sizes that are quick to measure."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "Sizes", lambda: FEW)
    return calibrated_file("cpu")


def times_of(machine: Cluster, sizes: Sizes) -> Times:
    """What would be measured on a machine whose steps are those of the model of time."""
    d, alone = machine.device, replace(machine, ranks=1)

    def layer(size: tuple[int, int, int]) -> tuple[float, float]:
        return tuple(
            layer_s(m, calibrate._shape(size), calibrate._slice(size, m.ranks)).total for m in (alone, machine)
        )  # type: ignore[return-value]

    seconds = {
        (m, n, k): 2 * (k + RAMP) * (m * n + TILE / 2) / (d.gemm_rate * d.flops)
        for m, n, k in itertools.product(sizes.rows, sizes.widths, sizes.widths)
    }
    sequences, tokens, hidden = sizes.layers[-1]
    last = sizes.messages[-2]
    shape = replace(calibrate._shape(sizes.layers[1]), vocab=VOCAB)
    return Times(
        products=seconds,
        copy=8 * sizes.copied / d.memory_bandwidth,
        layers=[layer(size) for size in sizes.layers],
        left_out=[layer(size) for size in sizes.left_out],
        attention=7 * sequences * hidden * tokens**2 / (d.flash_rate * d.flops),
        head=head_s(alone, shape, calibrate._slice(sizes.layers[1], 1)).total,
        average=all_reduce_s(machine, 4 * sizes.updated, machine.ranks)
        + d.average_bytes * sizes.updated / (d.memory_rate * d.memory_bandwidth),
        update=d.optimizer_bytes * sizes.updated / (d.memory_rate * d.memory_bandwidth),
        packed={
            codec: all_reduce_s(machine, wire * sizes.updated, machine.ranks)
            + (d.average_bytes + 4 * d.grad_codec_passes[codec]) * sizes.updated / (d.memory_rate * d.memory_bandwidth)
            for codec, wire in WIRE_BYTES.items()
            if wire
        },
        messages={size: all_reduce_s(machine, size, machine.ranks) for size in sizes.messages},
        codecs={
            codec: all_reduce_s(machine, last * wire / 4, machine.ranks)
            + d.codec_passes[codec] * last / (d.memory_rate * d.memory_bandwidth)
            for codec, wire in WIRE_BYTES.items()
            if wire
        },
        resident=300 << 20,
    )


def test_a_fit_finds_the_machine_that_made_the_times() -> None:
    # The fastest product reaches all of `flops`, which is how a fit knows it.
    sizes = Sizes()
    reached = max(m * n * k / ((k + RAMP) * (m * n + TILE / 2)) for m, n, k in itertools.product(
        sizes.rows, sizes.widths, sizes.widths))  # fmt: skip
    true = replace(
        device("cpu"), flops=2e11, gemm_rate=1 / reached, memory_bandwidth=2e10, memory_rate=0.7, flash_rate=0.2,
        host_layer_s=3e-4, host_head_s=2e-4, host_call_s=4e-5, optimizer_bytes=30.0, average_bytes=12.0,
        codec_passes={codec: 3.0 + i for i, codec in enumerate(WIRE_BYTES)},
        grad_codec_passes={codec: 9.0 + i for i, codec in enumerate(WIRE_BYTES)}, per_node=4,
    )  # fmt: skip
    shm = replace(link("shm"), bandwidth=2e10, rate=0.5, latency_s=5e-6, hop_s=0.0)
    machine = Cluster(true, 4, 4, shm, shm)
    found = fit(times_of(machine, sizes), sizes, 4, true.memory)
    own = found.cluster.device
    for name in ("flops", "memory_bandwidth"):
        assert getattr(own, name) == pytest.approx(getattr(true, name)), name
    for name, near in (("gemm_rate", 0.1), ("flash_rate", 0.1), ("host_layer_s", 0.4), ("memory_rate", 0.4)):
        assert getattr(own, name) == pytest.approx(getattr(true, name), rel=near), name  # the prior moves them
    for mine, made in ((own.codec_passes, true.codec_passes), (own.grad_codec_passes, true.grad_codec_passes)):
        passes = {c: p / own.memory_rate for c, p in mine.items()}
        assert passes == pytest.approx({c: p / true.memory_rate for c, p in made.items() if c != "none"})
    for name in ("optimizer_bytes", "average_bytes"):
        assert getattr(own, name) / own.memory_rate == pytest.approx(getattr(true, name) / true.memory_rate), name
    assert (found.cluster.inside.rate, found.cluster.inside.latency_s) == pytest.approx((0.5, 5e-6))
    assert found.fitted < 5.0 and found.left_out < 5.0 and own.reserved == 300 << 20


def test_a_line_has_no_negative_part() -> None:
    assert line_through([(1.0, 5.0), (2.0, 7.0), (10.0, 23.0)]) == pytest.approx((3.0, 2.0))
    assert line_through([(1.0, 1.0), (2.0, 3.0)])[0] == 0.0  # the best line would begin at -1
    assert line_through([(1.0, 3.0), (2.0, 1.0)])[1] == 0.0


def measured_by_two(folder: str) -> Calibrated:
    with pytest.MonkeyPatch.context() as patch, Group.open() as ranks:
        patch.setenv("XDG_CACHE_HOME", folder)
        with Group.open(dist.new_subgroups(1)[0]) as alone:
            return calibrate.calibrate(ranks, alone, FEW)


def test_ranks_measure_together_and_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run_ranks(measured_by_two, 2, str(tmp_path))
    assert first.cluster.device == second.cluster.device and first.cluster.inside == second.cluster.inside
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if calibrated_file("cpu").is_file():  # where the ranks may use the same cores as this process
        two = planner.this_machine(2)
        for passes in (two.device.codec_passes, two.device.grad_codec_passes):
            assert passes.keys() == {"fp16", "bf16", "int8", "fp8"}
        assert two.inside.rate == pytest.approx(first.cluster.inside.rate, rel=1e-3)
    assert not math.isnan(first.left_out)


def test_what_was_measured_is_kept_with_its_sources_and_taken_by_later_plans(kept: Path) -> None:
    assert planner.this_machine(2) == planner.cluster("cpu", 2, per_node=2)
    shown = CliRunner().invoke(app, ["plan", "--calibrate", "--ranks", "1"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and str(kept) in shown.output, shown.output
    own = device(str(kept))
    assert own.per_node == 1 and own.flops > 0 and own.sources["flops"].startswith("measured ")
    assert own.sources["sum_chunks"] == device("cpu").sources["sum_chunks"]  # not measured: that of the shipped class
    assert own.errors["one_node"] > 0
    two = planner.this_machine(2)  # which share the one core
    assert two.device.flops == pytest.approx(own.flops / 2) and two.error[0] == own.errors["one_node"]
    four = planner.this_machine(4, "1gbit", hosts=4)
    assert four.device.flops == own.flops and four.between.key == "1gbit"
    with pytest.raises(UserError, match="ranks: expected a multiple of 2 hosts, got 3"):
        planner.this_machine(3, "1gbit", hosts=2)


def test_calibrating_takes_no_model_and_no_more_ranks_than_cores(kept: Path) -> None:
    for arguments in (["llama", "--calibrate"], ["--calibrate", "--ranks", str(hardware.cores() + 1)]):
        found = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})
        assert found.exit_code == 2 and "--calibrate takes no MODEL, and --ranks of 1 to" in found.output
    assert not kept.exists()
