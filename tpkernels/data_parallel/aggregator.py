"""GradAggregator: gradients of replicas averaged over the ranks, packed, while the backward pass still runs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tpkernels.comm.group import Group, resolve

from . import checks
from .buckets import fill_state, state_by_name
from .dense import DenseAverage
from .lane import open_lane
from .outer import OuterLoop, OuterSGD
from .rounds import Average, Averages, Traffic
from .sender import Sender
from .sparse import TopK, TopKAverage
from .state import VERSION, AggregatorState, check_loadable
from .weights import Weights, ranks_with

T = TypeVar("T")

BUCKET_BYTES = {"cpu": 1 << 20, "cuda": 25 << 20}
"""Size of messages by device: small enough to leave early, large enough that their latency does not count."""


class GradAggregator:
    """Averages the gradients of a model over the ranks of a data-parallel group.

    Every rank has the same parameters and its own data. One loop serves all modes:

        aggregator = GradAggregator(model, group=dp)
        for batch in data:
            loss(model, batch).backward()            # messages leave as gradients become ready
            if aggregator.wait():                    # p.grad is now the average: the same bits on all ranks
                clip_grad_norm_(model, 1.0, groups=tp)
                optimizer.step()
                aggregator.after_step()
            optimizer.zero_grad()
        if aggregator.drain():                       # what is still under way
            optimizer.step()

    Modes:

    - "sync": each step applies its own average, (g_0 + ... + g_{R-1}) / R. `after_step` and `drain` do nothing.
    - "delayed": step t applies the average of step t - 1, while its own is in flight beside the whole next forward and
      backward pass. The first `warmup_steps` steps are as in "sync"; in the step after them there is nothing to apply
      (`wait` returns False). `drain` gives the last average.
    - "local": `wait` leaves gradients as they are; after every `local_steps` calls of `after_step` the parameters
      become one again through an outer optimizer (see OuterSGD). `drain` does that for the steps that are left.

    Accumulation: all backward passes of a step but the last one under `no_sync()`. Its gradients are summed, not
    averaged, over the passes, as in torch.

    Which parameters: those that require a gradient when the aggregator is made, tied ones once, frozen ones never. One
    that gets no gradient on any rank in a step keeps p.grad = None; where only some ranks have one, the others count as
    zero. With tensor parallelism the group is the data-parallel one: cut or replicated, each parameter is averaged over
    the ranks that hold the same one. Buffers (running statistics) are not touched.

    Loss scaling: a NaN or infinity on one rank shows on all ranks of the group (see `unscale_` for other groups), and
    `set_loss_scale` keeps residuals right when the scale changes.

    The ranks work together over a communicator of their own, so that `group` may be used meanwhile. Ranks agree on the
    order of messages after the first step: that in which gradients became ready on rank 0. Should a rank die or not
    come within the timeout of the group, all others raise PeerLostError or TimeoutError, which name it, from the next
    backward pass or `wait`; local gradients are untouched then.

    Args:
        model: any module, on the device of the group.
        group: the data-parallel ranks; None means all ranks of the default process group. All of them make the
            aggregator, with the same arguments.
        reduce: "mean" over the ranks, weighted where `weigh` says so, or "sum"; mode "local" knows the mean alone.
        codec: how gradients travel: a name in `tpkernels.compress.CODECS`, or "topk" (the largest only; see TopK).
        error_feedback: what packing loses is kept and added to the next message (codec "none" loses nothing, "topk"
            always keeps). Needs fp32 memory of the size of the model.
        mode: "sync", "delayed" or "local".
        bucket_bytes: about how large a message is before it is packed; None: 1 MiB on the CPU, 25 MiB on a GPU.
        gradient_dtype: torch.float32 makes p.grad of bf16 and fp16 parameters fp32 (torch's grad_dtype): passes of an
            accumulation and ranks are then summed in fp32. The optimizer must take that, or get fp32 copies.
        sync_parameters: begin with the parameters of rank 0 instead of demanding that all ranks have the same.
        check_parameters: demand it, of frozen ones too. False is for who resumes mode "local" between two averages,
            where they differ.
        warmup_steps: synchronous steps of mode "delayed".
        local_steps: of mode "local", between two averages.
        outer: the outer optimizer of mode "local".
        topk: settings of codec "topk".

    Raises:
        TypeError, ValueError: an argument; a parameter that cannot be aggregated; settings, parameters or values that
            differ between the ranks (named; on all ranks).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        group: Group | None = None,
        reduce: str = "mean",
        codec: str = "fp16",
        error_feedback: bool = True,
        mode: str = "sync",
        bucket_bytes: int | None = None,
        gradient_dtype: torch.dtype | None = None,
        sync_parameters: bool = False,
        check_parameters: bool = True,
        warmup_steps: int = 10,
        local_steps: int = 16,
        outer: OuterSGD | None = None,
        topk: TopK | None = None,
    ) -> None:
        group = resolve(group)
        bucket_bytes = BUCKET_BYTES[group.device.type] if bucket_bytes is None else bucket_bytes
        outer, topk = outer or OuterSGD(), topk or TopK()
        checks.check_choice(codec, mode, topk)
        weights = Weights(checks.WHO, reduce)
        if reduce != "mean" and mode == "local":
            raise ValueError(f"{checks.WHO}: reduce must be 'mean' in mode 'local', got {reduce!r}")
        checks.check_counts(bucket_bytes=bucket_bytes, warmup_steps=warmup_steps, local_steps=local_steps)
        members = checks.members_of(model, group, codec, gradient_dtype, mode)
        settings = {
            "reduce": reduce, "codec": codec, "error_feedback": error_feedback, "mode": mode,
            "bucket_bytes": bucket_bytes, "gradient_dtype": str(gradient_dtype), "sync_parameters": sync_parameters,
            "check_parameters": check_parameters, "warmup_steps": warmup_steps,
            "local_steps": local_steps, "outer": outer, "topk": topk,
        }  # fmt: skip
        checks.check_ranks(members, settings, group)
        if sync_parameters:
            checks.copy_from_first(model, group)
        elif check_parameters:
            checks.check_same_values(model, group)
        self.group, self.mode, self.codec = group, mode, codec
        self._model, self._members = model, members
        self._warmup_steps, self._local_steps, self._outer_settings = warmup_steps, local_steps, outer
        self._lane = open_lane(group)
        average: Average = TopKAverage(topk) if codec == "topk" else DenseAverage(codec, error_feedback)
        self._traffic = Traffic(self._lane, average, sets=2 if mode == "delayed" else 1, weights=weights)
        self._sender = Sender(members, self._traffic, bucket_bytes)
        self._in_flight: Callable[[], Averages] | None = None
        self._loss_scale = 1.0
        self._outer = OuterLoop(self._traffic, outer) if mode == "local" else None
        if mode != "local":
            checks.set_gradient_dtype(members)
            self._sender.listen()

    # -- the training loop ----------------------------------------------------------------------------------------

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Backward passes inside only add to p.grad; nothing travels. All ranks must use it alike."""
        return self._sender.quiet()

    def weigh(self, weight: float | Tensor) -> None:
        """Say how much this rank's gradients count from the next backward pass on, such as by its number of tokens.

            aggregator.weigh(tokens)                     # before the backward pass; p.grad becomes, with reduce "mean",
            loss.backward()                              # sum_r w_r g_r / sum_r w_r;  with "sum" sum_r w_r g_r

        All ranks call it alike, between steps. It holds until it is called again; a rank of weight 0 needs no backward
        pass, and its gradients count as zero. The sum of the weights travels ahead of the gradients.

        Raises:
            ValueError: the weight is negative or not finite; all ranks have 0 (from the backward pass, or `wait`).
            RuntimeError: mode is "local".
        """
        self._check_between_steps("weigh")
        if self._outer is not None:
            raise RuntimeError(f"GradAggregator.weigh: mode must be 'sync' or 'delayed', got {self.mode!r}")
        self._traffic.weights.set(weight, self._lane)

    def join(self, batches: Iterable[T]) -> Iterator[T | None]:
        """Give this rank's batches, then None until no rank has any more: as many turns on all ranks.

            for batch in aggregator.join(data):          # of any length
                if batch is not None:
                    loss(model, batch).backward()
                aggregator.step(optimizer)               # on all ranks: parameters and optimizers stay the same

        The average is over the ranks that have a batch (`weigh` inside the loop, on all ranks, says otherwise); with
        reduce "sum" the others add nothing. In mode "local" a rank without a batch stays where it is. One small message
        a turn. No rank may leave the loop before the others.
        """
        left = iter(batches)
        while True:
            turn = list(itertools.islice(left, 1))
            if ranks_with(bool(turn), self._lane) == 0:
                break
            if self._outer is None:
                self.weigh(len(turn))
            yield turn[0] if turn else None
        if self._outer is None:
            self.weigh(1)

    def wait(self) -> bool:
        """Put the averages into p.grad; call it after the backward pass, before clipping and optimizer.step.

        Returns:
            whether there is something to apply: False only in mode "delayed", when the first delayed average is in
            flight (every p.grad is then None).

        Raises:
            RuntimeError: no backward pass since the last call; trained parameters of the model have changed (named).
            TimeoutError, PeerLostError, RankMismatchError: of ranks; p.grad is still the local gradient.
        """
        self._lane.check()
        checks.check_unchanged(self._model, self._members)
        if self._outer is not None:
            return True
        late = self.mode == "delayed" and self._sender.step >= self._warmup_steps
        current = self._sender.complete()
        if current is None:
            raise RuntimeError(
                f"GradAggregator.wait: rank {self.group.rank} of group {self.group.label!r} has had no gradient since "
                f"the last wait(): call it once after each backward pass"
            )
        arrived: Callable[[], Averages] | None = current.finish
        if late:
            arrived, self._in_flight = self._in_flight, current.finish
        averages = None if arrived is None else arrived()
        self._deliver(averages or {})
        return averages is not None

    def after_step(self) -> bool:
        """Call it after each optimizer.step. In mode "local" it counts, and averages after `local_steps` of them.

        Returns:
            whether parameters were averaged.

        Raises:
            RuntimeError: a parameter is not finite on some rank (named on all ranks); nothing has changed.
            TimeoutError, PeerLostError: a rank did not come, or died.
        """
        if self._outer is None:
            return False
        self._outer.steps += 1
        if self._outer.steps < self._local_steps:
            return False
        self._outer.step()
        return True

    def drain(self) -> bool:
        """Bring everything to an end: after the last step, and before a checkpoint for another number of ranks.

        Mode "delayed": put the average in flight into p.grad. Mode "local": average the parameters, if there were steps
        since they were one. All ranks must call it.

        Returns:
            whether p.grad holds an average that is still to be applied.
        """
        self._check_between_steps("drain")
        if self._outer is not None and self._outer.steps > 0:
            self._outer.step()
        if self._in_flight is None:
            return False
        averages, self._in_flight = self._in_flight(), None
        self._deliver(averages)
        return True

    def step(self, optimizer: torch.optim.Optimizer, clip: Callable[[], object] | None = None) -> bool:
        """`wait`, clip(), optimizer.step(), `after_step` and zero_grad() in one call, for a plain loop in any mode.

        Returns:
            whether the optimizer made a step.
        """
        ready = self.wait()
        if ready:
            if clip is not None:
                clip()
            optimizer.step()
            self.after_step()
        optimizer.zero_grad()
        return ready

    def set_loss_scale(self, scale: float) -> None:
        """Say by what the loss will be multiplied in the steps to come; call it on all ranks alike, between steps.

        What is kept of earlier gradients, and an average in flight, are then brought to the new scale. With a scaler:

            aggregator.set_loss_scale(scaler.get_scale())            # before the backward passes of a step
        """
        self._check_between_steps("set_loss_scale")
        factor, self._loss_scale = scale / self._loss_scale, scale
        if factor != 1.0:
            in_flight = self._in_flight() if self._in_flight is not None else {}
            flats = [flat for kept in self._traffic.state for flat in kept.values()] if self._outer is None else []
            for kept in (*in_flight.values(), *flats):
                if kept is not None:
                    kept.mul_(factor)

    def restore_parameters(self) -> None:
        """Mode "local": drop what the local steps since the last average changed on this rank; they still count."""
        if self._outer is None:
            raise RuntimeError(f"GradAggregator.restore_parameters: mode must be 'local', got {self.mode!r}")
        self._outer.restore_parameters()

    # -- counting and closing -------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters since the start, or since `reset_stats`: see Group.stats, of what the aggregator sends.

        Returns:
            those, and exposed_seconds: how long the training thread has waited for averages.
        """
        return self._lane.ask(self._lane.group.stats) | {"exposed_seconds": self._traffic.exposed_s}

    def reset_stats(self) -> None:
        """Set all counters to zero."""
        self._lane.ask(self._lane.group.reset_stats)
        self._traffic.exposed_s = 0.0

    def close(self) -> None:
        """Detach from the model and leave the ranks; closing twice does nothing."""
        self._sender.stop()
        self._lane.close()

    def __enter__(self) -> GradAggregator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> AggregatorState:
        """Everything that the next step depends on, of this rank, copied; call it between steps on all ranks alike.

        An average in flight is waited for and saved. Loading it into a new aggregator of the same settings goes on with
        the same bits. For another number of ranks see `reshard_state`. In mode "local" the parameters of the ranks
        differ between two averages, and every rank must save its own (or call `drain` before).
        """
        self._check_between_steps("state_dict")
        tensors = self._kept()
        averages = self._in_flight() if self._in_flight is not None else None
        for index, average in (averages or {}).items():
            if average is not None:
                tensors[f"average.{self._members[index].name}"] = average
        numbers: dict[str, Any] = {
            "version": VERSION, "mode": self.mode, "codec": self.codec, "world_size": self.group.world_size,
            "rank": self.group.rank, "step": self._sender.step, "local_step": self._outer.steps if self._outer else 0,
            "rounds": self._outer.rounds if self._outer else self._sender.step,
            "settled": self._sender.settled, "loss_scale": self._loss_scale,
            "in_flight": averages is not None, "order": self._sender.order,
        }  # fmt: skip
        return {"tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()}, "numbers": numbers}

    def load_state_dict(self, state: AggregatorState) -> None:
        """Go on from what `state_dict` gave; call it between steps.

        Raises:
            ValueError: the state is of another rank, number of ranks, mode or model (says which); nothing has changed.
        """
        numbers, tensors = state["numbers"], state["tensors"]
        self._check_between_steps("load_state_dict")
        mine = {"mode": self.mode, "world_size": self.group.world_size, "rank": self.group.rank}
        expected = {name: tensor.shape for name, tensor in self._kept().items()}
        averages = {m.name: f"average.{m.name}" for m in self._members} if numbers.get("in_flight") else {}
        check_loadable(state, mine, expected, averages.values())
        index = {member.name: member.index for member in self._members}
        if sorted(numbers["order"]) != sorted(index):
            raise ValueError(f"load_state_dict: order must name the parameters {sorted(index)}, got {numbers['order']}")
        if self._in_flight is not None:
            self._in_flight()
        self._sender.lay_out([index[name] for name in numbers["order"]])
        self._sender.step, self._sender.settled = numbers["step"], numbers["settled"]
        self._loss_scale = numbers["loss_scale"]
        fill_state(self._traffic.buckets, self._traffic.state, tensors)
        if self._outer is not None:
            self._outer = OuterLoop(self._traffic, self._outer_settings)
            self._outer.steps, self._outer.rounds = numbers["local_step"], numbers["rounds"]
            fill_state(self._traffic.buckets, self._outer.state, tensors)
        found = {index[name]: tensors[key].clone() if key in tensors else None for name, key in averages.items()}
        self._in_flight = (lambda: found) if numbers["in_flight"] else None

    def _kept(self) -> dict[str, Tensor]:
        kept = state_by_name(self._traffic.buckets, self._traffic.state)
        return kept | (state_by_name(self._traffic.buckets, self._outer.state) if self._outer is not None else {})

    def _deliver(self, averages: Averages) -> None:
        factor = self._traffic.weights.factor(self.group.world_size)
        for member in self._members:
            average = averages.get(member.index)
            member.parameter.grad = average if average is None or factor == 1.0 else average.mul_(factor)

    def _check_between_steps(self, what: str) -> None:
        if self._sender.busy:
            raise RuntimeError(f"GradAggregator.{what}: call it between steps, after wait()")
