"""In which order each rank of a pipeline runs the forward and backward passes of its stages and micro-batches.

"gpipe" and "1f1b" are the orders of torch's ScheduleGPipe and Schedule1F1B, for any number of micro-batches;
"interleaved" and "zb1p" are taken from torch's ScheduleInterleaved1F1B and ScheduleInterleavedZeroBubble themselves.
"zb1p" splits a backward pass: the gradient of its input is sent first, and those of the weights are computed where a
rank would wait. Stage s is on rank s % ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from tpkernels.comm.group import Group

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb1p")
FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"  # torch's names


class Action(NamedTuple):
    """A pass of one micro-batch through one stage.

    Attributes:
        kind: FORWARD, BACKWARD, or the halves of the latter: INPUT, the gradient of the input, and WEIGHT, the others.
        stage, micro: the numbers.
    """

    kind: str
    stage: int
    micro: int

    @property
    def forward(self) -> bool:
        """Whether it is a forward pass."""
        return self.kind == FORWARD


def order_of(schedule: str, group: Group, num_stages: int, micro_batches: int) -> list[Action]:
    """The actions of this rank, in order.

    Raises:
        ValueError: the schedule does not take so many stages or micro-batches.
    """
    ranks, rank = group.world_size, group.rank
    if ranks > 1 and (schedule == "zb1p" or (schedule == "interleaved" and num_stages > ranks)):
        return _of_torch(schedule, group, num_stages, micro_batches)
    own = range(rank, num_stages, ranks)
    if schedule == "gpipe" or (ranks == 1 and len(own) > 1):
        forward = [Action(FORWARD, stage, micro) for stage in own for micro in range(micro_batches)]
        return forward + [Action(BACKWARD, stage, micro) for stage in reversed(own) for micro in range(micro_batches)]
    if len(own) > 1:
        raise ValueError(
            f"Pipeline: schedule {schedule!r} runs one stage a rank, got {num_stages} stages over {ranks} ranks: take "
            f"'interleaved' or 'zb1p'"
        )
    ahead = min(micro_batches, ranks - rank)  # forward passes before the first backward pass
    actions = [Action(FORWARD, rank, micro) for micro in range(ahead)]
    for micro in range(micro_batches):
        actions.append(Action(BACKWARD, rank, micro))
        if ahead + micro < micro_batches:
            actions.append(Action(FORWARD, rank, ahead + micro))
    return actions


def bubble_of(ranks: int, stages_per_rank: int, micro_batches: int, schedule: str = "1f1b") -> float:
    """The share of a step that a rank waits where all stages take equally long: (p - 1) / (v m + p - 1).

    Of "zb1p", where gradients of inputs and of weights take as long as a forward pass: (p - 1) / (3 v m + p - 1).
    """
    each = 3 if schedule == "zb1p" else 1
    return (ranks - 1) / (each * stages_per_rank * micro_batches + ranks - 1)


def _of_torch(name: str, group: Group, num_stages: int, micro_batches: int) -> list[Action]:
    from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble

    own = range(group.rank, num_stages, group.world_size)
    place, pg = torch.device("cpu"), group.process_group
    stages = [PipelineStage(nn.Identity(), stage, num_stages, place, group=pg) for stage in own]
    kind = ScheduleInterleavedZeroBubble if name == "zb1p" else ScheduleInterleaved1F1B
    try:
        schedule = kind(stages, micro_batches, loss_fn=torch.sum)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"Pipeline: torch's {kind.__name__}: {error}") from None
    found = []
    for action in schedule.pipeline_order[group.rank]:
        if action is not None:
            what = action.computation_type.value
            micro = action.microbatch_index
            assert what in (FORWARD, BACKWARD, INPUT, WEIGHT) and micro is not None, f"of this schedule: {action}"
            found.append(Action(what, action.stage_index, micro))
    return found
