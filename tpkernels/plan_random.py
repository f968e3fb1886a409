"""Random numbers inside cut blocks: each rank's heads or hidden units get their own, and the ranks stay in step.

A rank draws dropout masks for its own heads, so it draws other amounts than its peers, and other masks. Between the
first column layer of a block and the row layer behind it, the default generators are therefore this rank's own, derived
from the common state; behind it they go on as if one number had been drawn (layers/random.py has the rule). There is no
`with` around it because the two ends lie in different modules of a model that knows nothing about us.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tpkernels.group import Group
from tpkernels.layers.random import seed_for_rank, set_rng_state

# Rates that modules keep as plain numbers and hand to functions.
RATES = (
    "attention_dropout",
    "dropout",
    "dropout_p",
    "dropout_prob",
    "attn_pdrop",
    "activation_dropout",
    "dropout_rate",
)


class BlockRandom:
    """The two ends of the stretch of one block in which numbers are the rank's own."""

    def __init__(self, block: nn.Module) -> None:
        self._modules = [block]  # in a list: a reference, and no child of anything
        self._before: dict[str, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockRandom:
        """A copy of the block has a stretch of its own; a copy of a layer in it goes on in the one it came from."""
        block = memo.get(id(self._modules[0]))
        if block is None:
            return self
        memo[id(self)] = again = BlockRandom(block)
        return again

    def enter(self, group: Group) -> None:
        """Go over to this rank's own numbers, if the block drops anything. The group is that of the layer that enters.

        A stretch that an error, or a recomputation that had seen enough, left open is forgotten: whoever caused it has
        set the generators since.
        """
        self._before = None
        block = self._modules[0]
        if group.world_size > 1 and block.training and drops(block):
            self._before = seed_for_rank(group)

    def leave(self) -> None:
        """Go back to the common numbers."""
        if self._before is not None:
            set_rng_state(self._before)
            self._before = None


def drops(block: nn.Module) -> bool:
    """Whether a module has a rate of dropout above zero, as a number of its own or in a dropout below it."""
    for name in RATES:
        rate = vars(block).get(name)
        if isinstance(rate, float) and rate > 0:
            return True
    return any(isinstance(child, nn.Dropout) and child.p > 0 for child in block.modules())
