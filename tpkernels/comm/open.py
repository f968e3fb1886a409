"""Opening a communicator: the ranks exchange their facts and take the fastest transport that all of them can use."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsFloat, cast

import torch
import torch.distributed as dist

from tpkernels._native import _C
from tpkernels.comm.bootstrap import Bootstrap
from tpkernels.comm.device_exchange import DeviceExchange
from tpkernels.comm.devices import backend_of, load_cuda
from tpkernels.comm.exchange import ProcessGroupExchange
from tpkernels.comm.host import (
    Gpu,
    Opening,
    RankInfo,
    Wanted,
    check_same,
    obstacle_to_one_host,
    open_shm,
    rounded_to_pages,
)
from tpkernels.comm.paths import gpu_name, open_with_paths
from tpkernels.comm.peer import check_gpus, obstacle_to_peers, open_peer
from tpkernels.comm.process_groups import NewGroup
from tpkernels.comm.profile import open_with_profile
from tpkernels.comm.sockets import connect, measured_link
from tpkernels.comm.watch import Watch

TRANSPORTS = {"cpu": ("auto", "shm", "hierarchical", "group"), "cuda": ("auto", "peer", "group")}
TIMEOUT_S = {"cpu": 30.0, "cuda": 600.0}
ARENA_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # a quarter of it is a slot
BACKEND_ARENA_BYTES = 4 << 20  # slots of a whole piece, and 256 KiB for the messages of each of up to 11 other ranks
_EXCHANGE_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
_FOREVER_S = 1e8  # three years, instead of an infinite timeout_s, which clocks of nanoseconds cannot hold

_log = logging.getLogger("tpkernels")


class GroupNames:
    """Names that no other group of this process has had: ops find a group by its name alone.

    They are numbered by the name of the process group. Its object will not do: a process group that is destroyed and
    made again has the old name.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def count(self, base: str) -> int:
        """The number of the last group over a process group of this name, 0 before the first."""
        return self._numbers.get(base, 0)

    def next(self, base: str, opened: int) -> str:
        """Make a name, the same on all ranks.

        Args:
            base: the name of the process group.
            opened: the largest `count` of any rank.
        """
        self._numbers[base] = max(self.count(base), opened) + 1
        return f"{base}/{self._numbers[base]}"


_names = GroupNames()


@dataclass(frozen=True)
class Opened:
    """A communicator, why it is of its kind, and the file of the machine's profile that it has."""

    communicator: Any
    reason: str
    profile: Path | None = None


def open_communicator(
    process_group: dist.ProcessGroup | None,
    label: str,
    device: torch.device,
    timeout_s: float,
    arena_bytes: int | None,
    transport: str,
    multicast: bool,
) -> Opened:
    """Open the communicator of this rank; every rank calls this.

    Args:
        process_group: the ranks; None for a group of this process alone.
        label: the name of the group in messages.
        device: torch.device("cpu"), or this rank's GPU with its index.
        timeout_s, arena_bytes, transport, multicast: those of Group.open.

    Raises:
        TypeError, ValueError: the arguments do not fit or differ between ranks, or a transport is demanded that the
            ranks cannot have.
        RuntimeError: a rank cannot use its device.
        OSError: memory cannot be reserved.
        TimeoutError, PeerLostError: ranks did not come, or ended; names them.
    """
    _check_arguments(device, timeout_s, arena_bytes, transport)
    timeout_s = min(float(timeout_s), _FOREVER_S)
    if multicast and (device.type == "cpu" or transport == "group"):
        raise ValueError(
            f"Group.open: multicast needs device 'cuda' and transport 'peer', got {device.type!r} and {transport!r}"
        )
    kernels, obstacle = (None, None) if device.type == "cpu" else load_cuda()
    if process_group is None:
        if obstacle is not None:
            raise RuntimeError(f"Group.open: cannot use {device}: {obstacle}")
        return _profiled(Opened(_open_local(kernels, _names.next("local", 0), label, device), "one process"), device)
    wanted = Wanted(timeout_s, arena_bytes, transport, device.type, multicast)
    gpu = Gpu.of(device) if kernels is not None else None
    opening = _begin(process_group, label, wanted, gpu, obstacle)
    ranks = opening.ranks
    if len(ranks) == 1:
        return _profiled(Opened(_open_local(kernels, opening.name, label, device), "one rank"), device)
    if kernels is None:
        return _profiled(_open_cpu(opening), device, opening.cores, len(opening.here))
    return _profiled(_open_cuda(opening, device, kernels), device)


