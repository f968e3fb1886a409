"""Parameters and optimizer state that differ between replicas, as in mode "local" between two averages.

The tensors that all replicas share are saved by the first one. With `own_parameters` each replica saves its own as
well, beside the state of its aggregator: "replica_value.<parameter>", and "replica_<field>.<parameter>" for the tensors
of the optimizer that have the shape of their parameter. They are cut like it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels.data_parallel.state import AggregatorState
from tpkernels.errors import CheckpointError

FLAG = "own_parameters"  # among the numbers of the aggregator
PREFIX, VALUE = "replica_", "value"


def with_own_parameters(
    state: AggregatorState, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> AggregatorState:
    """The state of an aggregator, and the tensors of this replica beside it; none is copied."""
    tensors = dict(state["tensors"])
    for name, parameter in model.named_parameters():
        tensors[f"{PREFIX}{VALUE}.{name}"] = parameter
        for field, value in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                tensors[f"{PREFIX}{field}.{name}"] = value
    return {"tensors": tensors, "numbers": state["numbers"] | {FLAG: True}}


def has_own_parameters(numbers: Mapping[str, Any]) -> bool:
    """Whether each replica has saved parameters of its own."""
    return bool(numbers.get(FLAG))


def without_own_parameters(state: AggregatorState) -> tuple[AggregatorState, dict[str, Tensor]]:
    """The inverse of `with_own_parameters`: the state of the aggregator, and the tensors of this replica."""
    own = {name: tensor for name, tensor in state["tensors"].items() if name.startswith(PREFIX)}
    tensors = {name: tensor for name, tensor in state["tensors"].items() if name not in own}
    numbers = {key: number for key, number in state["numbers"].items() if key != FLAG}
    return {"tensors": tensors, "numbers": numbers}, own


def check_own(own: Mapping[str, Tensor], shared: Mapping[str, Any]) -> None:
    """Check that each tensor of a replica has a tensor of the first replica in whose place it is loaded.

    Args:
        own: tensors of a replica.
        shared: those of the first replica by name, "model/..." and "optimizer/...".

    Raises:
        CheckpointError: one has none (named).
    """
    for key in own:
        field, _, name = key.removeprefix(PREFIX).partition(".")
        if field != VALUE and f"optimizer/{name}/{field}" not in shared:
            raise CheckpointError(f"it holds {field} of {name} for each replica, and none for all of them")


@torch.no_grad()
def fill_own(own: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Copy the tensors of this replica over those of the first one, which have been loaded."""
    parameters = dict(model.named_parameters())
    for key, tensor in own.items():
        field, _, name = key.removeprefix(PREFIX).partition(".")
        if field == VALUE:
            parameters[name].copy_(tensor)
        elif optimizer is not None:
            optimizer.state[parameters[name]][field].copy_(tensor)
