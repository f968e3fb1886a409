"""Process groups of torch: those of a mesh, those that are being made, and when one is destroyed."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# The reason in errors of ops on a group over such a process group.
DESTROYED = (
    "the process group that it was opened over was destroyed; open a group over the new one (a model: make or "
    "parallelize it again, or set_group where rank and number of ranks are the same)"
)

# Those of the parent of a forked process. Kept, because their destructors wait for threads of the parent.
_inherited: list[dist.ProcessGroup] = []
os.register_at_fork(after_in_child=lambda: _inherited.extend(dist.distributed_c10d._world.pg_map))


@dataclass(eq=False)
class NewGroup:
    """A process group while it is made: a back end opens its communicator before torch has the group.

    It has the methods of a ProcessGroup that opening needs.

    Attributes:
        store: of the group; None would mean that there is none.
        group_rank, group_size: this rank, and how many.
        group_name: the same on all ranks.
        timeout: of torch's back end gloo, where that is needed.
    """

    store: dist.distributed_c10d.Store
    group_rank: int
    group_size: int
    group_name: str
    timeout: timedelta

    def rank(self) -> int:
        """This rank."""
        return self.group_rank

    def size(self) -> int:
        """How many ranks there are."""
        return self.group_size

    @cached_property
    def gloo(self) -> Any:
        """Torch's back end gloo over the same ranks, which all of them must want."""
        store = dist.distributed_c10d.PrefixStore("gloo", self.store)
        return dist.ProcessGroupGloo(store, self.group_rank, self.group_size, self.timeout)

    def alltoall_base(self, *arguments: Any) -> dist.Work:
        """That of gloo."""
        work: dist.Work = self.gloo.alltoall_base(*arguments)
        return work


def store_of(process_group: dist.ProcessGroup) -> dist.distributed_c10d.Store:
    """The store of a process group; None where its back end has none (MPI)."""
    made: Any = process_group
    if isinstance(made, NewGroup):
        return made.store
    return dist.distributed_c10d._get_process_group_store(process_group)


def process_group_of(
    where: dist.ProcessGroup | DeviceMesh | tuple[DeviceMesh, str | int] | None,
) -> tuple[dist.ProcessGroup | None, str]:
    """The process group of an argument of Group.open, and its name in messages.

    Raises:
        TypeError, ValueError: the argument names no process group of this rank.
    """
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


def check_usable(process_group: dist.ProcessGroup | None, label: str) -> None:
    """Raise unless a group can be opened over the process group in this process."""
    if process_group is None:
        return
    if any(process_group is other for other in _inherited):
        raise RuntimeError(
            f"Group.open({label!r}): this process was forked from the one that made the process group, which cannot be "
            f"used here; call init_process_group in the process that opens the group"
        )
    if process_group not in dist.distributed_c10d._world.pg_map:
        raise ValueError(f"Group.open({label!r}): the process group was destroyed")


def when_destroyed(process_group: dist.ProcessGroup, do: Callable[[], None]) -> Callable[[], object]:
    """Call `do` once destroy_process_group has released the process group.

    torch has no callback for that. It releases the Python object of the group's store, which nothing else here keeps.

    Returns:
        a function that cancels the call.
    """
    store = store_of(process_group)
    if store is None:  # of MPI
        return lambda: None
    found = weakref.finalize(store, do)
    found.atexit = False
    return found.detach