def _check_arguments(device: torch.device, timeout_s: float, arena_bytes: int | None, transport: str) -> None:
    if transport not in TRANSPORTS[device.type]:
        raise ValueError(
            f"Group.open: transport must be {', '.join(map(repr, TRANSPORTS[device.type]))} on {device.type}, "
            f"got {transport!r}"
        )
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, SupportsFloat):
        raise TypeError(f"Group.open: timeout_s must be a number of seconds, got {type(timeout_s).__name__}")
    if not float(timeout_s) > 0:
        raise ValueError(f"Group.open: timeout_s must be positive (math.inf: no limit), got {timeout_s}")
    if arena_bytes is not None and (not isinstance(arena_bytes, int) or arena_bytes < 1 << 18):
        raise ValueError(f"Group.open: arena_bytes must be an int of at least {1 << 18}, got {arena_bytes!r}")


def open_for_backend(group: NewGroup, label: str, timeout_s: float, transport: str) -> tuple[Any, bool]:
    """Open the communicator of a back end for torch.distributed, on the CPU; every rank of the group calls this.

    It moves tensors and multiplies none, so that it needs no profile and a small arena.

    Returns:
        the communicator, and whether the ranks of this host have fewer cores than they are.

    Raises:
        As open_communicator does.
    """
    timeout_s = min(timeout_s, _FOREVER_S)
    if group.size() == 1:
        return _open_local(None, _names.next(group.group_name, 0), label, torch.device("cpu")), False
    opening = _begin(cast(dist.ProcessGroup, group), label, Wanted(timeout_s, None, transport, "cpu", False))
    return _open_cpu(opening, BACKEND_ARENA_BYTES).communicator, opening.is_crowded


def _begin(
    process_group: dist.ProcessGroup,
    label: str,
    wanted: Wanted,
    gpu: Gpu | None = None,
    obstacle: str | None = None,
) -> Opening:
    """Wait for all ranks, and check that they can and want the same."""
    base = process_group.group_name
    bootstrap = Bootstrap(process_group, label, wanted.timeout_s)
    ranks, warning = bootstrap.begin(RankInfo.here(wanted, gpu, obstacle, _names.count(base)))
    check_same(ranks)
    name = _names.next(base, max(info.opened for info in ranks))
    opening = Opening(process_group, bootstrap, name, label, wanted, ranks)
    bootstrap.watch(opening.pids)
    if warning is not None and process_group.rank() == 0:
        _log.warning("group '%s': %s", label, warning)
    return opening


def _profiled(opened: Opened, device: torch.device, cores: int = 1, ranks: int = 1) -> Opened:
    """The communicator, with what was measured on this kind of machine and without calls in its counters."""
    if device.type != "cpu" and opened.communicator.transport != "peer":
        return opened
    with _closed_on_error(opened.communicator):
        if device.type == "cpu":
            found = open_with_profile(opened.communicator, cores, ranks)
        else:
            found = open_with_paths(opened.communicator, gpu_name(device))
    opened.communicator.reset_stats()
    return replace(opened, profile=found)


@contextmanager
def _closed_on_error(communicator: Any) -> Iterator[None]:
    """Close a communicator whose opening fails, so that the other ranks do not wait for it."""
    try:
        yield
    except BaseException:
        communicator.close("this rank could not open the group")
        raise


def _arena_bytes(wanted: Wanted) -> int:
    return rounded_to_pages(wanted.arena_bytes or ARENA_BYTES[wanted.device])


def _open_local(kernels: Any, name: str, label: str, device: torch.device) -> Any:
    return _C.open_local(name, label) if kernels is None else kernels.open_local(name, label, device.index)


def _open_cpu(opening: Opening, arena_bytes: int | None = None) -> Opened:
    wanted, hosts = opening.wanted, opening.hosts
    arena_bytes = arena_bytes or _arena_bytes(wanted)
    several = obstacle_to_one_host(opening.ranks)
    if wanted.transport == "group":
        obstacle = "transport='group' was asked for"
    elif several is None and wanted.transport != "hierarchical":
        communicator, found = open_shm(opening, arena_bytes)
        if communicator is not None:
            return Opened(communicator, f"all ranks run on one host and share its memory{found}")
        obstacle = found
    elif several is None:
        obstacle = "all ranks run on one host"
    elif wanted.transport == "shm":
        obstacle = several
    elif len(hosts) == len(opening.ranks):
        obstacle = f"{several}, one on each" if wanted.transport == "hierarchical" else several
    else:
        opened = _open_hierarchical(opening, arena_bytes)
        if isinstance(opened, Opened):
            return opened
        obstacle = f"{several}, and each of them does without its own: {opened}"
    if wanted.transport in ("shm", "hierarchical"):
        raise ValueError(f"Group.open: transport {wanted.transport!r} cannot be used: {obstacle}")
    if wanted.transport == "auto" and len(hosts) < len(opening.ranks) and opening.rank == 0:
        _log.warning(
            "group '%s' of %d ranks does without shared memory: %s", opening.label, len(opening.ranks), obstacle
        )
    return _open_connections(opening, obstacle)


