"""Calibration: the ranks of this machine as the model of time knows them, kept as a device and a link.

The constants of layers are those with which `terms.layer_s` is nearest to layers of this library that were timed, and
their error is that of layers which were left out.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from statistics import mean, median

from tpkernels.comm.cache import replace_file
from tpkernels.comm.group import Group
from tpkernels.errors import UserError
from tpkernels.planner.hardware import Cluster, Device, calibrated_file, device, link
from tpkernels.planner.measured import HEAD_DIM, VOCAB, Sizes, Times, measure
from tpkernels.planner.recipe import WIRE_BYTES
from tpkernels.planner.shape import Shape
from tpkernels.planner.terms import RAMP, TILE, Slice, all_reduce_s, head_s, layer_s, memory_s, pointwise_s


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the a and b, none negative, of the a + b x that are nearest to (x, y) in the mean square of y's shares."""
    weights = [1 / y**2 for _, y in points]

    def total(value: Callable[[float, float], float]) -> float:
        return sum(w * value(x, y) for w, (x, y) in zip(weights, points, strict=True))

    one, x1, x2, y1, xy = total(lambda x, y: 1), total(lambda x, y: x), total(lambda x, y: x * x), total(
        lambda x, y: y
    ), total(lambda x, y: x * y)  # fmt: skip
    determinant = one * x2 - x1 * x1
    found = [(0.0, xy / x2), (y1 / one, 0.0)]
    if determinant > 0:
        a, b = (x2 * y1 - x1 * xy) / determinant, (one * xy - x1 * y1) / determinant
        found += [(a, b)] if a >= 0 <= b else []
    return min(found, key=lambda ab: total(lambda x, y: (ab[0] + ab[1] * x - y) ** 2))


def parts_of_layers(layers: Sequence[tuple[float, float, float]], usual: float) -> tuple[float, float, float]:
    """Return the a, b and c with which a products + b traffic + c is nearest to the times of layers.

    By a grid of a and b; the logarithms of a and of b / usual count, too, so that noise cannot make one vanish.

    Args:
        layers: seconds of the products, of the traffic as a copy, and of all of it.
        usual: b of the shipped class.
    """
    found, least = (1.0, usual, 0.0), math.inf
    for i, j in itertools.product(range(-20, 21), range(-60, 61)):
        a, b = math.exp(i / 40), usual * math.exp(j / 20)
        weights = sum(1 / t**2 for *_, t in layers)
        c = max(0.0, sum((t - a * p - b * m) / t**2 for p, m, t in layers) / weights)
        cost = 0.1 * (i / 40) ** 2 + 0.0005 * (j / 20) ** 2
        cost += mean(math.log((a * p + b * m + c) / t) ** 2 for p, m, t in layers)
        if cost < least:
            found, least = (a, b, c), cost
    return found


@dataclass(frozen=True)
class Calibrated:
    """A cluster of this machine's ranks by what was measured, and the mean absolute percentage errors on layers."""

    cluster: Cluster
    fitted: float
    left_out: float


