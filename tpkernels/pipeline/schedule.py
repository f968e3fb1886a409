"""Pipeline: runs the stages of a model over the micro-batches of a batch, and gives gradients of the whole batch."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.comm.objects import gather
from tpkernels.compress import CODECS
from tpkernels.data_parallel.agree import copies_agree
from tpkernels.data_parallel.digest import digest
from tpkernels.data_parallel.flat import stepped
from tpkernels.errors import PlanError, RankMismatchError
from tpkernels.pipeline.batches import Batch, labels_that_count, refuse_router_losses, signature_of, split_batch
from tpkernels.pipeline.messages import Messages
from tpkernels.pipeline.orders import BACKWARD, INPUT, SCHEDULES, WEIGHT, Action, bubble_of, order_of, stages_on
from tpkernels.pipeline.passes import Aggregator, Passes
from tpkernels.pipeline.stages import HeldStages


@dataclass
class Timing:
    """Seconds of the steps since the start: all, and those in forward and backward passes of this rank."""

    steps_s: float = 0.0
    busy_s: float = 0.0

    @property
    def bubble(self) -> float:
        """The share of its steps in which this rank computed nothing."""
        return 1.0 - self.busy_s / self.steps_s if self.steps_s else 0.0


class Pipeline:
    """The schedule of a pipeline: `step` is the forward and backward pass of a whole batch over all stages.

    Equal to, on every rank of `group`, and with the gradients of the parameters that the rank holds:

        loss = forward(model, **batch)           # of the whole model
        loss.backward()

    where the loss is a mean over the batch; micro-batches are weighted by what they contribute to it. All ranks give
    the same batch: each stage computes its masks and positions from it, and between stages only hidden states are sent.
    Gradients are added to those that are there, so several steps accumulate. After the last one, and after
    `GradAggregator.wait` where there are replicas, call `sum_tied`, then clip, then let the optimizer step:

        pipe.step(**batch)
        aggregator.wait()
        pipe.sum_tied()
        clip_grad_norm_(model, 1.0, groups=[tp], pipeline=pp, tied=pipe.tied_copies)
        optimizer.step()

    Args:
        stages: of the model, as `take_stages` gives them: this rank's are rank, rank + p, ... of p ranks; for
            "dualpipev" rank and 2 p - 1 - rank.
        group: the ranks of the pipeline, on the CPU. Its timeout_s bounds the wait for another stage, which has to
            compute meanwhile.
        schedule: "gpipe", "1f1b", "interleaved" for several stages a rank, or "zb1p" for one or several: gradients of
            weights are computed where a rank would wait, and sent to replicas after the step. Layers whose backward is
            one op, as those of `parallelize`, run it for each half: only stages that are not sharded gain by it.
            "dualpipev" for two stages a rank and at least 2 p micro-batches: the first and the last stage share a rank,
            whose copy of a tied embedding is then one parameter.
        micro_batches: of a batch; it need not divide by them. A batch of fewer rows has one for each row.
        codec: how hidden states are packed between stages. grad_codec: how their gradients are; None: as `codec`.
            fp64 is never packed.
        forward: (model, **micro-batch) -> the loss, a mean; None: the loss that a model of transformers returns.
        weigh: (model, micro-batch) -> over how much its loss is a mean; None: see `labels_that_count`.
        aggregator: of the replicas of this model: it sends gradients from the last backward pass of a step on.

    Attributes:
        timing: of the steps. tied_copies: parameters of this rank that are copies of one of an earlier stage.

    Raises:
        ValueError: an argument does not fit; the ranks differ in their settings or splits (on all ranks).
        RankMismatchError: copies of a tied parameter differ between stages.
    """

    def __init__(
        self,
        stages: HeldStages,
        *,
        group: Group,
        schedule: str = "1f1b",
        micro_batches: int = 1,
        codec: str = "none",
        grad_codec: str | None = None,
        forward: Callable[..., Tensor] | None = None,
        weigh: Callable[[nn.Module, Batch], float] | None = None,
        aggregator: Aggregator | None = None,
    ) -> None:
        grad_codec = codec if grad_codec is None else grad_codec
        if not group.is_cpu:
            raise ValueError(
                f"Pipeline: group must work on the CPU, got {group.device}: stages on GPUs do not exist yet"
            )
        _check_choices(schedule, micro_batches, codec, grad_codec)
        self.stages, self.group, self.schedule, self.micro_batches = stages, group, schedule, micro_batches
        self.model, self.aggregator = stages.model, aggregator
        self._forward, self._weigh = forward or _loss_of, weigh or labels_that_count
        self._count = len(stages.split.stages)
        settings = (schedule, micro_batches, codec, grad_codec, [s.layers for s in stages.split.stages])
        self._check_ranks(settings)
        self._order(micro_batches)
        self._messages = Messages(group, codec, grad_codec, schedule)
        self._checked: set[Any] = set()
        self._broken = False
        self.timing = Timing()
        tied = self._tied()
        self.tied_copies = [p for p, ranks in tied.values() if ranks[0] != group.rank]
        self.check_tied()

    @property
    def bytes_sent(self) -> int:
        """By this rank to other stages since the start."""
        return self._messages.bytes_sent

    def step(self, *, scale: float = 1.0, **batch: Any) -> Tensor:
        """Run a batch forward and backward; a collective over the group.

        Args:
            scale: by which the loss is multiplied before the backward pass, for a replica's share of a batch.
            batch: the arguments of the model: the same on all ranks.

        Returns:
            the loss of the batch, not scaled, fp64, the same on all ranks of the pipeline.

        Raises:
            ValueError: the batch cannot be split, or has no label that counts.
            PlanError: output_router_logits is set: that loss needs the routers of all layers.
            RankMismatchError: another rank has another batch.
            TimeoutError, PeerLostError: another stage is late or lost; names it.
        """
        return self._run(batch, scale, backward=True)

    def evaluate(self, **batch: Any) -> Tensor:
        """The loss of a batch without gradients; otherwise as `step`."""
        with torch.no_grad():
            return self._run(batch, 1.0, backward=False)

    def bubble(self) -> float:
        """The share of the steps so far in which a rank computed nothing, the mean over the pipeline; a collective."""
        mine = torch.tensor([self.timing.bubble], dtype=torch.float64, device=self.group.device)
        return float(ops.all_reduce(mine, group=self.group, op="avg").item())

    @property
    def expected_bubble(self) -> float:
        """That of stages which all take equally long and messages that take no time."""
        return bubble_of(self.group.world_size, self._count // self.group.world_size, self.micro_batches, self.schedule)

    @torch.no_grad()
    def sum_tied(self) -> None:
        """Add up the gradients of each parameter that several stages have a copy of; a collective over the group.

        Sums are in the order of the stages' ranks, in fp32 or better: all copies get the same bits, and optimizers of
        one kind keep them equal. A copy without a gradient counts as zero.
        """
        for parameter, ranks in self._tied().values():
            if not parameter.requires_grad:
                continue
            part = stepped(parameter)  # of equal sizes on all stages
            wide = torch.promote_types(part.dtype, torch.float32)
            gradient = part.grad
            mine = torch.zeros_like(part, dtype=wide) if gradient is None else gradient.to(wide).contiguous()
            every = self._messages.exchange(mine, ranks)
            total = every[0].clone()
            for other in every[1:]:
                total += other
            part.grad = torch.empty_like(part, dtype=part.dtype if gradient is None else gradient.dtype).copy_(total)

    def check_tied(self) -> None:
        """Check that all copies of tied parameters hold the same bits; a collective over the group.

        Raises:
            RankMismatchError: they do not; names the first, on all ranks.
        """
        copies_agree(self.model, self.group).check()

    def _tied(self) -> dict[str, tuple[nn.Parameter, list[int]]]:
        """The parameters here of which other ranks have copies, with all their ranks in order of stages."""
        names = dict(self.model.named_parameters(remove_duplicate=False))
        found = {}
        for first, where in sorted(self.stages.split.tied.items()):
            ranks = list(dict.fromkeys(map(self._messages.rank_of, sorted(where))))
            own = next((name for stage, name in where.items() if stage in self.stages.held), None)
            if own is not None and len(ranks) > 1:
                found[first] = (names[own], ranks)
        return found

    def _order(self, micro_batches: int) -> list[Action]:
        return order_of(self.schedule, self.group, self._count, micro_batches)

    def _check_ranks(self, settings: Any) -> None:
        p, rank = self.group.world_size, self.group.rank
        expected = stages_on(self.schedule, rank, p, self._count)
        problem = None
        if self._count % p or self.stages.held != expected:
            problem = (
                f"rank {rank} of {p} must hold stages {list(expected)} of a multiple of {p}, got "
                f"{list(self.stages.held)} of {self._count}"
            )
        every = gather((problem, settings), self.group)
        texts = [text for text, _ in every if text is not None]
        if texts:
            raise ValueError(f"Pipeline: {texts[0]}")
        for other, (_, theirs) in enumerate(every):
            if theirs != every[0][1]:
                raise ValueError(
                    f"Pipeline: schedule, micro_batches, codec, grad_codec and the layers of the stages must be the "
                    f"same on all ranks of group {self.group.label!r}, got {every[0][1]} on rank 0 and {theirs} on "
                    f"rank {other}"
                )

    def _check_batch(self, batch: Mapping[str, Any]) -> None:
        """Compare each new kind of batch over the ranks: other shapes would let them wait for each other."""
        key = (torch.is_grad_enabled(), signature_of(dict(batch)))
        if key in self._checked:
            return
        tensors = [(n, tuple(x.shape), int(digest(x))) for n, x in sorted(batch.items()) if isinstance(x, Tensor)]
        others = sorted((n, str(x)) for n, x in batch.items() if not isinstance(x, Tensor))
        mine = zlib.crc32(repr((tensors, others)).encode())
        every = self.group.all_gather_ints(mine)
        if len(set(every)) > 1:
            raise RankMismatchError(
                f"Pipeline on group {self.group.label!r}: all ranks must give the same batch, got {list(batch)} of "
                f"digests {every} in rank order: load the same data on all stages"
            )
        self._checked.add(key)

    def _run(self, batch: dict[str, Any], scale: float, *, backward: bool) -> Tensor:
        if self._broken:
            raise RuntimeError("Pipeline: a step has failed, and its messages are lost: make a new Pipeline")
        micros = split_batch(batch, self.micro_batches)
        refuse_router_losses(self.model, batch)
        self._check_batch(batch)
        counts = [float(self._weigh(self.model, micro)) for micro in micros]
        if not sum(counts) > 0:
            raise ValueError("Pipeline: the batch has no label that counts, so its loss is undefined")
        divisor = sum(counts) if batch.get("num_items_in_batch") is None else 1.0
        order = [action for action in self._order(len(micros)) if backward or action.forward]
        begin, self._broken = time.perf_counter(), True
        passes = Passes(self, micros, [count / divisor for count in counts], scale)
        split = any(action.kind == WEIGHT for action in order)
        final = max((i for i, action in enumerate(order) if action.kind == BACKWARD and not split), default=-1)
        for i, action in enumerate(order):
            for coming in order[i : i + 2]:
                passes.expect(coming)
            if action.forward:
                passes.forward(action)
            elif action.kind == INPUT:
                passes.backward_of_input(action)
            elif action.kind == WEIGHT:
                passes.backward_of_weights(action)
            else:
                passes.backward(action, last=i == final)
        if split and self.aggregator is not None:
            self.aggregator.accumulated()
        self._messages.flush()
        loss = ops.all_reduce(passes.loss.to(self.group.device), group=self.group, op="sum")[0]
        self._broken = False
        if backward:
            self.timing.steps_s += time.perf_counter() - begin
            self.timing.busy_s += passes.busy_s
        return loss


def _check_choices(schedule: str, micro_batches: int, codec: str, grad_codec: str) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"Pipeline: schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {schedule!r}")
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 1:
        raise ValueError(f"Pipeline: micro_batches must be an int of 1 or more, got {micro_batches!r}")
    if not {codec, grad_codec} <= set(CODECS):
        raise ValueError(f"Pipeline: codecs must be among {list(CODECS)}, got {codec!r}, {grad_codec!r}")


def _loss_of(model: nn.Module, **batch: Any) -> Tensor:
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    loss: Tensor | None = getattr(model(**options, **batch), "loss", None)
    if loss is None:
        raise PlanError(f"Pipeline: {type(model).__name__} returned no loss: give labels, or forward=")
    return loss
