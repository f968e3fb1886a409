"""In which order each rank of a pipeline runs the forward and backward passes of its stages and micro-batches.

"gpipe" and "1f1b" are the orders of torch's ScheduleGPipe and Schedule1F1B, for any number of micro-batches;
"interleaved" is taken from torch's ScheduleInterleaved1F1B itself. Stage s is on rank s % ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from tpkernels.comm.group import Group

SCHEDULES = ("gpipe", "1f1b", "interleaved")


class Action(NamedTuple):
    """A pass of one micro-batch through one stage: forward, or backward."""

    forward: bool
    stage: int
    micro: int


def order_of(schedule: str, group: Group, num_stages: int, micro_batches: int) -> list[Action]:
    """The actions of this rank, in order.

    Raises:
        ValueError: the schedule does not take so many stages or micro-batches.
    """
    ranks, rank = group.world_size, group.rank
    if schedule == "interleaved" and ranks > 1 and num_stages > ranks:
        return _of_torch(group, num_stages, micro_batches)
    own = range(rank, num_stages, ranks)
    if schedule == "gpipe" or (ranks == 1 and len(own) > 1):
        forward = [Action(True, stage, micro) for stage in own for micro in range(micro_batches)]
        return forward + [Action(False, stage, micro) for stage in reversed(own) for micro in range(micro_batches)]
    if len(own) > 1:
        raise ValueError(
            f"Pipeline: schedule {schedule!r} runs one stage a rank, got {num_stages} stages over {ranks} ranks: take "
            f"'interleaved'"
        )
    ahead = min(micro_batches, ranks - rank)  # forward passes before the first backward pass
    actions = [Action(True, rank, micro) for micro in range(ahead)]
    for micro in range(micro_batches):
        actions.append(Action(False, rank, micro))
        if ahead + micro < micro_batches:
            actions.append(Action(True, rank, ahead + micro))
    return actions


def bubble_of(ranks: int, stages_per_rank: int, micro_batches: int) -> float:
    """The share of a step that a rank waits where all stages take equally long: (p - 1) / (v m + p - 1)."""
    return (ranks - 1) / (stages_per_rank * micro_batches + ranks - 1)


def _of_torch(group: Group, num_stages: int, micro_batches: int) -> list[Action]:
    from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B

    own = range(group.rank, num_stages, group.world_size)
    place, pg = torch.device("cpu"), group.process_group
    stages = [PipelineStage(nn.Identity(), stage, num_stages, place, group=pg) for stage in own]
    try:
        schedule = ScheduleInterleaved1F1B(stages, micro_batches, loss_fn=torch.sum)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"Pipeline: torch's interleaved schedule: {error}") from None
    found = []
    for action in schedule.pipeline_order[group.rank]:
        if action is not None:
            kind = action.computation_type.value
            assert kind in ("F", "B") and action.microbatch_index is not None, f"an action of this schedule: {action}"
            found.append(Action(kind == "F", action.stage_index, action.microbatch_index))
    return found
