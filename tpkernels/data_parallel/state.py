"""The state of a GradAggregator between steps, as plain tensors and numbers, and its resharding for other ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

VERSION = 1
OWN = ("residual", "velocity")
"""Kinds of tensors of which every rank has its own; they count together. All other kinds are the same on all ranks."""


class AggregatorState(TypedDict):
    """State of one rank.

    Attributes:
        tensors: "<kind>.<parameter>", in the shape of the parameter: residual, velocity (this rank's own; fp32),
            average (in flight), anchor, outer_momentum (the same on all ranks).
        numbers: values of JSON: numbers, strings, lists of strings.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def reshard_state(states: Sequence[AggregatorState], world_size: int) -> list[AggregatorState]:
    """The states for the ranks of a group of another size; a pure function.

    A residual is in units of the average, which is a sum over the ranks: the sum of the residuals of all ranks stays
    the same. So new rank r takes the sum of old ranks q with q % world_size == r, in their order, zeros
    when there is none. The velocity of codec "topk" likewise. Everything else is the same on all ranks and is kept.

    Args:
        states: of all old ranks, in rank order.
        world_size: the new number of ranks.

    Returns:
        the states of the new ranks, in rank order; those of states itself when the number is the same.

    Raises:
        ValueError: states are not those of all ranks at one moment; or of mode "local" between two averages, where
            every rank has its own parameters (call `drain` before saving).
    """
    if world_size < 1:
        raise ValueError(f"reshard_state: world_size must be 1 or more, got {world_size}")
    _check_complete(states)
    if world_size == len(states):
        return list(states)
    if states[0]["numbers"]["local_step"]:
        raise ValueError(
            f"reshard_state: in mode 'local' every rank has its own parameters between two averages, got states "
            f"{states[0]['numbers']['local_step']} local steps after one; call drain() before saving"
        )
    return [_joined(states[rank::world_size], states[0], rank, world_size) for rank in range(world_size)]


def _joined(old: Sequence[AggregatorState], first: AggregatorState, rank: int, world_size: int) -> AggregatorState:
    tensors: dict[str, Tensor] = {}
    for name, tensor in first["tensors"].items():
        if name.partition(".")[0] in OWN:
            tensors[name] = torch.zeros_like(tensor)
            for state in old:
                tensors[name] += state["tensors"][name]
        else:
            tensors[name] = tensor.clone()
    return {"tensors": tensors, "numbers": first["numbers"] | {"rank": rank, "world_size": world_size}}


def _check_complete(states: Sequence[AggregatorState]) -> None:
    if not states:
        raise ValueError("reshard_state: states must be those of all ranks, got none")
    first = states[0]
    for rank, state in enumerate(states):
        numbers = state["numbers"]
        if (numbers["rank"], numbers["world_size"]) != (rank, len(states)):
            raise ValueError(
                f"reshard_state: states must be those of all ranks in rank order, got that of rank {numbers['rank']} "
                f"of {numbers['world_size']} at place {rank} of {len(states)}"
            )
        for key in ("mode", "step", "local_step", "order"):
            if numbers[key] != first["numbers"][key]:
                raise ValueError(
                    f"reshard_state: states must be of one moment, but {key} is {first['numbers'][key]!r} on rank 0 "
                    f"and {numbers[key]!r} on rank {rank}"
                )
        if set(state["tensors"]) != set(first["tensors"]):
            different = sorted(set(state["tensors"]) ^ set(first["tensors"]))
            raise ValueError(
                f"reshard_state: states must hold the same tensors, but rank {rank} differs in {different}"
            )


def check_loadable(
    state: AggregatorState, mine: dict[str, Any], expected: dict[str, torch.Size], allowed: Iterable[str]
) -> None:
    """Raise ValueError unless the state fits an aggregator.

    Args:
        state: to be loaded.
        mine: numbers of the aggregator that must be those of the state.
        expected: shapes by name of the tensors that must be there.
        allowed: names of those that may be there as well.
    """
    numbers, tensors = state["numbers"], state["tensors"]
    if numbers.get("version") != VERSION:
        raise ValueError(f"load_state_dict: version must be {VERSION}, got {numbers.get('version')!r}")
    for key, value in mine.items():
        if numbers[key] != value:
            hint = "; pass the states of all ranks through reshard_state" if key in ("world_size", "rank") else ""
            raise ValueError(f"load_state_dict: {key} must be {value!r}, got {numbers[key]!r}{hint}")
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected) - set(allowed))
    if missing or unknown:
        raise ValueError(
            f"load_state_dict: the state does not fit this model and these settings: missing {missing[:5]}, unknown "
            f"{unknown[:5]} ({len(missing)} and {len(unknown)} in all); loading it would lose what is kept there"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"load_state_dict: {name!r} must have shape {list(shape)}, got {list(tensors[name].shape)}"
            )
