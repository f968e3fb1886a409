"""The ranks of a checkpoint, which files they write, and errors that all of them raise together.

A model is cut over the ranks of `group`; `dp_group` joins the ranks that hold the same part in different replicas,
`pp_group` those that hold different stages. Rank t of replica d writes:

    rank-t-of-R.safetensors               replica 0: parameters, buffers, optimizer state, and the rank's own tensors
    rank-t-of-R-replica-d.safetensors     the others: the rank's own tensors (random numbers, state of the aggregator)

and of P stages each writes such files, called rank-t-of-R-stage-s-of-P...
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from tpkernels.comm.group import Group
from tpkernels.comm.objects import Ranks, gather, raise_together
from tpkernels.errors import CheckpointError

T = TypeVar("T")


@dataclass
class ControlGroup:
    """Ranks that exchange objects, without tensors, over a process group of their own."""

    label: str
    rank: int
    world_size: int
    process_group: dist.ProcessGroup | None


@dataclass(frozen=True)
class CheckpointRanks:
    """The ranks that save or load: `tp` ranks of each of `dp` replicas of `pp` stages, and this one among them.

    Attributes:
        group: the ranks over which a replica is cut.
        dp_group: the ranks that hold the same part of each replica; None where there is one replica.
        pp_group: the ranks that hold the stages of this replica; None where each holds the model.
    """

    group: Group | Ranks
    dp_group: Group | Ranks | None = None
    pp_group: Group | Ranks | None = None

    @property
    def rank(self) -> int:
        """Which part of the model this is."""
        return self.group.rank

    @property
    def tp(self) -> int:
        """How many ranks a replica is cut over."""
        return self.group.world_size

    @property
    def replica(self) -> int:
        """Which replica this is."""
        return self.dp_group.rank if self.dp_group is not None else 0

    @property
    def dp(self) -> int:
        """How many replicas there are."""
        return self.dp_group.world_size if self.dp_group is not None else 1

    @property
    def stage(self) -> int:
        """Which of the stages this rank holds, counted by ranks of the pipeline."""
        return self.pp_group.rank if self.pp_group is not None else 0

    @property
    def pp(self) -> int:
        """How many ranks hold the stages of a replica."""
        return self.pp_group.world_size if self.pp_group is not None else 1

    @property
    def file_name(self) -> str:
        """The name of the file that this rank writes."""
        return file_name(self.rank, self.tp, self.replica, self.stage, self.pp)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0 of replica 0 of stage 0, which writes what is written once."""
        return (self.rank, self.replica, self.stage) == (0, 0, 0)

    @property
    def number(self) -> int:
        """This rank among all of them, stage by stage, replica by replica."""
        return (self.stage * self.dp + self.replica) * self.tp + self.rank

    def gather(self, value: T) -> list[T]:
        """Every rank's value, stage by stage, replica by replica."""
        values = gather(value, self.group)
        for group in (self.dp_group, self.pp_group):
            if group is not None:
                values = [v for part in gather(values, group) for v in part]
        return values

    def together(self, doing: str) -> AbstractContextManager[None]:
        """If the body fails on any rank, raise on all, naming the ranks and their errors; collective.

        Args:
            doing: the operation, for the text.

        Raises:
            CheckpointError: the body failed on some rank.
        """
        return raise_together(self.group, CheckpointError, doing, gather_text=self.gather, name=self._name)

    def _name(self, number: int) -> str:
        part, rank = divmod(number, self.tp)
        stage, replica = divmod(part, self.dp)
        text = f"rank {rank}" + (f" of replica {replica}" if self.dp > 1 else "")
        return text + (f" of stage {stage}" if self.pp > 1 else "")


def file_name(rank: int, tp: int, replica: int = 0, stage: int = 0, pp: int = 1) -> str:
    """The name of the file that a rank of `tp` writes."""
    which = (f"-stage-{stage}-of-{pp}" if pp > 1 else "") + (f"-replica-{replica}" if replica else "")
    return f"rank-{rank}-of-{tp}{which}.safetensors"
