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
from .dense import DenseAverage
from .flat import flat_shard, mark_flat, unmark_flat
from .lane import open_lane
from .modes import Delayed, Local, Mode, Synchronous
from .outer import OuterSGD
from .rounds import Average, Traffic
from .scattered import ParameterGather, ScatteredAverage
from .sender import Sender
from .sparse import TopK, TopKAverage
from .state import VERSION, AggregatorState, check_loadable
from .weights import Weights, ranks_with

T = TypeVar("T")

BUCKET_BYTES = {"cpu": 1 << 20, "cuda": 25 << 20}
"""Size of messages by device: small enough to be sent early, large enough that their latency does not count."""


class GradAggregator:
    """Averages the gradients of a model over the ranks of a data-parallel group.

    Every rank has the same parameters and its own data. One loop serves all modes:

        aggregator = GradAggregator(model, group=dp)
        for batch in data:
            loss(model, batch).backward()            # messages are sent as gradients become ready
            if aggregator.wait():                    # p.grad is now the average: the same bits on all ranks
                clip_grad_norm_(model, 1.0, groups=tp)
                optimizer.step()
                aggregator.after_step()
            optimizer.zero_grad()
        if aggregator.drain():                       # averages that are still in flight
            optimizer.step()

    Modes:

    - "sync": each step applies its own average, (g_0 + ... + g_{R-1}) / R. `after_step` and `drain` do nothing.
    - "delayed": step t applies the average of step t - 1, while its own is in flight beside the whole next forward and
      backward pass. The first `warmup_steps` steps are as in "sync"; in the step after them there is nothing to apply
      (`wait` returns False). `drain` gives the last average.
    - "local": `wait` leaves gradients as they are; after every `local_steps` calls of `after_step` an outer optimizer
      makes the parameters equal again (see OuterSGD). `drain` does that for the steps that are left.

    Accumulation: all backward passes of a step but the last one under `no_sync()`. Its gradients are summed, not
    averaged, over the passes, as in torch.

    Which parameters: those that require a gradient when the aggregator is made, tied ones once, frozen ones never. One
    that gets no gradient on any rank in a step keeps p.grad = None; where only some ranks have one, the others count as
    zero. With tensor parallelism the group is the data-parallel one: cut or replicated, each parameter is averaged over
    the ranks that hold the same one. Buffers (running statistics) are not touched.

    Loss scaling: a NaN or infinity on one rank shows on all ranks of the group (see `unscale_` for other groups), and
    `set_loss_scale` keeps residuals right when the scale changes.

    Optimizer state cut over the ranks (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054): with `zero` each rank gets its
    part of the averages only, of even size, and updates that part of the parameters; the loop is the same, with

        aggregator = GradAggregator(model, group=dp, zero=1)
        optimizer = zero_optimizer(torch.optim.AdamW, aggregator, lr=1e-3)

    Messages go over a communicator of the aggregator's own, so that `group` may be used meanwhile. Their order is fixed
    after the first step: that in which gradients became ready on rank 0. Should a rank die or be later than the timeout
    of the group, all others raise PeerLostError or TimeoutError, which name it, from the next backward pass or `wait`;
    local gradients are untouched then.

    Args:
        model: any module, on the device of the group.
        group: the data-parallel ranks; None means all ranks of the default process group. All of them make the
            aggregator, with the same arguments.
        reduce: "mean" over the ranks, weighted where `weigh` was called, or "sum"; mode "local" takes "mean" only.
        codec: how gradients are packed: a name in `tpkernels.compress.CODECS`, or "topk" (the largest only; see TopK).
        error_feedback: what packing loses is kept and added to the next message (codec "none" loses nothing, "topk"
            always keeps). Needs fp32 memory of the size of the model.
        mode: "sync", "delayed" or "local".
        bucket_bytes: about how large a message is before it is packed; None: 1 MiB on the CPU, 25 MiB on a GPU.
        gradient_dtype: torch.float32 makes p.grad of bf16 and fp16 parameters fp32 (torch's grad_dtype): passes of an
            accumulation and ranks are then summed in fp32. The optimizer must take that, or get fp32 copies.
        sync_parameters: copy the parameters of rank 0 to all ranks, instead of checking that they are the same.
        check_parameters: check it, of frozen ones too. False is for a run of mode "local" that resumes between two
            averages, where they differ.
        warmup_steps: synchronous steps of mode "delayed".
        local_steps: of mode "local", between two averages.
        outer: the outer optimizer of mode "local".
        topk: settings of codec "topk".
        zero: 0: every rank gets all averages. 1: its part of them, for `zero_optimizer`; gradients are scattered while
            the backward pass still runs, and p.grad is None after `wait`. 2: so, and each gradient is freed as soon as
            it is in its message, and that when it has arrived; an accumulation keeps gradients up to its last pass. 1
            and 2 are of mode "sync", not of codec "topk". The codec packs each contribution once.
        gather: with `zero`, when the parameters that the others have updated are there: "step": after the optimizer's
            step, or "forward": before the forward of their module; until then they begin with NaN. State dicts,
            checkpoints and `replicas_agree` wait for them, other readers call `wait_for_parameters`. Not for models
            that are compiled as a whole.

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
        zero: int = 0,
        gather: str = "step",
    ) -> None:
        group = resolve(group)
        bucket_bytes = BUCKET_BYTES[group.device.type] if bucket_bytes is None else bucket_bytes
        outer, topk = outer or OuterSGD(), topk or TopK()
        checks.check_choice(codec, mode, topk)
        checks.check_zero(zero, codec, mode, gather)
        weights = Weights(checks.WHO, reduce)
        if reduce != "mean" and mode == "local":
            raise ValueError(f"{checks.WHO}: reduce must be 'mean' in mode 'local', got {reduce!r}")
        checks.check_counts(bucket_bytes=bucket_bytes, warmup_steps=warmup_steps, local_steps=local_steps)
        members = checks.members_of(model, group, codec, gradient_dtype, mode)
        settings = {
            "reduce": reduce, "codec": codec, "error_feedback": error_feedback, "mode": mode,
            "bucket_bytes": bucket_bytes, "gradient_dtype": str(gradient_dtype), "sync_parameters": sync_parameters,
            "check_parameters": check_parameters, "warmup_steps": warmup_steps, "local_steps": local_steps,
            "outer": outer, "topk": topk, "zero": zero, "gather": gather,
        }  # fmt: skip
        checks.check_ranks(members, settings, group)
        if sync_parameters:
            checks.copy_from_first(model, group)
        elif check_parameters:
            checks.check_same_values(model, group)
        self.group, self.mode, self.codec, self.zero = group, mode, codec, zero
        self._model, self._members = model, members
        self.parameters = [member.parameter for member in members]
        self._lane = open_lane(group)
        average: Average = TopKAverage(topk) if codec == "topk" else DenseAverage(codec, error_feedback)
        alone: frozenset[int] | None = None
        if zero:
            average, alone = ScatteredAverage(codec, error_feedback), checks.copied_over_stages(model, members)
        sets = 2 if mode == "delayed" else 1
        self._traffic = Traffic(self._lane, average, sets, weights, drop=zero == 2)
        self._sender = Sender(members, self._traffic, bucket_bytes, alone)
        for bucket in self._traffic.buckets:
            for i, member in enumerate(bucket.members):
                unmark_flat(member.parameter)
                if zero:
                    mark_flat(member.parameter, bucket.bounds(i, group.world_size), group, member.dtype)
        self._gather = ParameterGather(model, self._lane, self._traffic.buckets, late=gather == "forward")
        self._loss_scale = 1.0
        self._mode: Mode
        if mode == "local":
            self._mode = Local(self._sender, local_steps, outer)
        elif mode == "delayed":
            self._mode = Delayed(group, self._sender, warmup_steps)
        else:
            self._mode = Synchronous(group, self._sender)

    def gather_parameters(self) -> None:
        """With zero=1 or 2: put the parts that the ranks have updated into the parameters; a collective."""
        if self.zero:
            self._gather.start()

    def wait_for_parameters(self) -> None:
        """Wait for the parameters that are under way, of gather="forward"; errors are those of `wait`."""
        self._gather.finish()

    # -- the training loop ----------------------------------------------------------------------------------------

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Backward passes inside only add to p.grad; nothing is sent. All ranks must use it alike."""
        return self._sender.quiet()

    def accumulated(self) -> None:
        """Count the gradients that were added to p.grad by hand, and not by a backward pass: `wait` sends them."""
        self._sender.accumulated()

    def weigh(self, weight: float | Tensor) -> None:
        """Set the weight of this rank's gradients from the next backward pass on, such as its number of tokens.

            aggregator.weigh(tokens)                     # before the backward pass; p.grad becomes, with reduce "mean",
            loss.backward()                              # sum_r w_r g_r / sum_r w_r;  with "sum" sum_r w_r g_r

        All ranks call it alike, between steps. It holds until it is called again; a rank of weight 0 needs no backward
        pass, and its gradients count as zero. The sum of the weights is sent ahead of the gradients.

        Args:
            weight: finite, 0 or more; of a tensor its one value.

        Raises:
            ValueError: the weight is negative or not finite; all ranks have 0 (from the backward pass, or `wait`).
            RuntimeError: mode is "local".
        """
        self._check_between_steps("weigh")
        self._mode.weigh(weight)

    def join(self, batches: Iterable[T]) -> Iterator[T | None]:
        """Yield this rank's batches, then None until no rank has any more: as many turns on all ranks.

            for batch in aggregator.join(data):          # of any length
                if batch is not None:
                    loss(model, batch).backward()
                aggregator.step(optimizer)               # on all ranks: parameters and optimizers stay the same

        The average is over the ranks that have a batch (`weigh` inside the loop, on all ranks, sets other weights);
        with reduce "sum" the others add nothing. In mode "local" a rank without a batch makes no step. One small
        message a turn. No rank may end the loop before the others.

        Args:
            batches: of this rank; how many may differ between the ranks.
        """
        left = iter(batches)
        while True:
            turn = list(itertools.islice(left, 1))
            if ranks_with(bool(turn), self._lane) == 0:
                break
            self._check_between_steps("join")
            self._mode.weigh_batches(len(turn))
            yield turn[0] if turn else None
        self._check_between_steps("join")
        self._mode.weigh_batches(1)

    def wait(self) -> bool:
        """Put the averages into p.grad; call it after the backward pass, before clipping and optimizer.step.

        Returns:
            whether there is something to apply: False only in mode "delayed", when the first delayed average is in
            flight (every p.grad is then None).

        Raises:
            RuntimeError: no backward pass since the last call; trained parameters, or gradients that were sent already,
                have changed (named).
            TimeoutError, PeerLostError, RankMismatchError: of ranks; p.grad is still the local gradient.
        """
        self._lane.check()
        checks.check_unchanged(self._model, self._members)
        return self._mode.wait()

    def after_step(self) -> bool:
        """Call it after each optimizer.step. In mode "local" it counts, and averages after `local_steps` of them.

        Returns:
            whether parameters were averaged.

        Raises:
            RuntimeError: a parameter is not finite on some rank (named on all ranks); nothing has changed.
            TimeoutError, PeerLostError: a rank was late, or died.
        """
        return self._mode.after_step()

    def drain(self) -> bool:
        """End what is in flight: after the last step, and before a checkpoint for another number of ranks.

        Mode "delayed": put the average in flight into p.grad. Mode "local": average the parameters, if there were steps
        since they were equal. All ranks must call it.

        Returns:
            whether p.grad holds an average that is still to be applied.
        """
        self._check_between_steps("drain")
        return self._mode.drain()

    def step(self, optimizer: torch.optim.Optimizer, clip: Callable[[], object] | None = None) -> bool:
        """`wait`, clip(), optimizer.step(), `after_step` and zero_grad() in one call, for a plain loop in any mode.

        Args:
            optimizer: of the model's parameters.
            clip: called without arguments before the step of the optimizer.

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
        """Set the factor of the loss in later steps, above 0; call it on all ranks alike, between steps.

        The residuals of earlier gradients, and an average in flight, are brought to the new scale. With a scaler:

            aggregator.set_loss_scale(scaler.get_scale())            # before the backward passes of a step
        """
        self._check_between_steps("set_loss_scale")
        factor, self._loss_scale = checks.checked_scale(checks.WHO, scale) / self._loss_scale, scale
        if factor != 1.0:
            self._mode.rescale(factor)

    def restore_parameters(self) -> None:
        """Mode "local": set the parameters of this rank to the last average; the local steps since then still count.

        Raises:
            RuntimeError: mode is not "local".
        """
        self._mode.restore_parameters()

    def stats(self) -> dict[str, Any]:
        """Counters since the start, or since `reset_stats`: see Group.stats, of the aggregator's communicator.

        Returns:
            those, and exposed_seconds: how long the training thread has waited for averages.
        """
        return self._lane.call(self._lane.group.stats) | {"exposed_seconds": self._traffic.exposed_s}

    def reset_stats(self) -> None:
        """Set all counters to zero."""
        self._lane.call(self._lane.group.reset_stats)
        self._traffic.exposed_s = 0.0

    def close(self) -> None:
        """Remove the hooks from the model and close the communicator; closing twice does nothing."""
        self._sender.stop()
        try:
            self._gather.close()
        finally:
            self._lane.close()
        for member in self._members:
            if (flat := flat_shard(member.parameter)) is not None and flat.group is self.group:
                unmark_flat(member.parameter)

    def __enter__(self) -> GradAggregator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> AggregatorState:
        """The state of this rank on which the next step depends, copied; call it between steps on all ranks alike.

        An average in flight is waited for and saved. A new aggregator of the same settings that loads it continues with
        the same bits. For another number of ranks see `reshard_state`. In mode "local" the parameters of the ranks
        differ between two averages, and every rank must save its own (or call `drain` before).
        """
        self._check_between_steps("state_dict")
        averages = self._mode.in_flight()
        tensors = self._mode.kept() | (averages or {})
        numbers: dict[str, Any] = {
            "version": VERSION, "mode": self.mode, "codec": self.codec, "world_size": self.group.world_size,
            "rank": self.group.rank, "loss_scale": self._loss_scale, "in_flight": averages is not None,
        }  # fmt: skip
        numbers |= self._sender.numbers() | self._mode.numbers()
        return {"tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()}, "numbers": numbers}

    def check_state_dict(self, state: AggregatorState) -> None:
        """Check that `load_state_dict` can take a state; nothing changes.

        Raises:
            ValueError: the state is of another rank, number of ranks, mode or model (says which).
            RuntimeError: within a step.
        """
        self._check_between_steps("load_state_dict")
        numbers = state["numbers"]
        mine = {"mode": self.mode, "world_size": self.group.world_size, "rank": self.group.rank}
        expected = {name: tensor.shape for name, tensor in self._mode.kept().items()}
        averages = [f"average.{member.name}" for member in self._members if numbers.get("in_flight")]
        check_loadable(state, mine, expected, averages)
        names = sorted(member.name for member in self._members)
        if sorted(numbers["order"]) != names:
            raise ValueError(f"load_state_dict: order must name the parameters {names}, got {numbers['order']}")

    def load_state_dict(self, state: AggregatorState) -> None:
        """Continue from a state that `state_dict` returned; call it between steps.

        Raises:
            ValueError: the state is of another rank, number of ranks, mode or model (says which); nothing has changed.
        """
        self.check_state_dict(state)
        self._mode.load(state)
        self._loss_scale = state["numbers"]["loss_scale"]

    def _check_between_steps(self, what: str) -> None:
        if self._sender.busy:
            raise RuntimeError(f"GradAggregator.{what}: call it between steps, after wait()")
