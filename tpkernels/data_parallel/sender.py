"""The sender: takes gradients as backward passes finish them, and sends them to the other ranks in rounds."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tpkernels import ops
from tpkernels.errors import shorten
from tpkernels.shard import begin_to_check

from .buckets import Member, cut_into_buckets, fill_state, move_state
from .checks import check_kind
from .rounds import Round, Traffic
from .state import AggregatorState


class Sender:
    """Makes one round of each step's gradients, which hooks on the parameters report.

    Args:
        members: the trained parameters.
        traffic: the messages; the sender lays out its buckets.
        bucket_bytes: about the size of a message.
        alone: indices of parameters that have a message of their own. With them, or none of them, given the order of
            messages is the reverse order of registration for good, and they are scattered; None: neither.

    Attributes:
        members, traffic: as given.
        order_is_final: whether the order of the buckets is final. It is the reverse order of registration at first and,
            after the first round, the order in which gradients became ready on rank 0.
        step: number of the next round.
    """

    def __init__(
        self, members: Sequence[Member], traffic: Traffic, bucket_bytes: int, alone: frozenset[int] | None = None
    ) -> None:
        self.members, self.traffic, self._bucket_bytes = list(members), traffic, bucket_bytes
        self._alone, self._fixed = alone or frozenset[int](), alone is not None
        self._quiet = self._accumulated = False  # inside no_sync; whether there were gradients in it
        self._round: Round | None = None
        self._sent: dict[int, tuple[int, int]] = {}  # by parameter: id and version of the gradient that a message has
        self._versions: dict[int, int] = {}  # by memory: the last of them, because views of one tensor share theirs
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.order_is_final, self.step = self._fixed, 0
        self.lay_out([member.index for member in reversed(members)])

    @property
    def busy(self) -> bool:
        """Whether there are gradients that `complete` has not sent."""
        return self._round is not None or self._accumulated

    @property
    def order(self) -> list[str]:
        """The names of the parameters, in the order of the messages."""
        return [member.name for bucket in self.traffic.buckets for member in bucket.members]

    def lay_out(self, order: Sequence[int]) -> None:
        """Cut the parameters, named by index, into buckets in this order; their state is moved to the new buckets."""
        traffic = self.traffic
        ranks = traffic.lane.group.world_size if self._fixed else 0
        buckets = cut_into_buckets(self.members, order, self._bucket_bytes, self._alone, ranks)
        traffic.lay_out(buckets, move_state(traffic.buckets, traffic.state, buckets, traffic.kinds))

    def numbers(self) -> dict[str, Any]:
        """Its part of the state of an aggregator, for `load`."""
        return {"step": self.step, "settled": self.order_is_final, "order": self.order}

    def load(self, state: AggregatorState) -> None:
        """Continue from a state that was checked: order and number of the next round, and residuals."""
        index, numbers = {member.name: member.index for member in self.members}, state["numbers"]
        self.step = numbers["step"]
        if not self._fixed:
            self.lay_out([index[name] for name in numbers["order"]])
            self.order_is_final = numbers["settled"]
        fill_state(self.traffic.buckets, self.traffic.state, state["tensors"])

    def listen(self) -> None:
        """Begin to take gradients."""
        begin_to_check()
        myself = weakref.ref(self)  # the hooks of parameters must not keep it alive

        def hook_of(index: int) -> Callable[[Tensor], None]:
            def hook(parameter: Tensor) -> None:
                sender = myself()
                if sender is not None:
                    sender._on_gradient(index, parameter)

            return hook

        for member in self.members:
            listen = member.parameter.register_post_accumulate_grad_hook
            self._hooks.append(listen(hook_of(member.index)))  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Take no more gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Gradients inside are sent with the next backward pass outside."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def accumulated(self) -> None:
        """There are gradients that no hook has reported."""
        self._accumulated = True

    def complete(self) -> Round | None:
        """Send the gradients of this round that are left; later ones belong to the next round.

        Returns:
            the round; None when there was no gradient since the last one and the weight of this rank is not 0.

        Raises:
            RuntimeError: a gradient has been changed since it was sent; the round has ended on all ranks.
        """
        if not self.busy and not self.traffic.weights.is_zero:
            return None
        current = self._round or Round(self.traffic, self.step)
        current.complete(self._gradient)
        if not self.order_is_final:
            self._reorder(current)
        changed = [self.members[index].name for index in self._sent if self._changed(index)]
        self._round, self._accumulated = None, False
        self._sent, self._versions = {}, {}
        self.step += 1
        if changed:
            current.finish()  # the next round uses its memory
            raise RuntimeError(
                f"GradAggregator.wait: {shorten(changed)}: the gradient was changed after the backward pass had sent "
                f"it, and the average does not have that: unscale, clip and step after wait(); hooks that change "
                f"gradients must be those of Tensor.register_hook, or older than the aggregator"
            )
        return current

    def _changed(self, index: int) -> bool:
        gradient, (number, version) = self.members[index].parameter.grad, self._sent[index]
        if gradient is None:  # freed, which loses nothing
            return False
        known = version, self._versions.get(gradient.untyped_storage()._cdata)
        return id(gradient) != number or gradient._version not in known

    def _on_gradient(self, index: int, parameter: Tensor) -> None:
        current, name, gradient = self._round, self.members[index].name, parameter.grad
        if gradient is None:
            return
        check_kind(self.members[index])
        if current is not None and (self._quiet or current.has(index)):
            self._sent.pop(index, None)  # torch has added to it already; this error is enough
            raise RuntimeError(
                f"GradAggregator: parameter {name!r} got a gradient after that of this step was sent; put all backward "
                f"passes of a step but the last one under no_sync(), and call wait() after each step, also after one "
                f"whose backward pass failed. (One backward pass gives a parameter several gradients where blocks that "
                f"share it are recomputed by torch.utils.checkpoint: take use_reentrant=False there.)"
            )
        if gradient.layout != torch.strided:
            raise ValueError(
                f"GradAggregator: gradients must be dense, got layout {gradient.layout} for parameter {name!r} "
                f"(an embedding with sparse=True?)"
            )
        if self._quiet:
            self._accumulated = True
            return
        if self._round is None:
            self._round = Round(self.traffic, self.step)
        self._round.ready(index, gradient)
        if self.traffic.drop:
            parameter.grad = None
        else:
            self._sent[index] = id(gradient), gradient._version
            self._versions[gradient.untyped_storage()._cdata] = gradient._version

    def _gradient(self, index: int) -> Tensor | None:
        return self.members[index].parameter.grad

    def _reorder(self, first: Round) -> None:
        """Lay the buckets out anew, in the order in which gradients became ready on rank 0. A collective."""
        first.finish()  # no message may be under way in the old ones
        lane = self.traffic.lane
        seen = torch.tensor(first.order, dtype=torch.int32, device=lane.group.device)
        whole = lane.group.world_size * len(self.members)
        every = self.traffic.wait(lane.submit(lambda: ops.all_gather(seen, group=lane.group, dim_size=whole)))
        self.lay_out(every[: len(self.members)].tolist())
        self.order_is_final = True
