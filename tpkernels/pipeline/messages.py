"""What the stages send each other: hidden states and their gradients, packed by a codec, without waiting for the
receiver.

A message is a tensor of torch.distributed's isend and irecv between two ranks of the pipeline, marked by stage and
micro-batch. Sender and receiver know its shape once a micro-batch of the same shapes has passed; the first of them is
preceded by a header.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.comm.objects import global_ranks
from tpkernels.compress import PACKABLE, wire_bytes
from tpkernels.errors import PeerLostError
from tpkernels.pipeline.orders import rank_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_DIMS = 8


@dataclass(frozen=True)
class Kind:
    """Shape and dtype of hidden states, and whether a gradient goes back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    has_gradient: bool

    @classmethod
    def of(cls, hidden: Tensor) -> Kind:
        """That of hidden states that a stage returned.

        Raises:
            TypeError, ValueError: they cannot be sent.
        """
        if not isinstance(hidden, Tensor) or hidden.dtype not in DTYPES or hidden.dim() > MOST_DIMS:
            what = f"{hidden.dtype} of {hidden.dim()} dims" if isinstance(hidden, Tensor) else type(hidden).__name__
            raise TypeError(
                f"Pipeline: hidden states must be a floating tensor of {MOST_DIMS} dims at most, got {what}"
            )
        return cls(tuple(hidden.shape), hidden.dtype, hidden.requires_grad)

    def header(self) -> Tensor:
        """As integers."""
        numbers = [DTYPES.index(self.dtype), int(self.has_gradient), len(self.shape), *self.shape]
        return torch.tensor(numbers + [0] * (3 + MOST_DIMS - len(numbers)), dtype=torch.int64)

    @classmethod
    def parse(cls, header: Tensor) -> Kind:
        """The inverse of `header`."""
        dtype, has_gradient, dims, *sizes = header.tolist()
        return cls(tuple(sizes[:dims]), DTYPES[dtype], bool(has_gradient))


@dataclass
class _Posted:
    """A message that is under way to this rank."""

    work: Any
    buffer: Tensor
    kind: Kind
    codec: str
    what: str


