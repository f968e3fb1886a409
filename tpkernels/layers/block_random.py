"""Random numbers of a sharded model: each rank's own where activations are sharded, the same on all ranks elsewhere.

    what is drawn                                                                   numbers
    masks of attention, of hidden units and of all between a column layer
        and the row layer behind it; all that a rank's experts draw                 the rank's own
    dropouts of embeddings, residuals, classifiers; all else that is replicated     common
    replicated features inside a block (style "common" of an nn.Dropout, set
        by derived plans; dropouts in front of an adapter's first linear)           common
    between the blocks under sequence parallel: masks of the rank's tokens          the rank's own
    modules that take all tokens there                                              common

There is one generator for each device, the default one, which is in one of two states. A rank switches to its own
numbers by drawing one common number, from which, with the rank, its own generator is seeded (random.py); it switches
back to the common state after that draw, however much it has drawn. Column layers switch to the rank's own numbers, row
layers switch back, and so does the end of the module around both, in any case: after an error, after a column layer
without a row layer behind it, after a recomputation that stops early. Where no attribute of a block is a rate of
dropout, its end compares the states of the generators, and aligns them if a number was drawn after all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.dropout import _DropoutNd

from tpkernels.comm.group import Group

from .random import next_state, rng_state, same_state, seed_for_rank, set_rng_state
from .reference import Ref


class _Now(threading.local):
    """The state of this thread: the generators are its own only while it runs a model.

    Attributes:
        common: the common state, while the numbers are the rank's own.
        depth: how many stretches are open.
    """

    def __init__(self) -> None:  # attributes of the object from the start: Dynamo guards on which ones there are
        self.common: dict[str, Tensor] | None = None
        self.depth = 0


NOW = _Now()


@contextmanager
def common_numbers() -> Iterator[None]:
    """Draw from the common numbers, also inside a stretch of the rank's own."""
    before, mine = NOW.common, None if NOW.common is None else rng_state()
    if before is not None:
        set_rng_state(before)
        NOW.common = None
    try:
        yield
    finally:
        if mine is not None:
            NOW.common = rng_state()
            set_rng_state(mine)


class BlockRandom:
    """The stretches of one module in which random numbers are the rank's own.

    Args:
        block: around the sharded modules. Numbers are the rank's own inside its forward only.
        group: of the ranks.
        at_once: begin the stretch with the block, not with its first column layer.
    """

    def __init__(self, block: nn.Module, group: Group, *, at_once: bool = False) -> None:
        self._block, self._group, self._at_once = Ref(block), group, at_once
        self._mine = False  # whether this one began the stretch that is open
        self._watched: dict[str, Tensor] | None = None
        self._runs = False
        self._drops, self._rates = False, rate_names(block)
        block.register_forward_pre_hook(self._begin, prepend=True)
        block.register_forward_hook(self._end, always_call=True)

    def _begin(self, block: nn.Module, args: Any) -> None:
        if not block.training or self._group.world_size == 1:
            return
        if NOW.depth == 0:
            NOW.common = None  # left by a recomputation of a part of a block
        NOW.depth += 1
        self._mine, self._runs, self._watched = False, True, None
        if not is_compiling():  # torch 2.11 traces no loop over the attributes of a module
            self._rates = rate_names(block)
        self._drops = drops(block, self._rates)
        if self._at_once:
            self.switch_to_own(self._group)

    def _end(self, block: nn.Module, args: Any, output: Any) -> None:
        if self._runs:
            self.switch_back()
            self._runs = False
            NOW.depth -= 1

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockRandom:
        """A copy of the block has a stretch of its own; a copy of a layer in it shares that of the original."""
        block = memo.get(id(self._block.target))
        if block is None:
            return self
        memo[id(self)] = again = copy(self)  # the hooks of the copied block become its methods
        again._block = Ref(block)
        return again

    def switch_to_own(self, group: Group) -> None:
        """Switch to this rank's own numbers, if the block has dropouts and they are not its own already."""
        if NOW.common is not None or self._watched is not None or not (self._runs or _recomputes()):
            return
        if self._drops:
            NOW.common, self._mine = seed_for_rank(group), True
        elif self._runs and not is_compiling() and not _is_capturing():
            self._watched = rng_state()

    def switch_back(self) -> None:
        """Switch back to the common numbers."""
        if self._mine and NOW.common is not None:
            set_rng_state(NOW.common)
            NOW.common, self._mine = None, False
        elif self._watched is not None:
            if not same_state(self._watched):
                next_state(self._watched)
            self._watched = None


class CommonInside:
    """Hooks around a module that takes all tokens inside a stretch of the rank's own numbers."""

    def __init__(self, module: nn.Module) -> None:
        self._open: list[Any] = []
        module.register_forward_pre_hook(self._begin, prepend=True)
        module.register_forward_hook(self._end, always_call=True)

    def _begin(self, module: nn.Module, args: Any) -> None:
        if NOW.common is not None:
            self._open.append(common_numbers())
            self._open[-1].__enter__()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)


def rate_names(block: nn.Module) -> tuple[str, ...]:
    """Names of the attributes of a module, and those below it, that may be rates of dropout."""
    return tuple(sorted({name for module in block.modules() for name in vars(module) if "drop" in name}))


def drops(block: nn.Module, rates: tuple[str, ...]) -> bool:
    """Whether a module or one below it has a rate of dropout above zero: an attribute named so, or a Dropout's."""
    for module in block.modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            return True
        for name in rates:
            value = getattr(module, name, None)
            if isinstance(value, float) and value > 0:
                return True
    return False


def _recomputes() -> bool:
    """Whether this is the backward, which runs parts of a forward again (torch.utils.checkpoint)."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and not is_compiling() and task() != -1


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
