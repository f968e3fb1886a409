"""Opening over shared memory (transport "shm"): the ranks of one host map one file, or all learn why they cannot."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from tpkernels._native import _C
from tpkernels.comm.bootstrap import Bootstrap

_SHM_FOLDER = "/dev/shm"
_PAGE = 4096
# The least that is better than no shared memory: an eighth of it is a slot, and messages go in pieces of a slot.
_LEAST_ARENA_BYTES = 1 << 20


@dataclass(frozen=True)
class Wanted:
    """The arguments of Group.open that must be the same on all ranks."""

    timeout_s: float
    arena_bytes: int | None
    transport: str
    device: str
    multicast: bool


@dataclass(frozen=True)
class Gpu:
    """A GPU by its uuid, which is the same in all processes, and its index in the process that uses it."""

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
    """A rank as the others need it before they choose a transport."""

    wanted: Wanted
    pid: int
    host: str  # boot and namespaces: names of hosts are not unique
    cores: frozenset[int]
    gpu: Gpu | None = None
    obstacle: str | None = None  # to working on the wanted device at all
    opened: int = 0  # groups that it has opened over process groups of this name, for the name of the next one

    @classmethod
    def here(cls, wanted: Wanted, gpu: Gpu | None = None, obstacle: str | None = None, opened: int = 0) -> RankInfo:
        """The rank of this process.

        Args:
            wanted: the arguments of its Group.open.
            gpu: of the group, None on the CPU.
            obstacle: why this process cannot use the device, None where it can.
            opened: see `GroupNames.count`.
        """
        return cls(wanted, os.getpid(), _host_identity(), frozenset(os.sched_getaffinity(0)), gpu, obstacle, opened)


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


def hosts_of(ranks: Sequence[RankInfo]) -> list[list[int]]:
    """The ranks of each host, ascending; the hosts by their first ranks."""
    hosts: dict[str, list[int]] = {}
    for r, info in enumerate(ranks):
        hosts.setdefault(info.host, []).append(r)
    return list(hosts.values())


def obstacle_to_one_host(ranks: Sequence[RankInfo]) -> str | None:
    """Why these ranks cannot share memory, None when they can try."""
    hosts = hosts_of(ranks)
    if len(hosts) > 1:
        return f"the ranks run on {len(hosts)} hosts (or in containers that do not share processes and memory)"
    return None


@dataclass(frozen=True)
class Opening:
    """A Group.open whose ranks have all arrived: the arguments that every transport needs.

    Attributes:
        process_group: the ranks. bootstrap: the exchanges between them until the group is open.
        name, label: of the group.
        wanted: the arguments of Group.open.
        ranks: all of them, in rank order.
    """

    process_group: dist.ProcessGroup
    bootstrap: Bootstrap
    name: str
    label: str
    wanted: Wanted
    ranks: Sequence[RankInfo]

    @property
    def rank(self) -> int:
        """This rank."""
        return self.bootstrap.rank

    @property
    def hosts(self) -> list[list[int]]:
        """The ranks of each host, see `hosts_of`."""
        return hosts_of(self.ranks)

    @property
    def here(self) -> list[int]:
        """The ranks of this host."""
        return next(ranks for ranks in self.hosts if self.rank in ranks)

    @property
    def cores(self) -> int:
        """How many cores the ranks of this host have together."""
        return len(frozenset[int]().union(*(self.ranks[r].cores for r in self.here)))

    @property
    def is_crowded(self) -> bool:
        """Whether the ranks of this host have fewer cores than they are."""
        return len(self.here) > self.cores

    @property
    def pids(self) -> list[int | None]:
        """The process of each rank of this host, None for the others."""
        host = self.ranks[self.rank].host
        return [info.pid if info.host == host else None for info in self.ranks]


def open_shm(opening: Opening, most: int) -> tuple[_C.Communicator | None, str]:
    """Open over the shared memory of each host, for its ranks; collective over the ranks of all hosts.

    Args:
        opening: of all ranks.
        most: bytes for each rank; less where they do not fit and the caller of Group.open named no size.

    Returns:
        the communicator of the ranks of this host, and what it has less than was asked for, if anything; or, on all
        ranks, None, and why shared memory cannot be used.

    Raises:
        OSError: a host cannot reserve what was asked for, by arena_bytes or by transport; the same on all ranks.
    """
    bootstrap, wanted, here = opening.bootstrap, opening.wanted, opening.here
    first, rank = here[0], here.index(opening.rank)
    least = most if wanted.arena_bytes is not None else min(most, _LEAST_ARENA_BYTES)
    with contextlib.ExitStack() as opened:
        made = _reserve(most, least, len(here)) if rank == 0 else _Reserved()
        if made.fd >= 0:
            opened.callback(os.close, made.fd)
        offers = bootstrap.gather(replace(made, owner=os.getpid()))
        offer = next((found for found in offers if found.failure is not None), offers[first])
        if offer.failure is not None:
            if wanted.arena_bytes is not None or wanted.transport in ("shm", "hierarchical"):
                raise OSError(offer.errno, f"Group.open: {offer.failure}")
            return None, offer.failure
        communicator: _C.Communicator | None = None
        obstacle: str | None = None
        try:
            fd = made.fd
            if rank != 0:
                fd = os.open(f"/proc/{offer.owner}/fd/{offer.fd}", os.O_RDWR)
                opened.callback(os.close, fd)
            name = opening.name if len(here) == len(opening.ranks) else f"{opening.name}/host"
            pids = [opening.ranks[r].pid for r in here]
            communicator = _C.open_shm(
                name, opening.label, rank, len(here), wanted.timeout_s, fd, offer.nbytes, pids, opening.cores
            )
        except (OSError, RuntimeError, ValueError) as error:
            obstacle = f"rank {opening.rank} could not map the shared memory of rank {first}: {error}"
        with contextlib.ExitStack() as unless_all_have_it:
            if communicator is not None:
                unless_all_have_it.callback(communicator.close)
            if (obstacle := bootstrap.first_obstacle(obstacle)) is not None:
                return None, obstacle
            unless_all_have_it.pop_all()
    less = f", in arenas of {offer.nbytes} bytes because {offer.note}" if offer.note else ""
    return communicator, less


@dataclass(frozen=True)
class _Reserved:
    """A nameless file of shared memory whose pages are all there, or why there is none."""

    fd: int = -1
    nbytes: int = 0  # for each rank
    note: str = ""  # why less than asked for
    failure: str | None = None
    errno: int = errno.ENOSPC
    owner: int = 0  # its process


def _reserve(most: int, least: int, world_size: int) -> _Reserved:
    try:
        fd = os.open(_SHM_FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        failure = f"cannot create shared memory in {_SHM_FOLDER}: {error.strerror}. {_needed(error)}"
        return _Reserved(failure=failure, errno=error.errno or errno.ENOSPC)
    nbytes, note = most, ""
    while True:
        try:
            os.posix_fallocate(fd, 0, nbytes * world_size)
            return _Reserved(fd, nbytes, note)
        except OSError as error:
            os.ftruncate(fd, 0)
            if not note:
                note = _no_room(nbytes, world_size, error)
            if nbytes // 2 >= least:
                nbytes = rounded_to_pages(nbytes // 2)
                continue
            os.close(fd)
            return _Reserved(
                failure=f"{note}. Pass a smaller arena_bytes (now {most} a rank) or enlarge {_SHM_FOLDER} "
                "(docker: --shm-size)",
                errno=error.errno or errno.ENOSPC,
            )


def _no_room(nbytes: int, world_size: int, error: OSError) -> str:
    space = os.statvfs(_SHM_FOLDER)
    return (
        f"the arenas of {world_size} ranks need {nbytes * world_size} bytes of {_SHM_FOLDER}, which has "
        f"{space.f_bavail * space.f_frsize} bytes free ({error.strerror})"
    )


def _needed(error: OSError) -> str:
    """The advice for a machine that cannot make a nameless file."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "Raise the number of files that a process may open (ulimit -n), or close some"
    return (
        f"It must be a tmpfs that this user can write to and that has an inode left (ramfs and others have no "
        f"nameless files): mount -t tmpfs tmpfs {_SHM_FOLDER}"
    )