def _open_hierarchical(opening: Opening, arena_bytes: int) -> Opened | str:
    """Between hosts, of which one has several ranks; or why that cannot be, the same on all ranks."""
    hosts, here, rank = opening.hosts, opening.here, opening.rank
    inner, found = open_shm(opening, arena_bytes)
    if inner is None:
        return found
    with _closed_on_error(inner):
        slices, mine = min(map(len, hosts)), here.index(rank)
        leaders = [ranks[mine] for ranks in hosts] if mine < slices else []
        sockets, obstacle = connect(opening.process_group, opening.bootstrap, leaders)
        if obstacle is not None:
            inner.close()
            return obstacle
        watch = _watch(opening)
        timeout_s, capacity = opening.wanted.timeout_s, _EXCHANGE_BYTES["cpu"]
        communicator = _C.open_hierarchical(
            opening.name, opening.label, rank, timeout_s, hosts, inner, sockets, capacity, watch
        )
    with _closed_on_error(communicator):
        communicator.set_link(*measured_link(communicator, len(hosts), slices))
    sizes = " + ".join(str(len(ranks)) for ranks in hosts)
    reason = (
        f"{len(hosts)} hosts have {sizes} ranks: over shared memory inside a host{found}, over connections between the "
        f"hosts, of {slices} rank{'s' * (slices > 1)} of each"
    )
    return Opened(communicator, reason)


def _open_connections(opening: Opening, obstacle: str) -> Opened:
    """Between any ranks; `obstacle`: to shared memory."""
    process_group, label, wanted, ranks = opening.process_group, opening.label, opening.wanted, opening.ranks
    if backend_of(process_group, "cpu") is None:
        assert isinstance(process_group, dist.ProcessGroup)
        raise ValueError(
            f"Group.open: tensors on the cpu need shared memory or a backend of the process group that carries them. "
            f"There is no shared memory, because {obstacle}, and the group has {dist.get_backend_config(process_group)}"
            f": call init_process_group('cpu:gloo,cuda:nccl')"
        )
    name, rank, timeout_s, capacity = opening.name, opening.rank, wanted.timeout_s, _EXCHANGE_BYTES["cpu"]
    sockets, no_sockets = connect(process_group, opening.bootstrap, range(len(ranks)))
    watch = _watch(opening)
    if no_sockets is None:
        communicator = _C.open_sockets(name, label, rank, len(ranks), timeout_s, capacity, sockets, watch)
        with _closed_on_error(communicator):
            rate, hop_s = measured_link(communicator, len(ranks))
            # On one host a hop is the time until the scheduler runs the other rank, not a delay of the link.
            communicator.set_link(rate, hop_s if len(opening.hosts) > 1 else 0.0)
        return Opened(communicator, f"over connections between the ranks, because {obstacle}")
    exchange = ProcessGroupExchange.open(process_group, watch, capacity)
    communicator = _C.open_group(name, label, rank, len(ranks), timeout_s, exchange)
    return Opened(communicator, f"through the process group, because {obstacle}; {no_sockets}")


def _watch(opening: Opening) -> Watch:
    return Watch(opening.process_group, opening.name, opening.wanted.timeout_s, opening.pids)


def _open_cuda(opening: Opening, device: torch.device, kernels: Any) -> Opened:
    process_group, label, wanted, ranks = opening.process_group, opening.label, opening.wanted, opening.ranks
    assert isinstance(process_group, dist.ProcessGroup)  # a back end of ours is opened on the CPU alone
    check_gpus(ranks)
    obstacle: str | None = "transport='group' was asked for"
    if wanted.transport != "group":
        obstacle = obstacle_to_peers(ranks, kernels.limits()["max_peers"])
    if obstacle is None:
        communicator, found = open_peer(opening, _arena_bytes(wanted), device, kernels)
        if communicator is not None:
            return Opened(communicator, found)
        obstacle = found
    if wanted.transport == "peer" or wanted.multicast:
        asked = "multicast" if wanted.multicast else "transport 'peer'"
        raise ValueError(f"Group.open: {asked} cannot be used: {obstacle}")
    if backend_of(process_group, "cuda") != "nccl":
        raise ValueError(
            f"Group.open: tensors on cuda need peer memory or a process group with NCCL. Peer memory cannot be used, "
            f"because {obstacle}, and the group has {dist.get_backend_config(process_group)}: "
            f"call init_process_group('cpu:gloo,cuda:nccl')"
        )
    name, rank = opening.name, opening.rank
    if rank == 0 and wanted.transport == "auto":
        _log.warning("group '%s' of %d ranks on cuda goes through NCCL, because %s", label, len(ranks), obstacle)
    watch = Watch(process_group, name, wanted.timeout_s, opening.pids)
    exchange = DeviceExchange(process_group, watch, _EXCHANGE_BYTES["cuda"], device)
    communicator = kernels.open_group(name, label, rank, len(ranks), wanted.timeout_s, device.index, exchange)
    return Opened(communicator, f"through NCCL, because {obstacle}")
