"""Collectives of objects over a process group, process groups for threads, and errors that all ranks raise."""

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
    """A group as these collectives need it: a `Group`, or one without tensors."""

    label: str
    rank: int
    world_size: int
    process_group: dist.ProcessGroup | None


def gather(value: T, group: Group | Ranks) -> list[T]:
    """All-gather a value that pickle takes. Waits as long as the process group does: a rank may have a slow disk.

    Args:
        value: this rank's.
        group: the ranks.

    Returns:
        the values in rank order.

    Raises:
        PeerLostError: another rank died or closed the group.
    """
    if group.world_size == 1:
        return [value]
    values: list[T | None] = [None] * group.world_size
    try:
        dist.all_gather_object(values, value, group=group.process_group)
    except RuntimeError as error:  # that of gloo for a closed connection
        why = str(error).splitlines()[0].rpartition("] ")[2].split(". This is")[0]
        raise PeerLostError(
            f"the ranks of group '{group.label}' (this is rank {group.rank} of {group.world_size}) could not exchange "
            f"objects, because one of them died or left ({why})."
        ) from None
    return values  # type: ignore[return-value]


def global_ranks(group: Group | Ranks) -> list[int]:
    """The ranks of a group as numbers in the default process group, in rank order."""
    if group.process_group is None:
        return [dist.get_rank() if dist.is_initialized() else 0]
    return dist.get_process_group_ranks(group.process_group)


def is_cut_among(info: ShardInfo, ranks: Sequence[int]) -> bool:
    """Whether several of these ranks, numbered as in the default process group, hold shards of one tensor."""
    cut = find(name=info.group_name) if info.world_size > 1 else None
    return cut is not None and len(set(global_ranks(cut)) & set(ranks)) > 1


def private_process_group(group: Group | Ranks, user: str, made_by: str, backend: str) -> dist.ProcessGroup:
    """A new process group of the same ranks, for collectives beside those of the group; collective over the group.

    Args:
        group: the ranks; has a process group.
        user: the thread or communicator that uses it; its description is "<label of the group> <user>".
        made_by: the call of a program that makes it, for the message.
        backend: as `torch.distributed.new_group` takes it.

    Raises:
        UnequalGroupsError: torch cannot make one, on all ranks of the group. It names a group of some ranks by the
            number of groups that each of them belongs to, and ranks that use different names wait for ever.
    """
    assert group.process_group is not None, "ranks without a process group have no collectives"
    here = len(dist.distributed_c10d._world.pg_names)
    counts = group.all_gather_ints(here) if isinstance(group, Group) else gather(here, group)
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
    gather_text: Callable[[str | None], list[str | None]] | None = None,
    name: Callable[[int], str] = "rank {}".format,
) -> Iterator[None]:
    """If the body fails on any rank, raise on all ranks, naming the ranks, their errors and the operation; collective.

    Every error is shared, so that no rank waits for one that failed. KeyboardInterrupt and SystemExit are raised as
    they are on their own rank. PeerLostError is not shared.

    Args:
        group: the ranks.
        error_type: of the error on all ranks; the text of one of this type or an OSError is taken without its class.
        doing: the operation, for the text.
        gather_text: gathers one text of each rank; None gathers over the group.
        name: of a rank in the text, by its place in the result of `gather_text`.

    Raises:
        error_type: the body failed on some rank.
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
        problems = gather(problem, group) if gather_text is None else gather_text(problem)
    finally:
        if mine is not None and not isinstance(mine, Exception):
            raise mine
    failed = {number: text for number, text in enumerate(problems) if text is not None}
    if not failed:
        return
    texts = list(dict.fromkeys(failed.values()))
    common = len(failed) == len(problems) and len(texts) == 1
    text = texts[0] if common else "; ".join(f"{name(number)}: {text}" for number, text in failed.items())
    raise error_type(f"{doing}: {text}" if doing else text) from (None if expected else mine)
