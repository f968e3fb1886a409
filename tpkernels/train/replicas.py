"""The replicas of a model in training: their parts of a batch, their averages, and the check that they are equal."""

from __future__ import annotations

import torch
from torch import nn

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.comm.mesh import rows_of
from tpkernels.data_parallel import GradAggregator, OuterSGD, TopK
from tpkernels.train.settings import Settings

TOPK_RATIO = 0.0195  # a value and its index take 6.1 bytes: 3 % of all values in fp32
DELAY_FROM = 10  # steps of mode delayed that are synchronous


class Replicas:
    """This rank's view of the other replicas.

    Attributes:
        rows: the sequences of each batch that this replica trains on.
        weight: factor of this replica's mean loss, so that the average over the replicas is the mean over the batch; 1
            when all have equally many sequences.
        aggregator: of this rank's part of the model.
    """

    def __init__(self, model: nn.Module, group: Group, settings: Settings) -> None:
        """Collective over the ranks of `group`, which hold the same part of each replica."""
        self.model, self.group = model, group
        self.rows = rows_of(settings.batch, group)
        self.weight = len(self.rows) * group.world_size / settings.batch
        self._sent, self._closed = 0, False
        self.aggregator = GradAggregator(
            model,
            group=group,
            codec=settings.grad_codec,
            mode=settings.grad_mode,
            warmup_steps=min(DELAY_FROM, settings.effective_warmup),
            local_steps=settings.local_steps,
            outer=OuterSGD(lr=1.0, momentum=0.0, nesterov=False),  # after so short rounds the plain mean
            topk=_topk(settings),
            zero=settings.zero,
            gather="forward" if settings.zero else "step",
        )

    def mean(self, value: float) -> float:
        """The mean over the replicas, the same bits on all of them."""
        one = torch.tensor([value], dtype=torch.float64)
        return float(ops.all_reduce(one, group=self.group, op="avg").item())

    def wait(self) -> bool:
        """Put the averages into the gradients; whether there are any to apply (see GradAggregator.wait)."""
        return self.aggregator.wait()

    def after_step(self) -> None:
        """Average the parameters when it is time (mode local)."""
        self.aggregator.after_step()

    def drain(self) -> bool:
        """End what is in flight; whether gradients are still to be applied."""
        return self.aggregator.drain()

    @property
    def differ(self) -> bool:
        """Whether replicas have parameters and optimizer state of their own (mode local)."""
        return self.aggregator.mode == "local"

    def bytes_sent(self) -> int:
        """By this rank since the start, for averaging."""
        return self._sent if self._closed else int(self.aggregator.stats()["wire_bytes"])

    def close(self) -> None:
        """Close the aggregator; its counters are kept."""
        self._sent, self._closed = self.bytes_sent(), True
        self.aggregator.close()


def _topk(settings: Settings) -> TopK:
    """The same bytes a step in all modes: fewer messages may be longer."""
    each = settings.local_steps if settings.grad_mode == "local" else 1
    return TopK(min(1.0, TOPK_RATIO * each), warmup_steps=settings.effective_warmup // each)
