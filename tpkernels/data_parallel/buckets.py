"""Buckets: which parameters share a message. Pure bookkeeping, no communication.

A bucket is filled in the order in which a backward pass finishes gradients, so that its message can be sent early.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpkernels.shard import part_start

ALIGNED = 64
"""Values. The loops of optimizers round the last values of a tensor, which fill no vector, in another way: a part that
begins and ends at a multiple of the vectors' width has the bits of the full tensor."""
Kind = tuple[torch.dtype, torch.Size, torch.device]


def kind_of(tensor: Tensor) -> Kind:
    """Dtype, shape and device."""
    return tensor.dtype, tensor.shape, tensor.device


@dataclass(frozen=True)
class Member:
    """A parameter that is trained.

    Attributes:
        index: its place among the trained parameters of the model, the same on all ranks.
        name: in the model; of tied ones the first.
        parameter: the tensor itself.
        dtype: of its values in buckets, that of its gradient.
        made_as: the `kind_of` the parameter when this was made.
    """

    index: int
    name: str
    parameter: nn.Parameter
    dtype: torch.dtype
    made_as: Kind

    @property
    def numel(self) -> int:
        """Values in it."""
        return self.parameter.numel()


class Bucket:
    """Members whose gradients are one flat message, of one dtype on one device.

    Args:
        members: in their order in the message.
        ranks: the message is scattered over so many: members begin, and even parts end, at multiples of ALIGNED, with
            zeros in between. 0: members follow each other.

    Attributes:
        members: as given.
        numel: values of the message.
        dtype, device: of the message.
    """

    def __init__(self, members: Sequence[Member], ranks: int = 0) -> None:
        self.members = list(members)
        self.dtype = members[0].dtype
        self.device = members[0].parameter.device
        unit = ALIGNED if ranks else 1
        sizes = [-(-member.numel // unit) * unit for member in members]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        whole = unit * max(1, ranks)
        self.numel = -(-sum(sizes) // whole) * whole

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """A flat tensor of its size: what belongs to no member is zero, the members are uninitialised."""
        make = torch.empty if self.numel == sum(member.numel for member in self.members) else torch.zeros
        return make(self.numel, dtype=dtype or self.dtype, device=self.device)

    def zeros(self, dtype: torch.dtype | None = None) -> Tensor:
        """A flat tensor of its size, zero."""
        return torch.zeros(self.numel, dtype=dtype or self.dtype, device=self.device)

    def part(self, flat: Tensor, position: int) -> Tensor:
        """The part of the member at this position, in its shape: a view."""
        member = self.members[position]
        return flat.narrow(0, self._starts[position], member.numel).view(member.parameter.shape)

    def bounds(self, position: int, R: int) -> tuple[int, ...]:
        """Where the even parts of R ranks cut the values of a member: R + 1 numbers from 0 to its numel."""
        start, size = self._starts[position], self.members[position].numel
        cuts = [*(part_start(self.numel, R, rank) for rank in range(R)), self.numel]
        return tuple(min(max(cut - start, 0), size) for cut in cuts)

    def piece(self, part: Tensor, position: int, R: int, rank: int) -> Tensor:
        """The values of the member at this position in the even part of a rank, one dim: a view."""
        begin, end = self.bounds(position, R)[rank : rank + 2]
        at = self._starts[position] + begin - part_start(self.numel, R, rank) if end > begin else 0
        return part.narrow(0, at, end - begin)

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of all members by name: views."""
        return {member.name: self.part(flat, i) for i, member in enumerate(self.members)}


def cut_into_buckets(
    members: Sequence[Member],
    order: Sequence[int],
    bucket_bytes: int,
    alone: frozenset[int] = frozenset(),
    ranks: int = 0,
) -> list[Bucket]:
    """Cut the members into buckets, in this order.

    Members of different dtypes, or with gradients of different dtypes, never share a bucket. A bucket ends with the
    member that brings it to bucket_bytes or beyond, so that none waits for a large one behind it. Buckets are in the
    order in which they become full.

    Args:
        members: all of them.
        order: their indices, in the order in which they become ready.
        bucket_bytes: about the size of a bucket.
        alone: indices of members that have a bucket of their own.
        ranks: over which messages are scattered; see Bucket.
    """
    open_ones: dict[Hashable, list[Member]] = {}
    sizes: dict[Hashable, int] = {}
    buckets: list[list[Member]] = []
    for index in order:
        member = members[index]
        if index in alone:
            buckets.append([member])
            continue
        kind = (member.dtype, member.parameter.dtype)
        open_ones.setdefault(kind, []).append(member)
        sizes[kind] = sizes.get(kind, 0) + member.numel * member.dtype.itemsize
        if sizes[kind] >= bucket_bytes:
            buckets.append(open_ones.pop(kind))
            sizes[kind] = 0
    place = {index: i for i, index in enumerate(order)}
    rest = sorted(open_ones.values(), key=lambda waiting: place[waiting[-1].index])
    return [Bucket(found, ranks) for found in [*buckets, *rest]]


def move_state(
    old: Sequence[Bucket], old_state: Sequence[dict[str, Tensor]], new: Sequence[Bucket], kinds: Sequence[str]
) -> list[dict[str, Tensor]]:
    """Lay the state of each parameter out for new buckets.

    Args:
        old, old_state: the buckets so far, and for each of them its flat fp32 tensors by kind.
        new: the new buckets, of the same members.
        kinds: of the state; zero where there was none.

    Returns:
        for each new bucket its flat fp32 tensors by kind.
    """
    moved = [{kind: bucket.zeros(torch.float32) for kind in kinds} for bucket in new]
    if old:
        fill_state(new, moved, state_by_name(old, old_state))
    return moved


def state_by_name(buckets: Sequence[Bucket], state: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The flat tensors of all buckets, cut into {"<kind>.<parameter>": view in the shape of the parameter}."""
    found: dict[str, Tensor] = {}
    for bucket, kinds in zip(buckets, state, strict=True):
        for kind, flat in kinds.items():
            found |= {f"{kind}.{name}": part for name, part in bucket.parts(flat).items()}
    return found


def fill_state(buckets: Sequence[Bucket], state: Sequence[dict[str, Tensor]], by_name: dict[str, Tensor]) -> None:
    """The inverse of state_by_name: copy the values of by_name into the flat tensors."""
    for name, part in state_by_name(buckets, state).items():
        part.copy_(by_name[name])
