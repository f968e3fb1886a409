"""The mesh of a run: pipeline stages of replicas of a model, each cut over tensor-parallel ranks."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch.distributed.device_mesh import init_device_mesh

from tpkernels.comm.group import Group
from tpkernels.errors import UserError
from tpkernels.shard import part_size, part_start

SMALL_ARENA = 1 << 20
LANE_MIB = 16  # of the communicator that an aggregator opens


class Cut(Protocol):
    """How many ranks share a layer, hold replicas and hold stages, such as a Recipe of the planner."""

    @property
    def tp(self) -> int:
        """Ranks that each part of the model is cut over."""

    @property
    def dp(self) -> int:
        """Replicas."""

    @property
    def pp(self) -> int:
        """Stages."""


@dataclass(frozen=True)
class Mesh:
    """The groups of one rank of pp stages of dp replicas of a model, each cut over tp ranks.

    rank = (stage * dp + replica) * tp + tp.rank, so that the ranks which communicate most are neighbours.

    Attributes:
        world: all ranks of the run.
        tp: the ranks that hold this stage of this replica; the same as `world` when there is nothing else.
        dp: the ranks that hold the same part of other replicas; None when there is one replica.
        pp: the ranks that hold the other stages of this replica; None when the model is in one stage.
    """

    world: Group
    tp: Group
    dp: Group | None = None
    pp: Group | None = None

    @classmethod
    @contextmanager
    def open(
        cls,
        cut: Cut | None = None,
        *,
        tp: int = 1,
        dp: int = 1,
        pp: int = 1,
        world: Group | None = None,
        timeout_s: float = 30.0,
        arena_bytes: int | None = None,
    ) -> Iterator[Mesh]:
        """Divide all ranks into groups of a three-dimensional DeviceMesh (pp, dp, tp); collective over all ranks.

        Args:
            cut: instead of tp, dp and pp, what has them: `planner.plan(...).recipe`.
            tp: ranks that each part of the model is cut over. dp: replicas. pp: stages.
            world: all ranks of the default process group, when they are open already; closed by the caller.
            timeout_s, arena_bytes: as in `Group.open`, of the tp ranks; the other groups carry small messages.

        Raises:
            ValueError: tp, dp or pp are no numbers of 1 or more, or their product is not the number of ranks, or they
                are given beside a cut.
        """
        if cut is not None:
            if (tp, dp, pp) != (1, 1, 1):
                raise ValueError(f"Mesh.open: expected a cut, or tp, dp and pp, got a cut and {tp}, {dp} and {pp}")
            tp, dp, pp = cut.tp, cut.dp, cut.pp
        for name, size in (("tp", tp), ("dp", dp), ("pp", pp)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"Mesh.open: {name} must be an int of 1 or more, got {size!r}")
        with ExitStack() as opened:
            if world is None:
                alone = dp == pp == 1
                world = Group.open(timeout_s=timeout_s, arena_bytes=arena_bytes if alone else SMALL_ARENA)
                opened.enter_context(world)
            if world.world_size != tp * dp * pp:
                raise ValueError(
                    f"Mesh.open: tp * dp * pp = {tp} * {dp} * {pp} = {tp * dp * pp} must be the number of ranks, got "
                    f"{world.world_size}: start {tp * dp * pp} ranks, or give sizes whose product is {world.world_size}"
                )
            if dp == pp == 1:
                yield cls(world, world)
                return
            sizes = {"pp": pp, "dp": dp, "tp": tp}
            mesh = init_device_mesh(world.device.type, (pp, dp, tp), mesh_dim_names=tuple(sizes))
            # Gradients go over a communicator of the aggregator's own; dp and pp carry losses, norms and digests.
            groups = {
                name: opened.enter_context(Group.open((mesh, name), timeout_s=world.timeout_s, arena_bytes=nbytes))
                for name, nbytes in (("tp", arena_bytes), ("dp", SMALL_ARENA), ("pp", SMALL_ARENA))
                if name == "tp" or sizes[name] > 1
            }
            yield cls(world, groups["tp"], groups.get("dp"), groups.get("pp"))

    @property
    def replicas(self) -> int:
        """How many copies of the model there are."""
        return 1 if self.dp is None else self.dp.world_size

    @property
    def transport(self) -> str:
        """The transports of the groups, in words."""
        others = (("replicas", self.dp), ("stages", self.pp))
        return self.tp.transport + "".join(f", between {name} {g.transport}" for name, g in others if g is not None)

    @property
    def replica(self) -> int:
        """The number of the replica of this rank."""
        return 0 if self.dp is None else self.dp.rank

    @property
    def stage(self) -> int:
        """The number of this rank in its pipeline."""
        return 0 if self.pp is None else self.pp.rank


def rows_of(batch: int, dp: Group) -> range:
    """The rows of a batch for this rank's replica; the first replicas take one more where they do not divide.

    Args:
        batch: rows of the whole batch.
        dp: the replicas.
    """
    first = part_start(batch, dp.world_size, dp.rank)
    return range(first, first + part_size(batch, dp.world_size, dp.rank))


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
