"""How a group opens: the ranks look at each other, take the fastest transport that all of them can use, and say why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tpkernels._native import _C
from tpkernels.comm.bootstrap import Meeting
from tpkernels.comm.device_exchange import DeviceExchange
from tpkernels.comm.devices import backend_of, load_cuda
from tpkernels.comm.exchange import ProcessGroupExchange
from tpkernels.comm.host import (
    Gpu,
    RankInfo,
    Wanted,
    check_same,
    obstacle_to_one_host,
    open_shm,
    rounded_to_pages,
)
from tpkernels.comm.peer import check_gpus, obstacle_to_peers, open_peer
from tpkernels.comm.sockets import connect
from tpkernels.comm.watch import Watch

TRANSPORTS = {"cpu": ("auto", "shm", "group"), "cuda": ("auto", "peer", "group")}
_ARENA_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}
_EXCHANGE_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}

_log = logging.getLogger("tpkernels")
_opened: dict[str, int] = {}  # the last number that a group over a process group of this name got


@dataclass(frozen=True)
class Opened:
    """A communicator, and why it is of its kind."""

    communicator: Any
    reason: str


def open_communicator(
    process_group: dist.ProcessGroup | None,
    label: str,
    device: torch.device,
    timeout_s: float,
    arena_bytes: int | None,
    transport: str,
    multicast: bool,
) -> Opened:
    """Open the communicator of this rank; every rank calls this. The arguments are those of Group.open, checked.

    Raises:
        ValueError: the ranks asked for different things, or for a transport that they cannot have.
        RuntimeError: a rank cannot use its device.
        OSError: memory cannot be reserved.
        TimeoutError, PeerLostError: ranks did not come, or ended; names them.
    """
    if multicast and (device.type == "cpu" or transport == "group"):
        raise ValueError(
            f"Group.open: multicast needs device 'cuda' and transport 'peer', got {device.type!r} and {transport!r}"
        )
    kernels, obstacle = (None, None) if device.type == "cpu" else load_cuda()
    if process_group is None:
        if obstacle is not None:
            raise RuntimeError(f"Group.open: cannot use {device}: {obstacle}")
        return Opened(_open_local(kernels, unique_name("local", 0), label, device), "one process")
    wanted = Wanted(timeout_s, arena_bytes, transport, device.type, multicast)
    gpu, base = Gpu.of(device) if kernels is not None else None, process_group.group_name
    meeting = Meeting(process_group, label, timeout_s)
    ranks, warning = meeting.begin(RankInfo.here(wanted, gpu, obstacle, _opened.get(base, 0)))
    check_same(ranks)
    meeting.watch(_pids_here(process_group, ranks))
    if warning is not None and process_group.rank() == 0:
        _log.warning("group '%s': %s", label, warning)
    name = unique_name(base, max(info.opened for info in ranks))
    if len(ranks) == 1:
        return Opened(_open_local(kernels, name, label, device), "one rank")
    if kernels is None:
        return _open_cpu(process_group, meeting, name, label, wanted, ranks)
    return _open_cuda(process_group, meeting, name, label, wanted, ranks, device, kernels)


def unique_name(base: str, opened: int) -> str:
    """A name that no other group of this process has, and the same on all ranks: `opened` is the most of any rank."""
    _opened[base] = max(_opened.get(base, 0), opened) + 1
    return f"{base}/{_opened[base]}"


def _arena_bytes(wanted: Wanted) -> int:
    return rounded_to_pages(wanted.arena_bytes or _ARENA_BYTES[wanted.device])


def _open_local(kernels: Any, name: str, label: str, device: torch.device) -> Any:
    return _C.open_local(name, label) if kernels is None else kernels.open_local(name, label, device.index)


def _open_cpu(
    process_group: dist.ProcessGroup,
    meeting: Meeting,
    name: str,
    label: str,
    wanted: Wanted,
    ranks: Sequence[RankInfo],
) -> Opened:
    obstacle = "transport='group' was asked for" if wanted.transport == "group" else obstacle_to_one_host(ranks)
    if obstacle is None:
        communicator, found = open_shm(meeting, name, label, wanted, ranks, _arena_bytes(wanted))
        if communicator is not None:
            return Opened(communicator, found)
        obstacle = found
        if meeting.rank == 0:
            _log.warning("group '%s' of %d ranks does without shared memory: %s", label, len(ranks), obstacle)
    if wanted.transport == "shm":
        raise ValueError(f"Group.open: transport 'shm' cannot be used: {obstacle}")
    if backend_of(process_group, "cpu") is None:
        raise ValueError(
            f"Group.open: tensors on the cpu need shared memory or a backend of the process group that carries them. "
            f"There is no shared memory, because {obstacle}, and the group has {dist.get_backend_config(process_group)}"
            f": call init_process_group('cpu:gloo,cuda:nccl')"
        )
    rank, pids = process_group.rank(), _pids_here(process_group, ranks)
    timeout_s, capacity = wanted.timeout_s, _EXCHANGE_BYTES["cpu"]
    sockets, no_sockets = connect(process_group, meeting)
    if no_sockets is None:
        watch = Watch(process_group, name, timeout_s, pids)
        communicator = _C.open_sockets(name, label, rank, len(ranks), timeout_s, capacity, sockets, watch)
        return Opened(communicator, f"over connections between the ranks, because {obstacle}")
    exchange = ProcessGroupExchange(process_group, name, timeout_s, capacity, pids)
    communicator = _C.open_group(name, label, rank, len(ranks), timeout_s, exchange)
    return Opened(communicator, f"through the process group, because {obstacle}; {no_sockets}")


def _open_cuda(
    process_group: dist.ProcessGroup,
    meeting: Meeting,
    name: str,
    label: str,
    wanted: Wanted,
    ranks: Sequence[RankInfo],
    device: torch.device,
    kernels: Any,
) -> Opened:
    check_gpus(ranks)
    obstacle: str | None = "transport='group' was asked for"
    if wanted.transport != "group":
        obstacle = obstacle_to_peers(ranks, kernels.limits()["max_peers"])
    if obstacle is None:
        communicator, found = open_peer(
            process_group, meeting, name, label, wanted, _arena_bytes(wanted), ranks, device, kernels
        )
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
    rank, pids = process_group.rank(), _pids_here(process_group, ranks)
    if rank == 0 and wanted.transport == "auto":
        _log.warning("group '%s' of %d ranks on cuda goes through NCCL, because %s", label, len(ranks), obstacle)
    exchange = DeviceExchange(process_group, name, wanted.timeout_s, _EXCHANGE_BYTES["cuda"], pids, device)
    communicator = kernels.open_group(name, label, rank, len(ranks), wanted.timeout_s, device.index, exchange)
    return Opened(communicator, f"through NCCL, because {obstacle}")


def _pids_here(process_group: dist.ProcessGroup, ranks: Sequence[RankInfo]) -> list[int | None]:
    """The process of each rank of this host, None for the others."""
    host = ranks[process_group.rank()].host
    return [r.pid if r.host == host else None for r in ranks]
