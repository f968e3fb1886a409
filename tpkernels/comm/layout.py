"""The layout of a run: replicas of the model, each cut over tensor-parallel ranks."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch.distributed.device_mesh import init_device_mesh

from tpkernels.comm.group import Group
from tpkernels.errors import UserError
from tpkernels.shard import part_size, part_start

SMALL_ARENA = 1 << 20
LANE_MIB = 16  # of the communicator that an aggregator opens


@dataclass(frozen=True)
class Layout:
    """The groups of one rank in a mesh of dp replicas, each cut over tp ranks.

    rank = dp.rank * tp.world_size + tp.rank, so that the ranks which communicate most are neighbours.

    Attributes:
        world: all ranks of the run.
        tp: the ranks that hold this replica; the same as `world` when there is one replica.
        dp: the ranks that hold the same part of other replicas; None when there is one replica.
    """

    world: Group
    tp: Group
    dp: Group | None = None

    @property
    def replicas(self) -> int:
        """How many copies of the model there are."""
        return 1 if self.dp is None else self.dp.world_size

    @property
    def transport(self) -> str:
        """The transports of the groups, in words."""
        return self.tp.transport + ("" if self.dp is None else f", between replicas {self.dp.transport}")

    @property
    def replica(self) -> int:
        """The number of the replica of this rank."""
        return 0 if self.dp is None else self.dp.rank


def rows_of(batch: int, dp: Group) -> range:
    """The rows of a batch for this rank's replica; the first replicas take one more where they do not divide.

    Args:
        batch: rows of the whole batch.
        dp: the replicas.
    """
    first = part_start(batch, dp.world_size, dp.rank)
    return range(first, first + part_size(batch, dp.world_size, dp.rank))


@contextmanager
def open_layout(world: Group, tp: int, dp: int, *, arena_bytes: int | None = None) -> Iterator[Layout]:
    """Cut the ranks of `world` into dp replicas of tp ranks; collective over `world`, which must be all ranks.

    Args:
        world: all ranks of the default process group.
        tp: ranks that a replica is cut over. dp: replicas.
        arena_bytes: as in `Group.open`, of the ranks of a replica.

    Raises:
        ValueError: world has another number of ranks than tp * dp.
    """
    if world.world_size != tp * dp:
        raise ValueError(f"open_layout: world must have tp * dp = {tp} * {dp} ranks, got {world.world_size}")
    if dp == 1:
        yield Layout(world, world)
        return
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    with ExitStack() as opened:
        # Gradients go over a communicator of the aggregator's own; the dp group carries losses and digests.
        tp_group, dp_group = (
            opened.enter_context(Group.open((mesh, name), timeout_s=world.timeout_s, arena_bytes=nbytes))
            for name, nbytes in (("tp", arena_bytes), ("dp", SMALL_ARENA))
        )
        yield Layout(world, tp_group, dp_group)


@contextmanager
def enough_memory(ranks: int, mib: int) -> Iterator[None]:
    """Turn a lack of shared memory in the body into a UserError.

    Args:
        ranks: of this host.
        mib: MiB of shared memory for each.

    Raises:
        UserError: shared memory is full; says what is needed and what there is.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        free = os.statvfs("/dev/shm")
        raise UserError(
            f"{ranks} ranks need {ranks * mib} MiB of shared memory and /dev/shm has "
            f"{(free.f_bavail * free.f_frsize) >> 20} MiB free: enlarge it (docker: --shm-size), free some, or take a "
            f"smaller --arena-mib."
        ) from None
