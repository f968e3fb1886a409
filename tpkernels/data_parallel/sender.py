"""Between autograd and the ranks: takes gradients as backward passes finish them, and sends them off in rounds."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tpkernels import ops

from .buckets import Member, cut_into_buckets, move_state
from .checks import check_kind
from .rounds import Round, Traffic


class Sender:
    """Listens to parameters, and makes one round of each step's gradients.

    Attributes:
        settled: whether the order of the buckets is final. It starts as the reverse order of registration and becomes,
            after the first round, the order in which gradients became ready on rank 0.
        step: number of the next round.
    """

    def __init__(self, members: Sequence[Member], traffic: Traffic, bucket_bytes: int) -> None:
        self._members, self._traffic, self._bucket_bytes = list(members), traffic, bucket_bytes
        self._quiet = self._heard_quietly = False  # inside no_sync; whether gradients came there since the last round
        self._round: Round | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.settled, self.step = False, 0
        self.lay_out([member.index for member in reversed(members)])

    @property
    def busy(self) -> bool:
        """Whether gradients have come that `complete` has not sent."""
        return self._round is not None or self._heard_quietly

    @property
    def order(self) -> list[str]:
        """The names of the parameters, in the order in which they travel."""
        return [member.name for bucket in self._traffic.buckets for member in bucket.members]

    def lay_out(self, order: Sequence[int]) -> None:
        """Cut the parameters into buckets in this order; what is kept of them between steps moves with them."""
        traffic, buckets = self._traffic, cut_into_buckets(self._members, order, self._bucket_bytes)
        traffic.lay_out(buckets, move_state(traffic.buckets, traffic.state, buckets, traffic.kinds))

    def listen(self) -> None:
        """Begin to take gradients."""
        myself = weakref.ref(self)  # the parameters must not keep it alive

        def hook_of(index: int) -> Callable[[Tensor], None]:
            def hook(parameter: Tensor) -> None:
                sender = myself()
                if sender is not None:
                    sender._on_gradient(index, parameter)

            return hook

        for member in self._members:
            listen = member.parameter.register_post_accumulate_grad_hook
            self._hooks.append(listen(hook_of(member.index)))  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Take no more gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Gradients that come inside wait for the next backward pass outside."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def complete(self) -> Round | None:
        """Send what is left of the gradients that have come, and let the next ones belong to the next round.

        Returns:
            the round; None when no gradient has come since the last one, though this rank's count.
        """
        if not self.busy and not self._traffic.weights.is_zero:
            return None
        current = self._round or Round(self._traffic, self.step)
        current.complete(self._gradient)
        if not self.settled:
            self._settle(current)
        self._round, self._heard_quietly = None, False
        self.step += 1
        return current

    def _on_gradient(self, index: int, parameter: Tensor) -> None:
        current, name, gradient = self._round, self._members[index].name, parameter.grad
        if gradient is None:
            return
        check_kind(self._members[index])
        if current is not None and (self._quiet or current.has(index)):
            raise RuntimeError(
                f"GradAggregator: parameter {name!r} got a gradient after that of this step was sent; put all backward "
                f"passes of a step but the last one under no_sync(), and call wait() after each step. (One backward "
                f"pass gives a parameter several gradients where blocks that share it are recomputed by "
                f"torch.utils.checkpoint: take use_reentrant=False there.)"
            )
        if gradient.layout != torch.strided:
            raise ValueError(
                f"GradAggregator: gradients must be dense, got layout {gradient.layout} for parameter {name!r} "
                f"(an embedding with sparse=True?)"
            )
        if self._quiet:
            self._heard_quietly = True
            return
        if self._round is None:
            self._round = Round(self._traffic, self.step)
        self._round.ready(index, gradient)

    def _gradient(self, index: int) -> Tensor | None:
        return self._members[index].parameter.grad

    def _settle(self, first: Round) -> None:
        """Lay the buckets out anew, in the order that rank 0 has seen. A collective."""
        first.finish()  # nothing may be under way in the old ones
        lane = self._traffic.lane
        seen = torch.tensor(first.order, dtype=torch.int32, device=lane.group.device)
        whole = lane.group.world_size * len(self._members)
        every = self._traffic.wait(lane.submit(lambda: ops.all_gather(seen, group=lane.group, dim_size=whole)))
        self.lay_out(every[: len(self._members)].tolist())
        self.settled = True