def fit(times: Times, sizes: Sizes, ranks: int, memory: float) -> Calibrated:
    """Return the ranks of this machine as the model of time knows them.

    Args:
        memory: bytes of a rank.
    """
    peak = max(2.0 * m * n * k / s for (m, n, k), s in times.products.items())
    near = [2 * (k + RAMP) * (m * n + TILE / 2) / (peak * s) for (m, n, k), s in times.products.items()]
    bandwidth = 8.0 * sizes.copied / times.copy
    sequences, tokens, hidden = sizes.layers[-1]
    scores = 7.0 * sequences * (hidden // HEAD_DIM) * tokens**2 * HEAD_DIM
    own = replace(
        device("cpu"), per_node=ranks, flops=peak, gemm_rate=math.exp(mean(map(math.log, near))), memory=memory,
        memory_bandwidth=bandwidth, memory_rate=1.0, flash_rate=scores / (times.attention * peak),
        host_layer_s=0.0, host_head_s=0.0, host_call_s=0.0, reserved=float(times.resident),
    )  # fmt: skip
    shm = link("shm")
    if times.messages:
        latency, slope = line_through([(2 * (ranks - 1) / ranks * size, s) for size, s in times.messages.items()])
        slope = max(slope, 1 / (16 * bandwidth))  # of messages in caches, whose times are noise
        shm = replace(shm, bandwidth=bandwidth, rate=1 / (slope * bandwidth), latency_s=latency, hop_s=0.0)
    parts = []
    for size, (one, _) in zip(sizes.layers, times.layers, strict=True):
        traffic = pointwise_s(own, _shape(size), _slice(size, 1))
        parts.append((_predicted(Cluster(own, 1, 1, shm, shm), size, 1) - traffic, traffic, one))
    slower, slowness, launches = parts_of_layers(parts, 1 / device("cpu").memory_rate)
    own = replace(
        own, gemm_rate=own.gemm_rate / slower, flash_rate=own.flash_rate / slower, memory_rate=1 / slowness,
        host_layer_s=launches,
    )  # fmt: skip
    machine = Cluster(own, ranks, ranks, shm, shm)
    head = head_s(machine, replace(_shape(sizes.layers[1]), vocab=VOCAB), _slice(sizes.layers[1], 1)).total
    own = replace(
        own, host_head_s=max(0.0, times.head - head),
        optimizer_bytes=times.update * own.memory_rate * bandwidth / sizes.updated,
        average_bytes=(
            max(0.0, times.average - all_reduce_s(machine, 4.0 * sizes.updated, ranks)) * own.memory_rate * bandwidth
            / sizes.updated
        ),
        codec_passes=_codec_passes(times, sizes, machine),
    )  # fmt: skip
    own = replace(own, grad_codec_passes=_grad_codec_passes(times, sizes, replace(machine, device=own)))
    if ranks > 1:
        machine = replace(machine, device=own)
        pairs = zip(sizes.layers, times.layers, strict=True)
        more = [many - _predicted(machine, size, ranks) for size, (_, many) in pairs if not math.isnan(many)]
        own = replace(own, host_call_s=max(0.0, median(more or [0.0]) / (4 * math.log2(ranks))))
    machine = replace(machine, device=own)
    return Calibrated(machine, *(
        _error(machine, those, seconds) for those, seconds in
        ((sizes.layers, times.layers), (sizes.left_out, times.left_out))
    ))  # fmt: skip


def _codec_passes(times: Times, sizes: Sizes, machine: Cluster) -> dict[str, float]:
    """What an all-reduce takes longer than its bytes on the link do, in passes of the values from memory."""
    found, size, d = {}, float(sizes.messages[-2]), machine.device
    for codec, seconds in times.codecs.items():
        moved = all_reduce_s(machine, size * (WIRE_BYTES[codec] or d.value_bytes) / d.value_bytes, machine.ranks)
        found[codec] = max(0.0, seconds - moved) * d.memory_rate * d.memory_bandwidth / size
    return found


def _grad_codec_passes(times: Times, sizes: Sizes, machine: Cluster) -> dict[str, float]:
    """What an aggregator with a codec takes longer than its bytes on the link and its copies do, in passes."""
    found, values, d = {}, sizes.updated, machine.device
    for codec, seconds in times.packed.items():
        moved = all_reduce_s(machine, values * (WIRE_BYTES[codec] or d.value_bytes), machine.ranks)
        moved += memory_s(d, d.average_bytes * values)
        found[codec] = max(0.0, seconds - moved) / memory_s(d, d.value_bytes * values)
    return found


def _shape(size: tuple[int, int, int]) -> Shape:
    return Shape.gpt(1, size[2], size[2] // HEAD_DIM, VOCAB)


def _slice(size: tuple[int, int, int], tp: int) -> Slice:
    return Slice(size[0], size[1], tp, flash=True, value_bytes=4.0, wire_bytes=4.0)


def _predicted(machine: Cluster, size: tuple[int, int, int], tp: int) -> float:
    return layer_s(machine, _shape(size), _slice(size, tp)).total


def _error(machine: Cluster, sizes: Sequence[tuple[int, int, int]], seconds: Sequence[tuple[float, float]]) -> float:
    errors = [
        abs(_predicted(machine, size, tp) / s - 1)
        for size, pair in zip(sizes, seconds, strict=True)
        for tp, s in zip((1, machine.ranks), pair, strict=True)
        if not math.isnan(s)
    ]
    return 100 * mean(errors)


def calibrate(ranks: Group, alone: Group, sizes: Sizes | None = None) -> Calibrated:
    """Measure this machine's ranks and keep what was found for later plans; every rank calls this.

    Args:
        ranks: all ranks of this machine, CPU. alone: this rank.
        sizes: what is measured; None: about 20 seconds of it.

    Raises:
        UserError: the files cannot be written.
    """
    sizes = sizes or Sizes()
    times = measure(ranks, alone, sizes)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks.world_size
    found = fit(times, sizes, ranks.world_size, memory)
    if ranks.rank == 0:
        try:
            keep(found, times)
        except OSError as error:
            raise UserError(f"plan: the calibration cannot be kept: {error}") from None
    ranks.barrier()
    return found


def keep(found: Calibrated, times: Times) -> None:
    """Write the device and the link, which `hardware.this_machine` reads; other processes read old ones or new ones.

    Raises:
        OSError: the folder of caches cannot be written.
    """
    own, ranks = found.cluster.device, found.cluster.ranks
    measured = f"measured {datetime.now(UTC):%Y-%m-%d} on {ranks} rank{'s' * (ranks > 1)} at once"
    rates = [2e-9 * m * n * k / s for (m, n, k), s in times.products.items()]
    sources = {
        "flops": f"{measured}: the fastest of {len(rates)} fp32 products",
        "gemm_rate": f"{measured}: products of {min(rates):.0f} to {max(rates):.0f} GFLOP/s",
        "memory_bandwidth": f"{measured}: a copy, read and written",
        "memory": f"physical memory / {ranks}",
        "reserved": f"{measured}: resident after steps of a small layer",
        "flash_rate": f"{measured}: attention alone, forward and backward",
        "memory_rate": f"{measured}: layers forward and backward",
        "host_layer_s": f"{measured}: layers forward and backward",
        "host_head_s": f"{measured}: embedding, head and loss",
        "optimizer_bytes": f"{measured}: clipping and AdamW",
        "average_bytes": f"{measured}: an aggregator of gradients",
        "host_call_s": f"{measured}: layers over all ranks" if ranks > 1 else own.sources["host_call_s"],
    }
    figures = {key: (getattr(own, key), sources.get(key, own.sources[key])) for key in _FIGURES}
    file = calibrated_file("shm") if times.messages else None
    if file is not None:
        source = f"{measured}: all_reduce of " + ", ".join(
            f"{n >> 10} KiB {1e6 * s:.0f} us" for n, s in times.messages.items()
        )
        shm = found.cluster.inside
        text = _toml({"name": "shared memory of this machine", "of_node": False}, {
            "figures": {key: (getattr(shm, key), source) for key in ("bandwidth", "rate", "latency_s", "hop_s")},
        })  # fmt: skip
        replace_file(file, text)
    codecs = {name: (value, f"{measured}: all_reduce") for name, value in own.codec_passes.items()}
    packed = {name: (value, f"{measured}: an aggregator of gradients") for name, value in own.grad_codec_passes.items()}
    left_out = (found.left_out, "on layers of other sizes, forward and backward, when the machine was calibrated")
    head = {"name": "core of this machine", "per_node": own.per_node, "inside": "shm" if file is None else str(file)}
    replace_file(
        calibrated_file("cpu"),
        _toml(head, {
            "figures": figures, "codecs": codecs, "grad_codecs": packed, "error": {"one_node": left_out},
        })
    )  # fmt: skip
    device.cache_clear()
    link.cache_clear()


_FIGURES = tuple(
    field.name for field in fields(Device)
    if field.name not in (
        "name", "key", "per_node", "inside_link", "codec_passes", "grad_codec_passes", "errors", "sources",
    )
)  # fmt: skip


def _toml(head: Mapping[str, object], tables: Mapping[str, Mapping[str, tuple[float, str]]]) -> str:
    """A file of hardware; JSON's numbers, texts and truths are TOML's."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in head.items()]
    for name, figures in tables.items():
        lines += ["", f"[{name}]"] * bool(figures)
        for key, (value, source) in figures.items():
            lines.append(f"{key} = {{ value = {float(f'{value:.4g}')!r}, source = {json.dumps(source)} }}")
    return "\n".join(lines) + "\n"
