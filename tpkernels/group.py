"""Group: the ranks that work together, opened over a process group or a dimension of a DeviceMesh."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tpkernels import _C
from tpkernels.exchange import ProcessGroupExchange

_SHM_FOLDER = "/dev/shm"
_PAGE = 4096
_DEFAULT_ARENA_BYTES = 16 << 20
_EXCHANGE_BYTES = 8 << 20

_open_groups: weakref.WeakValueDictionary[str, Group] = weakref.WeakValueDictionary()
_opened: dict[str, int] = {}  # how often each process group was opened: names are the same on all ranks
_default: Group | None = None


@dataclass(frozen=True)
class Explanation:
    """Why a call takes the path it takes.

    Attributes:
        path: the name of the path.
        reason: one sentence.
        measured: microseconds by candidate, empty when nothing was measured.
    """

    path: str
    reason: str
    measured: dict[str, float] = field(default_factory=dict)


class Group:
    """The ranks that work together in collective and fused ops.

    Made by `Group.open`, which every rank of the process group calls. Ops take the group as an argument and carry its name.

    Attributes:
        name: key under which ops find the communicator; the same on all ranks.
        label: what messages call the group.
        rank: this process's place in the group.
        world_size: how many ranks.
        transport: how bytes travel: "shm" (one host, shared memory), "group" (any c10d backend), "local" (one rank).
        timeout_s: seconds that a rank waits for another before it raises TimeoutError.
        process_group: the c10d group underneath, None when there is none.
    """

    def __init__(self, communicator: Any, process_group: dist.ProcessGroup | None, timeout_s: float, reason: str) -> None:
        self.name: str = communicator.name
        self.label: str = communicator.label
        self.rank: int = communicator.rank
        self.world_size: int = communicator.world_size
        self.transport: str = communicator.transport
        self.timeout_s = timeout_s
        self.process_group = process_group
        self._communicator = communicator
        self._reason = reason
        _open_groups[self.name] = self

    @classmethod
    def open(
        cls,
        process_group_or_mesh_dim: dist.ProcessGroup | DeviceMesh | tuple[DeviceMesh, str | int] | None = None,
        timeout_s: float = 30.0,
        arena_bytes: int | None = None,
        *,
        transport: str = "auto",
    ) -> Group:
        """Open a group; every rank of it must call this, in the same order relative to other groups.

        Args:
            process_group_or_mesh_dim: a c10d group, a one-dimensional DeviceMesh, or (mesh, dimension). None means all ranks
                of the default process group, or a group of one when torch.distributed is not initialised.
            timeout_s: seconds that any wait may take, the same on all ranks.
            arena_bytes: shared memory for each rank (transport "shm"): two slots of at most 1 MiB, the rest for
                `group.empty` and for products that GEMMs write in place. Default 16 MiB.
            transport: "auto", "shm" or "group". auto takes shared memory when all ranks run on one host.

        Raises:
            ValueError: arguments that do not fit, or that differ between ranks.
            OSError: shared memory cannot be reserved; says what is needed and what there is.
        """
        _check_open(timeout_s, arena_bytes, transport)
        process_group, label = _process_group_of(process_group_or_mesh_dim)
        if process_group is None:
            return cls(_C.open_local(_unique_name("local"), label), None, timeout_s, "one process")
        wanted = _Wanted(timeout_s, _rounded(arena_bytes or _DEFAULT_ARENA_BYTES), transport)
        ranks = _gathered(process_group, _Rank.here(wanted))
        _check_same(ranks)
        name = _unique_name(process_group.group_name)
        if len(ranks) == 1:
            return cls(_C.open_local(name, label), process_group, timeout_s, "one rank")
        obstacle = "transport='group' was asked for" if transport == "group" else _obstacle_to_shm(ranks)
        if obstacle is None:
            communicator, obstacle = _open_shm(process_group, name, label, wanted, ranks)
            if communicator is not None:
                return cls(communicator, process_group, timeout_s, "all ranks run on one host and share its memory")
        if transport == "shm":
            raise ValueError(f"Group.open: transport 'shm' cannot be used: {obstacle}")
        pids = [r.pid if r.host == ranks[process_group.rank()].host else None for r in ranks]
        exchange = ProcessGroupExchange(process_group, name, timeout_s, _EXCHANGE_BYTES, pids)
        communicator = _C.open_group(name, label, process_group.rank(), len(ranks), timeout_s, exchange)
        return cls(communicator, process_group, timeout_s, f"through the process group, because {obstacle}")

    def empty(self, shape: Sequence[int] | int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor inside this rank's arena: a collective on it copies nothing in.

        Args:
            shape: its shape.
            dtype: its dtype, the default dtype when None.

        Raises:
            ValueError: it does not fit (says the needed and the present size), or the transport has no arena.
        """
        sizes = [shape] if isinstance(shape, int) else list(shape)
        made: Tensor = torch.ops.tpkernels.arena_empty(self.name, sizes, dtype or torch.get_default_dtype())
        return made

    def barrier(self) -> None:
        """Return when every rank of the group has come here."""
        self._communicator.barrier()

    def exchange_sizes(self, mine: int) -> list[int]:
        """This rank's number and those of the others, in rank order."""
        return list(self._communicator.exchange(mine))

    def explain(self, op: str | None = None, **shape: Any) -> Explanation:
        """Say which path a call would take, and why.

        Args:
            op: name of an op; None explains the choice of the transport.
            shape: M, N, K (this rank's sizes) and dtype for the GEMMs; numel and dtype, or nbytes, for the collectives.
        """
        from tpkernels.choose import explain

        if op is None:
            return Explanation(self.transport, self._reason)
        return explain(self, op, **shape)

    def stats(self) -> dict[str, Any]:
        """Counters since the group was opened, or since reset_stats.

        Returns:
            calls, wire_bytes (sent by this rank; what k ranks read counts k times), seconds (inside collectives, waiting
            included, GEMMs excluded), wait_seconds, and the same for each op under "by_op".
        """
        by_op: dict[str, dict[str, float]] = self._communicator.stats_by_op()
        keys = ("calls", "wire_bytes", "seconds", "wait_seconds")
        return {key: sum(row[key] for row in by_op.values()) for key in keys} | {"by_op": by_op}

    def reset_stats(self) -> None:
        """Set all counters to zero."""
        self._communicator.reset_stats()

    def close(self) -> None:
        """Leave the group; calls of other ranks that need this one raise PeerLostError. Closing twice does nothing."""
        self._communicator.close()
        _open_groups.pop(self.name, None)
        global _default
        if _default is self:
            _default = None

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Group({self.label!r}, rank {self.rank} of {self.world_size}, transport {self.transport!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """Copies of a layer share its group."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled layer finds the group of the same label again where it is loaded."""
        return (find, (self.label,))


def resolve(group: Group | None) -> Group:
    """The group itself, or for None all ranks of the default process group, opened once and kept."""
    if group is not None:
        return group
    global _default
    if _default is None or (_default.process_group is None) == dist.is_initialized():
        _default = Group.open()
    return _default


def find(label: str) -> Group:
    """The open group of that label in this process; "world" is opened when it is not.

    Raises:
        ValueError: no group of that label is open here.
    """
    for group in list(_open_groups.values()):
        if group.label == label:
            return group
    if label in ("world", "local"):
        return resolve(None)
    known = sorted({group.label for group in _open_groups.values()})
    raise ValueError(f"group: no group '{label}' is open in this process (open: {known}); open it before loading")


@dataclass(frozen=True)
class _Wanted:
    timeout_s: float
    arena_bytes: int
    transport: str


@dataclass(frozen=True)
class _Rank:
    """What the ranks must know of each other before they can share memory."""

    wanted: _Wanted
    pid: int
    host: str  # boot and namespaces: names of hosts are not unique
    cores: frozenset[int]

    @classmethod
    def here(cls, wanted: _Wanted) -> _Rank:
        return cls(wanted, os.getpid(), _host_identity(), frozenset(os.sched_getaffinity(0)))


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


def _check_open(timeout_s: float, arena_bytes: int | None, transport: str) -> None:
    if not timeout_s > 0:
        raise ValueError(f"Group.open: timeout_s must be positive, got {timeout_s}")
    if arena_bytes is not None and (not isinstance(arena_bytes, int) or arena_bytes < 1 << 18):
        raise ValueError(f"Group.open: arena_bytes must be an int of at least {1 << 18}, got {arena_bytes!r}")
    if transport not in ("auto", "shm", "group"):
        raise ValueError(f"Group.open: transport must be 'auto', 'shm' or 'group', got {transport!r}")


def _process_group_of(
    where: dist.ProcessGroup | DeviceMesh | tuple[DeviceMesh, str | int] | None,
) -> tuple[dist.ProcessGroup | None, str]:
    if where is None:
        return (dist.group.WORLD, "world") if dist.is_initialized() else (None, "local")
    if isinstance(where, tuple):
        mesh, dim = where
        group = mesh.get_group(dim)
        return group, dim if isinstance(dim, str) else (group.group_desc or group.group_name)
    if isinstance(where, DeviceMesh):
        if where.ndim != 1:
            raise ValueError(f"Group.open: a mesh of {where.ndim} dimensions needs a dimension: (mesh, name or index)")
        names = where.mesh_dim_names
        return where.get_group(), names[0] if names else "mesh"
    if isinstance(where, dist.ProcessGroup):
        world = where is dist.group.WORLD
        desc = where.group_desc
        return where, "world" if world else (desc if desc and desc != "undefined" else where.group_name)
    if where is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("Group.open: this rank does not belong to the process group")
    raise TypeError(
        "Group.open: expected a ProcessGroup, a DeviceMesh, (DeviceMesh, dimension) or None, "
        f"got {type(where).__name__}"
    )


def _unique_name(base: str) -> str:
    _opened[base] = _opened.get(base, 0) + 1
    return f"{base}/{_opened[base]}"


def _rounded(n: int) -> int:
    return -(-n // _PAGE) * _PAGE


def _gathered(process_group: dist.ProcessGroup, mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * process_group.size()
    dist.all_gather_object(everyone, mine, group=process_group)
    return everyone


def _check_same(ranks: list[_Rank]) -> None:
    for r, other in enumerate(ranks):
        if other.wanted != ranks[0].wanted:
            raise ValueError(f"Group.open: the ranks disagree: rank 0 asked for {ranks[0].wanted}, rank {r} for {other.wanted}")


def _obstacle_to_shm(ranks: list[_Rank]) -> str | None:
    hosts = {r.host for r in ranks}
    if len(hosts) > 1:
        return f"the ranks run on {len(hosts)} hosts (or in containers that do not share processes and memory)"
    return None


def _open_shm(
    process_group: dist.ProcessGroup, name: str, label: str, wanted: _Wanted, ranks: list[_Rank]
) -> tuple[Any, str | None]:
    """The communicator, or why shared memory cannot be used here. Raises the same error on every rank."""
    rank, world_size = process_group.rank(), len(ranks)
    fd, failure = _reserve(wanted.arena_bytes * world_size, world_size) if rank == 0 else (-1, None)
    offer: list[Any] = [(os.getpid(), fd, failure)]
    dist.broadcast_object_list(offer, src=dist.get_global_rank(process_group, 0), group=process_group)
    owner, owner_fd, failure = offer[0]
    if failure is not None:
        raise OSError(errno.ENOSPC, failure)
    communicator, obstacle = None, None
    try:
        if rank != 0:
            fd = os.open(f"/proc/{owner}/fd/{owner_fd}", os.O_RDWR)
        cores = len(frozenset().union(*(r.cores for r in ranks)))
        communicator = _C.open_shm(
            name, label, rank, world_size, wanted.timeout_s, fd, wanted.arena_bytes, [r.pid for r in ranks], cores
        )
    except (OSError, RuntimeError) as error:
        obstacle = f"rank {rank} could not map the shared memory of rank 0: {error}"
    obstacles = [o for o in _gathered(process_group, obstacle) if o is not None]
    if fd >= 0:
        os.close(fd)
    if obstacles and communicator is not None:
        communicator.close()
    return (None, obstacles[0]) if obstacles else (communicator, None)


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


def _close_all() -> None:
    for group in list(_open_groups.values()):
        with contextlib.suppress(Exception):
            group.close()


atexit.register(_close_all)
