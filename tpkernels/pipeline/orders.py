"""In which order each rank of a pipeline runs the forward and backward passes of its stages and micro-batches.

"gpipe" and "1f1b" are the orders of torch's ScheduleGPipe and Schedule1F1B, for any number of micro-batches;
"interleaved", "zb1p" and "dualpipev" are taken from torch's ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble and
ScheduleDualPipeV themselves. "zb1p" splits a backward pass: the gradient of its input is sent first, and those of the
weights are computed where a rank would wait; "dualpipev" splits some. Stage s is on rank s % ranks; of "dualpipev",
whose 2 R stages go through the R ranks and back, on rank min(s, 2 R - 1 - s).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from tpkernels.comm.group import Group

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb1p", "dualpipev")
OF_TORCH = {
    "interleaved": "ScheduleInterleaved1F1B",
    "zb1p": "ScheduleInterleavedZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}
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


def rank_of(schedule: str, stage: int, ranks: int) -> int:
    """The rank that has a stage."""
    return min(stage, 2 * ranks - 1 - stage) if schedule == "dualpipev" else stage % ranks


def stages_on(schedule: str, rank: int, ranks: int, num_stages: int) -> tuple[int, ...]:
    """The stages of a rank, in order: what `take_stages` must leave there."""
    return tuple(stage for stage in range(num_stages) if rank_of(schedule, stage, ranks) == rank)


def order_of(schedule: str, group: Group, num_stages: int, micro_batches: int) -> list[Action]:
    """The actions of this rank, in order.

    Raises:
        ValueError: the schedule does not take so many stages or micro-batches.
    """
    ranks, rank = group.world_size, group.rank
    if schedule == "dualpipev" and num_stages != 2 * ranks:
        raise ValueError(f"Pipeline: schedule 'dualpipev' has two stages on each of {ranks} ranks, got {num_stages}")
    if ranks > 1 and (schedule in ("zb1p", "dualpipev") or (schedule == "interleaved" and num_stages > ranks)):
        return _of_torch(schedule, group, num_stages, micro_batches)
    own = stages_on(schedule, rank, ranks, num_stages)
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

    Of "zb1p" and "dualpipev", where gradients of inputs and of weights take as long as a forward pass:
    (p - 1) / (3 v m + p - 1).
    """
    each = 3 if schedule in ("zb1p", "dualpipev") else 1
    return (ranks - 1) / (each * stages_per_rank * micro_batches + ranks - 1)


def _of_torch(name: str, group: Group, num_stages: int, micro_batches: int) -> list[Action]:
    from torch.distributed import pipelining

    kind = getattr(pipelining, OF_TORCH[name], None)
    if kind is None:
        raise ValueError(f"Pipeline: torch {torch.__version__} has no {OF_TORCH[name]}, of which {name!r} is the order")
    own = stages_on(name, group.rank, group.world_size, num_stages)
    place, pg = torch.device("cpu"), group.process_group
    stages = [pipelining.PipelineStage(nn.Identity(), stage, num_stages, place, group=pg) for stage in own]
    try:
        schedule = kind(stages, micro_batches, loss_fn=torch.sum)
    except ValueError as error:
        raise ValueError(f"Pipeline: torch's {kind.__name__}: {error}") from None
    found = []
    for entry in schedule.pipeline_order[group.rank]:
        for action in () if entry is None else entry.sub_actions or (entry,):  # a pair runs one after the other
            what = action.computation_type.value
            micro = action.microbatch_index
            assert what in (FORWARD, BACKWARD, INPUT, WEIGHT) and micro is not None, f"of this schedule: {action}"
            found.append(Action(what, action.stage_index, micro))
    return found
