"""replicas_agree: whether the replicas of a model hold the same bits, and if not, which parameter differs first."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpkernels.comm.group import Group, find, resolve
from tpkernels.comm.mesh import Mesh
from tpkernels.comm.objects import gather, global_ranks
from tpkernels.data_parallel.digest import digest
from tpkernels.data_parallel.flat import finish_parameters
from tpkernels.errors import RankMismatchError
from tpkernels.layers.base import mark_shards
from tpkernels.shard import ShardInfo, full_shape, shard_info

Entry = tuple[str, str, int]
"""Of one tensor: its name, a description for messages, the digest of its bits."""


@dataclass(frozen=True)
class Agreement:
    """The result of `replicas_agree`; true in an `if` when the replicas agree. The same on all ranks.

    Attributes:
        agree: whether all ranks hold the same bits.
        first: the name of the first parameter or buffer that differs, None when none does.
        ranks: the ranks whose bits there are not those of most ranks (of the lowest rank, where there is no majority).
        text: one sentence about it.
    """

    agree: bool
    first: str | None
    ranks: tuple[int, ...]
    text: str

    def __bool__(self) -> bool:
        return self.agree

    def check(self) -> None:
        """Raise RankMismatchError, on all ranks, unless they agree."""
        if not self.agree:
            raise RankMismatchError(self.text)


def replicas_agree(
    model: nn.Module, *, group: Group | None = None, mesh: Mesh | None = None, buffers: bool = True
) -> Agreement:
    """Compare the bits of all parameters and buffers over the ranks of a group.

    Equal to, with a digest of 64 bits in the place of every tensor:

        all(torch.equal(p_0, p_r) for every parameter and buffer p and every rank r), where NaN equals itself bit by bit
        and 0.0 is not -0.0

    Over a data-parallel group everything is compared: rank r holds the same part of a cut parameter as all ranks of
    that group do. Over the group over which a parameter is cut its parts differ by design: of those only name, dtype
    and the unsharded shape are compared, so that the replicated parameters remain.

    Over a mesh it is all of that: over its dp, over its tp, and over its pp the copies of parameters that several
    stages have.

    Costs a pass over the model (2 GB/s and more on one core) and one small collective. Where the ranks differ they also
    gather the digests of all tensors.

    Args:
        model: any module, on any device. A tied parameter counts once, under its first name.
        group: the ranks; None means all ranks of the default process group. All of them must call this.
        mesh: in the place of a group: of a run. All ranks of it must call this.
        buffers: compare buffers, too. Running statistics, as of nn.BatchNorm, differ between replicas that train.

    Returns:
        an Agreement. A rank with other names, shapes or dtypes is named like one with other bits.

    Raises:
        ValueError: a parameter or buffer without bits of its own: on the meta device, sparse, a DTensor; both a group
            and a mesh.
        TimeoutError, PeerLostError: a rank was later than `group.timeout_s`, or died; the text names it.
    """
    what = "parameters and buffers" if buffers else "parameters"
    if mesh is None:
        group = resolve(group)
        return agreement("replicas_agree", entries_of("replicas_agree", model, group, buffers), group, what)
    if group is not None:
        raise ValueError("replicas_agree: give a group or a mesh, got both")
    over = [g for g in (mesh.dp, mesh.tp) if g is not None]
    found = [agreement("replicas_agree", entries_of("replicas_agree", model, g, buffers), g, what) for g in over]
    if mesh.pp is not None:
        found.append(copies_agree(model, mesh.pp))
    every = gather(next((one for one in found if not one), None), mesh.world)
    text = f"all {mesh.world.world_size} ranks hold the same {what} where they hold the same of the model"
    return next((one for one in every if one is not None), Agreement(True, None, (), text))


def copies_agree(model: nn.Module, pipeline: Group) -> Agreement:
    """Compare the parameters that several stages of a pipeline have a copy of; a collective over its ranks.

    Args:
        model: of which `pipeline.take_stages` has left some stages; of another nothing is compared.
        pipeline: the ranks that hold the stages.
    """
    stages = getattr(model, "tpk_stages", None)
    mine: dict[str, tuple[list[int], int]] = {}
    if stages is not None:
        named = dict(model.named_parameters(remove_duplicate=False))
        for first, where in stages.split.tied.items():
            own = next((named[name] for stage, name in where.items() if stage in stages.held), None)
            if own is not None and not own.is_meta:
                mine[first] = list(own.shape), int(digest(own))
    every = gather(mine, pipeline)
    for first in dict.fromkeys(name for there in every for name in there):
        found = {rank: there[first] for rank, there in enumerate(every) if first in there}
        usual = Counter(map(repr, found.values())).most_common(1)[0][0]
        if ranks := tuple(rank for rank, value in found.items() if repr(value) != usual):
            text = (
                f"group {pipeline.label!r}: the copies of {first} must hold the same values on the ranks "
                f"{list(found)}, got (shape, digest) {list(found.values())}"
            )
            return Agreement(False, first, ranks, text)
    return Agreement(True, None, (), f"the copies of {len(mine)} parameters hold the same values")


def agreement(who: str, mine: list[Entry], group: Group, what: str) -> Agreement:
    """Compare entries over the ranks; a collective of one small message where they are equal.

    Args:
        who: the public function, for the text.
        mine: the entries of this rank, in the same order on all ranks.
        group: the ranks.
        what: the kind of the entries, for the text.
    """
    total = hashlib.blake2b(repr(mine).encode(), digest_size=8).digest()
    totals = group.all_gather_ints(int.from_bytes(total, "little") >> 1)
    if len(set(totals)) == 1:
        return Agreement(True, None, (), f"all {group.world_size} ranks hold the same {len(mine)} {what}")
    return _compare(who, gather(mine, group), group)


def _compare(who: str, every: list[list[Entry]], group: Group) -> Agreement:
    """The first place at which the lists of the ranks differ."""
    for i in range(max(map(len, every))):
        found = [entries[i] if i < len(entries) else None for entries in every]
        if len(set(found)) == 1:
            continue
        # Counter keeps the order of insertion, so that of equally frequent ones the lowest rank's is first.
        usual = Counter(found).most_common(1)[0][0]
        ranks = tuple(rank for rank, entry in enumerate(found) if entry != usual)
        named = usual or next(entry for entry in found if entry is not None)
        others = {rank: entry for rank, entry in enumerate(found) if entry != usual}
        text = f"{who} on group {group.label!r}: {named[0]!r} is the first to differ, on ranks {list(ranks)}: "
        return Agreement(False, named[0], ranks, text + _difference(usual, next(iter(others.values())), ranks[0]))
    raise AssertionError("other digests of equal lists")


def _difference(usual: Entry | None, other: Entry | None, rank: int) -> str:
    def describe(entry: Entry | None) -> str:
        return "nothing" if entry is None else f"{entry[0]!r} ({entry[1]})"

    if usual is not None and other is not None and usual[:2] == other[:2]:
        return f"other bits in {usual[1]}, digest {other[2]:016x} on rank {rank}, {usual[2]:016x} elsewhere"
    return f"{describe(other)} on rank {rank}, {describe(usual)} elsewhere"


def entries_of(who: str, model: nn.Module, group: Group, buffers: bool) -> list[Entry]:
    """The entries of all tensors of a model, each once, in their order; one copy from the device for all digests.

    Args:
        who: the public function, for messages.
        model: any module.
        group: the ranks; of a parameter that is cut over them only name, dtype and full shape are compared.
        buffers: include buffers.

    Raises:
        TypeError, ValueError: it is no module, or has a tensor without bits of its own.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be a torch.nn.Module, got {type(model).__name__}")
    finish_parameters()
    mark_shards(model)
    tensors = list(_named(model, buffers))
    digests, what = [], []
    for name, tensor in tensors:
        _check(who, name, tensor)
        info = shard_info(tensor)
        cut = info is not None and _is_cut_over(info, group)
        shape = full_shape(tensor) if cut else tensor.shape
        dtype = str(tensor.dtype).removeprefix("torch.")
        what.append(f"{dtype} {list(shape)}" + (", cut over this group" if cut else ""))
        digests.append(torch.zeros((), dtype=torch.int64) if cut else digest(tensor))
    numbers = torch.stack([d.to(group.device) for d in digests]).tolist() if digests else []
    return [(name, text, number % 2**64) for (name, _), text, number in zip(tensors, what, numbers, strict=True)]


def _named(model: nn.Module, buffers: bool) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    if buffers:
        yield from model.named_buffers()


def _check(who: str, name: str, tensor: Tensor) -> None:
    if tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(
            f"{who}: {name!r} must be dense and hold values, got layout {tensor.layout} on {tensor.device}"
        )
    if type(tensor.data) is not Tensor:
        raise ValueError(f"{who}: {name!r} must be a plain tensor, got {type(tensor.data).__name__}")


def _is_cut_over(info: ShardInfo, group: Group) -> bool:
    """Whether the group is the one over which the parameter is cut, or another one of the same ranks."""
    if info.group_name == group.name:
        return True
    cut = find(name=info.group_name)
    if cut is None:  # closed, or opened by another process: what survives is the label
        return (info.group_label, info.world_size) == (group.label, group.world_size)
    return global_ranks(cut) == global_ranks(group)
