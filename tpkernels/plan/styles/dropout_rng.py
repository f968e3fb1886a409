"""Random numbers of a cut model: each rank draws its own where tensors are cut, and all draw the same elsewhere.

    what is drawn                                                             numbers
    masks of attention, of hidden units and of all between a column layer
        and the row layer behind it; whatever a rank's experts draw           the rank's own
    dropouts of embeddings, residuals, classifiers; all else that is whole    common
    what is whole inside of a block (style "replicate" of an nn.Dropout, set
        by derived plans; dropouts in front of an adapter's first linear)     common
    between the blocks under sequence parallel: masks of the rank's tokens    the rank's own
    modules that see all tokens there                                         common

There is one generator for each device, the default one, which is in one of two states. A rank goes over to its own
numbers by drawing one common number, from which, with the rank, its own generator is seeded (layers/random.py); it goes
back to the common state behind that draw, however much it has drawn. Column layers go over, once or several times, row
layers go back, and so does the end of the module around both, whatever happened in it: an error, a column layer without
a row layer behind it, a recomputation that stops early. Where nothing says that a block drops anything, its end looks
at the generators instead, and brings them in step if something was drawn after all.
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
from tpkernels.layers.random import next_state, rng_state, same_state, seed_for_rank, set_rng_state


class _Now(threading.local):
    """Where this thread is: the generators are the thread's only while it runs a model."""

    common: dict[str, Tensor] | None = None  # the common state, while the numbers are the rank's own
    depth = 0  # how many stretches are open


NOW = _Now()


@contextmanager
def common_numbers() -> Iterator[None]:
    """Draw what all ranks draw, also inside a stretch of the rank's own numbers."""
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
    """The stretches of one module in which numbers are the rank's own.

    Args:
        block: around all that is cut. Nothing in it is drawn for the rank outside of its forward.
        at_once: go over at its beginning, not at its first column layer.
    """

    def __init__(self, block: nn.Module, group: Group, *, at_once: bool = False) -> None:
        self._block = [block]  # in a list: a reference, and no child of anything
        self._group, self._at_once = group, at_once
        self._mine = False  # whether this one went over to the rank's own numbers
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
            self.enter(self._group)

    def _end(self, block: nn.Module, args: Any, output: Any) -> None:
        if self._runs:
            self.leave()
            self._runs = False
            NOW.depth -= 1

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockRandom:
        """A copy of the block has a stretch of its own; a copy of a layer in it goes on in the one it came from."""
        block = memo.get(id(self._block[0]))
        if block is None:
            return self
        memo[id(self)] = again = copy(self)  # the hooks of the copied block become its methods
        again._block = [block]
        return again

    def enter(self, group: Group) -> None:
        """Go over to this rank's own numbers, if the block drops anything; nothing where they are its own already."""
        if NOW.common is not None or self._watched is not None or not (self._runs or _recomputes()):
            return
        if self._drops:
            NOW.common, self._mine = seed_for_rank(group), True
        elif self._runs and not is_compiling() and not _is_capturing():
            self._watched = rng_state()

    def leave(self) -> None:
        """Go back to the common numbers."""
        if self._mine and NOW.common is not None:
            set_rng_state(NOW.common)
            NOW.common, self._mine = None, False
        elif self._watched is not None:
            if not same_state(self._watched):
                next_state(self._watched)
            self._watched = None


class CommonInside:
    """Hooks around a module that sees whole tensors inside a stretch of the rank's own numbers."""

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
