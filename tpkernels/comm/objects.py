"""What ranks tell each other besides tensors, over which process groups, and errors that all of them see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from tpkernels.comm.group import Group, find
from tpkernels.errors import PeerLostError, UnequalGroupsError
from tpkernels.shard import ShardInfo

T = TypeVar("T")


class Ranks(Protocol):
    """What is asked of a group here: a `Group`, or one that only tells, without tensors."""

    label: str
    rank: int
    world_size: int
    process_group: dist.ProcessGroup | None


def gather(value: T, group: Group | Ranks) -> list[T]:
    """Every rank's value, in rank order. Waits as long as the process group does: a rank may have a slow disk.

    Raises:
        PeerLostError: another rank died or left.
    """
    if group.world_size == 1:
        return [value]
    values: list[T | None] = [None] * group.world_size
    try:
        dist.all_gather_object(values, value, group=group.process_group)
    except RuntimeError as error:  # what gloo makes of a closed connection
        why = str(error).splitlines()[0].rpartition("] ")[2].split(". This is")[0]
        raise PeerLostError(
            f"the ranks of group '{group.label}' (this is rank {group.rank} of {group.world_size}) could not tell each "
            f"other how they stand, because one of them died or left ({why})."
        ) from None
    return values  # type: ignore[return-value]


def global_ranks(group: Group | Ranks) -> list[int]:
    """The ranks of a group as the default process group counts them, in rank order."""
    if group.process_group is None:
        return [dist.get_rank() if dist.is_initialized() else 0]
    return dist.get_process_group_ranks(group.process_group)


def is_cut_among(info: ShardInfo, ranks: Sequence[int]) -> bool:
    """Whether several of these ranks, counted as the default process group does, hold parts of one tensor."""
    cut = find(name=info.group_name) if info.world_size > 1 else None
    return cut is not None and len(set(global_ranks(cut)) & set(ranks)) > 1


def private_process_group(group: Group | Ranks, user: str, made_by: str, backend: str) -> dist.ProcessGroup:
    """A new process group of the same ranks, for one who speaks beside the others; a collective over the group.

    Args:
        group: the ranks; has a process group.
        user: who speaks there; messages call it "<label of the group> <user>".
        made_by: what a program calls to have it made.
        backend: as `torch.distributed.new_group` takes it.

    Raises:
        UnequalGroupsError: torch cannot make one, on all ranks of the group. It names a group of some ranks by how many
            each of them belongs to, and ranks that look for each other under different names wait for ever.
    """
    assert group.process_group is not None, "ranks without a process group have nobody to speak with"
    here = len(dist.distributed_c10d._world.pg_names)
    counts = group.exchange_sizes(here) if isinstance(group, Group) else gather(here, group)
    if len(set(counts)) > 1:
        raise UnequalGroupsError(
            f"group {group.label!r}: its {user} needs a process group of its own, and torch can make one only where "
            f"all its ranks belong to equally many process groups, got {counts} in rank order; create it ({made_by}) "
            f"before the process groups that only some of these ranks belong to"
        )
    ranks, desc = global_ranks(group), f"{group.label} {user}"
    order: dict[str, Any] = {} if ranks == sorted(ranks) else {"sort_ranks": False}  # older torch has sorted ones only
    made: dist.ProcessGroup = dist.new_group(
        ranks, backend=backend, use_local_synchronization=True, group_desc=desc, **order
    )
    return made


@contextmanager
def raise_together(
    group: Group | Ranks,
    error_type: type[Exception],
    doing: str,
    *,
    ask: Callable[[str | None], list[str | None]] | None = None,
    name: Callable[[int], str] = "rank {}".format,
) -> Iterator[None]:
    """If the body fails on any rank, raise on all ranks, naming the ranks, what they met and what they were `doing`.

    Whatever the error is, the others are told, so that none waits for a rank that does not come. What asks for the end
    of the program (KeyboardInterrupt, SystemExit) stays that on its own rank. PeerLostError is not shared.

    Args:
        ask: gives what each rank says; None asks those of the group. `name` calls one by its place among these.
    """
    mine: BaseException | None = None
    try:
        yield
    except PeerLostError:
        raise
    except BaseException as error:
        mine = error
    expected = mine is None or isinstance(mine, (error_type, OSError))
    problem = None if mine is None else str(mine) if expected else f"{type(mine).__name__}: {mine}".removesuffix(": ")
    try:
        problems = gather(problem, group) if ask is None else ask(problem)
    finally:
        if mine is not None and not isinstance(mine, Exception):
            raise mine
    met = {number: text for number, text in enumerate(problems) if text is not None}
    if not met:
        return
    texts = list(dict.fromkeys(met.values()))
    common = len(met) == len(problems) and len(texts) == 1
    text = texts[0] if common else "; ".join(f"{name(number)}: {text}" for number, text in met.items())
    raise error_type(f"{doing}: {text}" if doing else text) from (None if expected else mine)
