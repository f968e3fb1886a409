"""Hidden states that a model returns (output_hidden_states) while each rank keeps its shard of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tpkernels.plan.outputs import GatheredOutputs, takes_options


@dataclass
class _Tokens:
    """Hidden states that a layer took or returned.

    Attributes:
        local: [B, this rank's tokens, D].
        gather: gathers the tokens of all ranks.
    """

    local: Tensor
    gather: Callable[[Tensor], Tensor]

    def gathered(self) -> Tensor:
        """Return [B, S, D] on every rank; the gradient is this rank's tokens of the replicated one."""
        return self.gather(self.local)


class GatheredHiddenStates(GatheredOutputs):
    """Gathers the hidden states that a model returns for output_hidden_states.

    Args:
        gather: gathers the tokens of all ranks.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor]) -> None:
        super().__init__("output_hidden_states")
        self._gather = gather

    def watch(self, model: nn.Module, layers: list[nn.Module]) -> None:
        """Register hooks on the layers between which tokens are sharded, and on the models around them."""
        for module in model.modules():
            if takes_options(module) and any(inner is layers[0] for inner in module.modules()):
                self.surround(module)
        for layer in layers:
            layer.register_forward_hook(self.note, with_kwargs=True)

    def note(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of a layer: note what it took and returned while a model around returns hidden states."""
        if not any(self._wanted):
            return
        taken = args[0] if args else kwargs.get("hidden_states")
        returned = output[0] if isinstance(output, tuple | list) and output else output
        self._seen += [_Tokens(x, self._gather) for x in (taken, returned) if isinstance(x, Tensor)]