class Messages:
    """The messages of one rank of a pipeline.

    Args:
        group: the ranks of the pipeline.
        codec: packs hidden states. grad_codec: packs their gradients. fp64 is never packed.
        schedule: decides which rank has a stage.

    Attributes:
        bytes_sent: since the start.
    """

    def __init__(self, group: Group, codec: str, grad_codec: str, schedule: str = "1f1b") -> None:
        self.group, self._codecs, self._schedule = group, (codec, grad_codec), schedule
        self._ranks = global_ranks(group)
        self._kinds: dict[tuple[int, Hashable], Kind] = {}
        self._posted: dict[tuple[int, int, bool], _Posted] = {}
        self._local: dict[tuple[int, int, bool], Tensor | None] = {}
        self._sent: list[tuple[Any, Tensor]] = []
        self.bytes_sent = 0

    def rank_of(self, stage: int) -> int:
        """The rank of the pipeline that has a stage."""
        return rank_of(self._schedule, stage, self.group.world_size)

    def send(self, stage: int, micro: int, hidden: Tensor, signature: Hashable) -> None:
        """Send the hidden states that enter a stage.

        Args:
            stage: that receives them. micro: the number of the micro-batch.
            signature: the same for all micro-batches of the same shapes.
        """
        kind = Kind.of(hidden)
        if self.rank_of(stage) == self.group.rank:
            self._local[stage, micro, False] = hidden.detach().requires_grad_(kind.has_gradient)
            return
        known = self._kinds.get((stage, signature))
        if known is None:
            self._kinds[stage, signature] = kind
            self._isend(kind.header(), stage, self._tag(stage, micro, False) + 1)
        elif known != kind:
            raise RuntimeError(
                f"Pipeline: the hidden states that enter stage {stage} were {known} for inputs of these shapes, and "
                f"are {kind} now"
            )
        self._isend(self._pack(hidden.detach(), self._codecs[0]), stage, self._tag(stage, micro, False))

    def send_gradient(self, stage: int, micro: int, gradient: Tensor) -> None:
        """Send the gradient of the hidden states that entered stage + 1 back to `stage`."""
        if self.rank_of(stage) == self.group.rank:
            self._local[stage, micro, True] = gradient
            return
        self._isend(self._pack(gradient, self._codecs[1]), stage, self._tag(stage, micro, True))

    def expect(self, stage: int, micro: int, signature: Hashable) -> None:
        """Let hidden states arrive ahead of `receive`, where their shape is known."""
        kind = self._kinds.get((stage, signature))
        if kind is not None and self.rank_of(stage - 1) != self.group.rank:
            self._post(stage, micro, kind)

    def expect_gradient(self, stage: int, micro: int, kind: Kind) -> None:
        """Let a gradient arrive ahead of `receive_gradient`."""
        if kind.has_gradient and self.rank_of(stage + 1) != self.group.rank:
            self._post(stage, micro, kind, gradient=True)

    def receive(self, stage: int, micro: int, signature: Hashable) -> Tensor:
        """The hidden states that enter a stage, as a leaf that requires a gradient where one is sent back."""
        if self.rank_of(stage - 1) == self.group.rank:
            found = self._local.pop((stage, micro, False))
            assert found is not None
            return found
        if (stage, signature) not in self._kinds:
            header = torch.empty(3 + MOST_DIMS, dtype=torch.int64)
            what = f"the shape of micro-batch {micro} for stage {stage}"
            self._wait(self._irecv(header, stage - 1, self._tag(stage, micro, False) + 1), what, stage - 1)
            self._kinds[stage, signature] = Kind.parse(header.cpu())
        kind = self._kinds[stage, signature]
        self._post(stage, micro, kind)
        return self._take(stage, micro, False, stage - 1).requires_grad_(kind.has_gradient)

    def receive_gradient(self, stage: int, micro: int, kind: Kind) -> Tensor | None:
        """The gradient of what a stage returned."""
        if self.rank_of(stage + 1) == self.group.rank:
            return self._local.pop((stage, micro, True))
        self._post(stage, micro, kind, gradient=True)
        return self._take(stage, micro, True, stage + 1)

    def send_to_all(self, micro: int, numbers: Tensor) -> None:
        """Send int64 numbers from the last stage to all other ranks."""
        for rank in range(self.group.world_size - 1):
            self._isend(numbers, rank, self._tag(0, micro, True))

    def receive_from_last(self, micro: int, count: int) -> Tensor:
        """The numbers that the last stage has sent to all, int64 [count]."""
        found, last = torch.empty(count, dtype=torch.int64), self.group.world_size - 1
        self._wait(self._irecv(found, last, self._tag(0, micro, True)), f"the tokens of flight {micro}", last)
        return found

    def exchange(self, mine: Tensor, ranks: list[int]) -> list[Tensor]:
        """The tensors of one shape and dtype that some ranks of the pipeline hold, in the order of `ranks`."""
        found = {self.group.rank: mine}
        waits = []
        for rank in ranks:
            if rank != self.group.rank:
                self._isend(mine, rank, 0)
                found[rank] = torch.empty_like(mine)
                waits.append((self._irecv(found[rank], rank, 0), rank))
        for work, rank in waits:
            self._wait(work, "the gradient of a tied parameter", rank)
        self.flush()
        return [found[rank] for rank in ranks]

    def flush(self) -> None:
        """Wait until all messages of this rank have left; in a step the last ones are received by then."""
        sent, self._sent = self._sent, []
        for work, _ in sent:
            self._wait(work, "a message to be taken", None)

    def _tag(self, stage: int, micro: int, gradient: bool) -> int:
        return 1 + 2 * (2 * ((micro << 8) + stage) + gradient)

    def _codec(self, codec: str, dtype: torch.dtype) -> str:
        return codec if dtype in PACKABLE else "none"

    def _pack(self, x: Tensor, codec: str) -> Tensor:
        codec = self._codec(codec, x.dtype)
        return x.contiguous() if codec == "none" else ops.compress(x, codec)

    def _isend(self, x: Tensor, stage: int, tag: int) -> None:
        self.bytes_sent += x.numel() * x.element_size()
        work = dist.isend(x, self._ranks[self.rank_of(stage)], group=self.group.process_group, tag=tag)
        self._sent.append((work, x))

    def _irecv(self, x: Tensor, stage: int, tag: int) -> Any:
        return dist.irecv(x, self._ranks[self.rank_of(stage)], group=self.group.process_group, tag=tag)

    def _post(self, stage: int, micro: int, kind: Kind, *, gradient: bool = False) -> None:
        key = (stage, micro, gradient)
        if key in self._posted:
            return
        codec = self._codec(self._codecs[gradient], kind.dtype)
        if codec == "none":
            buffer = torch.empty(kind.shape, dtype=kind.dtype, device=self.group.device)
        else:
            size = wire_bytes(codec, math.prod(kind.shape), kind.dtype.itemsize)
            buffer = torch.empty(size, dtype=torch.uint8, device=self.group.device)
        source = stage + 1 if gradient else stage - 1
        what = f"the {'gradient' if gradient else 'hidden states'} of micro-batch {micro} for stage {stage}"
        work = self._irecv(buffer, source, self._tag(stage, micro, gradient))
        self._posted[key] = _Posted(work, buffer, kind, codec, what)

    def _take(self, stage: int, micro: int, gradient: bool, source: int) -> Tensor:
        posted = self._posted.pop((stage, micro, gradient))
        self._wait(posted.work, posted.what, source)
        if posted.codec == "none":
            return posted.buffer
        return ops.decompress(posted.buffer, posted.kind.shape, posted.kind.dtype, posted.codec)

    def _wait(self, work: Any, what: str, source: int | None) -> None:
        """Wait for one message.

        Raises:
            TimeoutError: it did not come within the timeout of the group.
            PeerLostError: the other rank died or closed its connections.
        """
        g = self.group
        try:
            if math.isinf(g.timeout_s):
                work.wait()
            else:
                work.wait(timedelta(seconds=g.timeout_s))
        except RuntimeError as error:
            other = "" if source is None else f" from stage {source} (rank {self.rank_of(source)})"
            text = f"Pipeline on group {g.label!r} (rank {g.rank} of {g.world_size}): waited for {what}{other}"
            if "imed out" in str(error):
                raise TimeoutError(
                    f"{text}, which did not come within {g.timeout_s:g} s. If that rank is only slow, raise "
                    f"Group.open(timeout_s=...)"
                ) from None
            raise PeerLostError(f"{text}, and that rank died or left ({str(error).splitlines()[0]})") from None
