"""What ranks tell each other besides tensors, and errors that all of them see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch.distributed as dist

from tpkernels.errors import PeerLostError
from tpkernels.group import Group

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


@contextmanager
def raise_together(group: Group, error_type: type[Exception], doing: str) -> Iterator[None]:
    """If the body fails on any rank, raise on all ranks, naming the ranks, what they met and what they were `doing`.

    Only expected failures are shared: `error_type` and OSError. Anything else is a bug and goes its own way.
    """
    problem: str | None = None
    try:
        yield
    except (error_type, OSError) as error:
        problem = str(error)
    problems = gather(problem, group)
    met = {rank: text for rank, text in enumerate(problems) if text is not None}
    if not met:
        return
    texts = list(dict.fromkeys(met.values()))
    common = len(met) == len(problems) and len(texts) == 1
    text = texts[0] if common else "; ".join(f"rank {rank}: {text}" for rank, text in met.items())
    raise error_type(f"{doing}: {text}" if doing else text)
