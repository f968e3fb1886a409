"""How the ranks of one host come to share memory, and find out when they cannot."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tpkernels import _C
from tpkernels.devices import backend_of

_SHM_FOLDER = "/dev/shm"
_PAGE = 4096

_gathers: dict[str, int] = {}  # how often the store of each process group was used: keys are the same on all ranks


@dataclass(frozen=True)
class Wanted:
    """What a rank asked of Group.open; must be the same on all of them."""

    timeout_s: float
    arena_bytes: int
    transport: str
    device: str
    multicast: bool


@dataclass(frozen=True)
class Gpu:
    """A GPU as all processes of its host know it, and its index in the process that uses it."""

    uuid: str
    name: str
    index: int

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        """The GPU of a CUDA device of this process."""
        found = torch.cuda.get_device_properties(device)
        return cls(str(found.uuid), f"GPU {device.index} ({found.name})", device.index)


@dataclass(frozen=True)
class RankInfo:
    """What the ranks must know of each other before they can share memory."""

    wanted: Wanted
    pid: int
    host: str  # boot and namespaces: names of hosts are not unique
    cores: frozenset[int]
    gpu: Gpu | None = None
    obstacle: str | None = None  # to working on the wanted device at all

    @classmethod
    def here(cls, wanted: Wanted, gpu: Gpu | None = None, obstacle: str | None = None) -> RankInfo:
        """This process."""
        return cls(wanted, os.getpid(), _host_identity(), frozenset(os.sched_getaffinity(0)), gpu, obstacle)


def _host_identity() -> str:
    parts = []
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        parts.append(file.read().strip())
    for namespace in ("pid", "user"):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(f"/proc/self/ns/{namespace}"))
    with contextlib.suppress(OSError):
        parts.append(str(os.stat(_SHM_FOLDER).st_dev))
    return " ".join(parts)


def rounded_to_pages(n: int) -> int:
    """n bytes, rounded up to whole pages."""
    return -(-n // _PAGE) * _PAGE


def gather(process_group: dist.ProcessGroup, mine: Any) -> list[Any]:
    """What every rank has, in rank order."""
    if backend_of(process_group, "cpu") is None:
        return _gather_by_store(process_group, mine)
    everyone: list[Any] = [None] * process_group.size()
    dist.all_gather_object(everyone, mine, group=process_group)
    return everyone


def _gather_by_store(process_group: dist.ProcessGroup, mine: Any) -> list[Any]:
    """The same without a GPU: ranks that chose a wrong one must be able to say so."""
    name = process_group.group_name
    _gathers[name] = _gathers.get(name, 0) + 1
    store = dist.distributed_c10d._get_process_group_store(process_group)
    keys = [f"tpkernels/gather/{_gathers[name]}/{r}" for r in range(process_group.size())]
    store.set(keys[process_group.rank()], pickle.dumps(mine))  # type: ignore[arg-type]  # the stub forgets bytes
    return [pickle.loads(store.get(key)) for key in keys]


def first_obstacle(process_group: dist.ProcessGroup, mine: str | None) -> str | None:
    """The obstacle of the first rank that has one, on every rank."""
    return next((obstacle for obstacle in gather(process_group, mine) if obstacle is not None), None)


def check_same(ranks: Sequence[RankInfo]) -> None:
    """Raise on every rank, unless all asked for the same (ValueError) and can work on that device (RuntimeError)."""
    for r, other in enumerate(ranks):
        if other.wanted != ranks[0].wanted:
            raise ValueError(
                f"Group.open: the ranks disagree: rank 0 asked for {ranks[0].wanted}, rank {r} for {other.wanted}"
            )
    for r, info in enumerate(ranks):
        if info.obstacle is not None:
            raise RuntimeError(f"Group.open: rank {r} cannot use {info.wanted.device}: {info.obstacle}")


def obstacle_to_one_host(ranks: Sequence[RankInfo]) -> str | None:
    """Why these ranks cannot share memory, None when they can try."""
    hosts = {r.host for r in ranks}
    if len(hosts) > 1:
        return f"the ranks run on {len(hosts)} hosts (or in containers that do not share processes and memory)"
    return None


def open_shm(
    process_group: dist.ProcessGroup, name: str, label: str, wanted: Wanted, ranks: Sequence[RankInfo]
) -> tuple[_C.Communicator | None, str | None]:
    """The communicator, or why shared memory cannot be used here. Raises the same error on every rank."""
    rank, world_size = process_group.rank(), len(ranks)
    fd, failure = _reserve(wanted.arena_bytes * world_size, world_size) if rank == 0 else (-1, None)
    offer: list[Any] = [(os.getpid(), fd, failure)]
    dist.broadcast_object_list(offer, src=dist.get_global_rank(process_group, 0), group=process_group)
    owner, owner_fd, failure = offer[0]
    if failure is not None:
        raise OSError(errno.ENOSPC, failure)
    communicator: _C.Communicator | None = None
    obstacle: str | None = None
    try:
        if rank != 0:
            fd = os.open(f"/proc/{owner}/fd/{owner_fd}", os.O_RDWR)
        cores = len(frozenset().union(*(r.cores for r in ranks)))
        communicator = _C.open_shm(
            name, label, rank, world_size, wanted.timeout_s, fd, wanted.arena_bytes, [r.pid for r in ranks], cores
        )
    except (OSError, RuntimeError) as error:
        obstacle = f"rank {rank} could not map the shared memory of rank 0: {error}"
    obstacle = first_obstacle(process_group, obstacle)
    if fd >= 0:
        os.close(fd)
    if obstacle is not None and communicator is not None:
        communicator.close()
    return (None, obstacle) if obstacle is not None else (communicator, None)


def _reserve(total: int, world_size: int) -> tuple[int, str | None]:
    """A nameless file of shared memory whose pages are all there, or why not."""
    try:
        fd = os.open(_SHM_FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        return -1, f"Group.open: cannot create shared memory in {_SHM_FOLDER}: {error.strerror}"
    try:
        os.posix_fallocate(fd, 0, total)
    except OSError as error:
        os.close(fd)
        space = os.statvfs(_SHM_FOLDER)
        return -1, (
            f"Group.open: the arenas of {world_size} ranks need {total} bytes of {_SHM_FOLDER}, which has "
            f"{space.f_bavail * space.f_frsize} bytes free ({error.strerror}). Pass a smaller arena_bytes "
            f"(now {total // world_size} a rank) or enlarge {_SHM_FOLDER} (docker: --shm-size)."
        )
    return fd, None
