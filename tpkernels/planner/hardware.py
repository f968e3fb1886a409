"""Devices and links as data: a TOML file of data/ each, in which every figure has its source."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from tpkernels.comm.cache import cache_file
from tpkernels.errors import UserError

DATA = Path(__file__).parent / "data"
CODEC_PASSES = 4.0  # to pack values, and to unpack and sum as many: read and written twice each


@dataclass(frozen=True)
class Device:
    """What computes: a GPU, or the cores of one CPU rank.

    Attributes:
        name, key: for people, and of its file.
        per_node: devices that share a node.
        inside_link: the key of the link inside a node.
        flops, memory_bandwidth, memory: by its data sheet, per second and in bytes.
        reserved: bytes that no tensor can have.
        processors: that compute tiles of a product at the same time.
        value_bytes: of a value it computes with.
        gemm_rate, memory_rate, unaligned_rate, flash_rate: shares of those figures that kernels reach.
        launch_norm: 1 where launches take the device's own time, more where they are beside it (`terms.together`).
        host_layer_s: of the host's launches, a layer without tensor parallelism, forward and backward.
        host_call_s: of a collective, times log2 of its ranks.
        host_head_s: of the head and loss of one micro-batch.
        sum_chunks: pieces in which a product and the sum of its results over tp go side by side; 1 sums afterwards.
        skew_s: that ranks wait for the latest, a collective, times log2 of its ranks.
        send_s: latency of a message between stages.
        optimizer_bytes: moved for each parameter.
        average_bytes: moved for each parameter to and from the messages in which replicas average gradients.
        codec_passes: {codec: passes of its values from memory that it takes}; CODEC_PASSES of one that is not there.
        grad_codec_passes: as many of gradients, what packing loses kept; `codec_passes` of one that is not there.
        errors: {what: mean absolute percentage error on measurements of this class}.
        sources: {figure: where it is from}.
    """

    name: str
    key: str
    per_node: int
    inside_link: str
    flops: float
    memory_bandwidth: float
    memory: float
    reserved: float
    processors: float
    value_bytes: float
    gemm_rate: float
    memory_rate: float
    unaligned_rate: float
    flash_rate: float
    launch_norm: float
    host_layer_s: float
    host_call_s: float
    host_head_s: float
    sum_chunks: float
    skew_s: float
    send_s: float
    optimizer_bytes: float
    average_bytes: float
    codec_passes: dict[str, float] = field(default_factory=dict)
    grad_codec_passes: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Link:
    """What connects devices of a node, or nodes.

    Attributes:
        name, key: for people, and of its file.
        bandwidth: bytes per second and direction of one device, or of one node.
        of_node: whether the devices of a node share `bandwidth`.
        rate: the share of it that collectives reach.
        latency_s, hop_s: a collective of n ranks starts in latency_s + (n - 1) hop_s.
        burst: bytes that pass at once after a pause: of a link that a token bucket shapes.
        sources: {figure: where it is from}.
    """

    name: str
    key: str
    bandwidth: float
    of_node: bool
    rate: float
    latency_s: float
    hop_s: float
    burst: float = 0.0
    sources: dict[str, str] = field(default_factory=dict)

    def latency(self, ranks: int) -> float:
        """Return the time that a collective of no bytes takes."""
        return self.latency_s + (ranks - 1) * self.hop_s if ranks > 1 else 0.0

    def rate_of(self, per_node: int) -> float:
        """Return the bytes per second of one device when all of a node send."""
        return self.rate * self.bandwidth / (per_node if self.of_node else 1)


@dataclass(frozen=True)
class Cluster:
    """Some devices, the link inside their nodes and the one between.

    Attributes:
        device: of all of them.
        ranks: how many.
        per_node: how many share a node.
        inside, between: the links.
    """

    device: Device
    ranks: int
    per_node: int
    inside: Link
    between: Link

    @property
    def node_bandwidth(self) -> float:
        """Bytes per second that a node sends to others in collectives."""
        return self.between.rate_of(self.per_node) * self.per_node

    def spread(self, ranks: int, stride: int = 1) -> tuple[int, int]:
        """Return (ranks of a group inside one node, nodes) of a group whose ranks are `stride` apart."""
        inside = max(1, min(ranks, self.per_node // stride))
        return inside, -(-ranks // inside)

    @property
    def error(self) -> tuple[float | None, str]:
        """The mean absolute percentage error known of this class of machine, None if nothing is, and what it is of."""
        known, what = self.device.errors, "many_nodes" if self.ranks > self.per_node else "one_node"
        what = what if what in known else next(iter(known), "")
        if not what:
            return None, f"nothing measured is known of {self.device.name} in this project"
        return known[what], self.device.sources[f"error {what}"]


def _tables(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"plan: {file.name} is no description of hardware: {error}") from None


def _figures(data: dict[str, Any], file: Path) -> tuple[dict[str, float], dict[str, str]]:
    """The values and the sources of every figure of a file."""
    values: dict[str, float] = {}
    sources: dict[str, str] = {}
    for key, figure in data.items():
        if not isinstance(figure, dict) or not isinstance(figure.get("value"), int | float) or not figure.get("source"):
            raise UserError(f"plan: {file.name}: {key}: expected {{ value = number, source = text }}, got {figure!r}")
        values[key], sources[key] = float(figure["value"]), str(figure["source"])
    return values, sources


def keys(kind: str) -> list[str]:
    """Return the keys of all "devices" or "links"."""
    return sorted(file.stem for file in (DATA / kind).glob("*.toml"))


def _file(kind: str, key: str) -> Path:
    file = Path(key) if key.endswith(".toml") else DATA / kind / f"{key}.toml"
    if not file.is_file():
        raise UserError(f"plan: expected one of the {kind} {', '.join(keys(kind))}, or a .toml file, got {key!r}")
    return file


@cache
def device(key: str) -> Device:
    """Return a device.

    Args:
        key: the name of a file of data/devices, or the path of another.

    Raises:
        UserError: there is none, or its file is wrong.
    """
    file = _file("devices", key)
    data = _tables(file)
    constants, sources = _figures(_tables(DATA / "constants.toml"), DATA / "constants.toml")
    figures, own = _figures(data.get("figures", {}), file)
    errors, found = _figures(data.get("error", {}), file)
    codecs, packing = _figures(data.get("codecs", {}), file)
    grad_codecs, averaging = _figures(data.get("grad_codecs", {}), file)
    sources |= own | {f"error {what}": source for what, source in found.items()}
    sources |= {f"codec {name}": source for name, source in packing.items()}
    sources |= {f"grad_codec {name}": source for name, source in averaging.items()}
    try:
        return Device(
            data["name"], file.stem, data["per_node"], data["inside"], codec_passes=codecs,
            grad_codec_passes=grad_codecs, errors=errors, sources=sources, **(constants | figures),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise UserError(f"plan: {file.name}: {error}") from None


@cache
def link(key: str) -> Link:
    """Return a link.

    Args:
        key: the name of a file of data/links, or the path of another.

    Raises:
        UserError: there is none, or its file is wrong.
    """
    file = _file("links", key)
    data = _tables(file)
    figures, sources = _figures(data.get("figures", {}), file)
    try:
        return Link(data["name"], file.stem, of_node=data["of_node"], sources=sources, **figures)
    except (KeyError, TypeError) as error:
        raise UserError(f"plan: {file.name}: {error}") from None


def cluster(device_key: str, ranks: int, links: str = "", per_node: int | None = None) -> Cluster:
    """Return a cluster.

    Args:
        device_key: of its devices.
        ranks: how many.
        links: the key of the link between nodes, or "INSIDE,BETWEEN"; "nvlink" is that of the device. "" has the
            device's own, inside and between.
        per_node: devices of a node; None has the device's own number.

    Raises:
        UserError: a key is unknown, or a number is less than 1.
    """
    chosen = device(device_key)
    per_node = chosen.per_node if per_node is None else per_node
    if ranks < 1 or per_node < 1:
        raise UserError(f"plan: expected at least one rank, and one in a node, got {ranks} and {per_node}")
    parts = [part.strip() for part in links.split(",") if part.strip()]
    if len(parts) > 2:
        raise UserError(f"plan: links (--link): expected BETWEEN or INSIDE,BETWEEN, got {links!r}")
    inside = parts[0] if len(parts) == 2 else chosen.inside_link
    between = parts[-1] if parts else chosen.inside_link
    own = {"nvlink": chosen.inside_link}
    if ranks > per_node and not parts:
        raise UserError(
            f"plan: {ranks} ranks are on {-(-ranks // per_node)} nodes: name the link between them by links (--link)"
        )
    return Cluster(chosen, ranks, per_node, link(own.get(inside, inside)), link(own.get(between, between)))


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def calibrated_file(name: str) -> Path:
    """Return where `tpkernels plan --calibrate` keeps the device "cpu" and the link "shm" of this machine."""
    return cache_file(name, ".toml", cores())


def this_machine(ranks: int, links: str = "", hosts: int = 1) -> Cluster:
    """Return CPU ranks of machines like this one, or of the shipped class where this one was not calibrated.

    Args:
        ranks: how many. hosts: that share them evenly.
        links: as in `cluster`.

    Raises:
        UserError: as `cluster`; or `ranks` do not divide over `hosts`.
    """
    if hosts < 1 or ranks % hosts:
        raise UserError(f"plan: ranks: expected a multiple of {hosts} hosts, got {ranks}")
    file = calibrated_file("cpu")
    if not file.is_file():
        return cluster("cpu", ranks, links, ranks // hosts)
    found = cluster(str(file), ranks, links, ranks // hosts)
    return crowded(found, found.device.per_node)


def crowded(machine: Cluster, cores: int) -> Cluster:
    """Return a cluster where the ranks of a node share so many cores; the same one if each has a core of its own."""
    share, device = cores / machine.per_node, machine.device
    if share >= 1:
        return machine
    slower = replace(
        device, flops=device.flops * share, memory_bandwidth=device.memory_bandwidth * share,
        memory=device.memory * share, host_layer_s=device.host_layer_s / share, host_head_s=device.host_head_s / share,
        host_call_s=device.host_call_s / share,
    )  # fmt: skip
    return replace(machine, device=slower)
