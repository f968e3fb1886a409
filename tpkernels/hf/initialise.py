"""Weights that a file lacks: new heads, and tables that a model computes and never saves.

transformers initialises them when it loads a model, by rules of each class. The same rules run here on an unsharded
model that has memory for these weights only; every rank draws the random numbers of rank 0, and keeps its shard.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels.errors import CheckpointError, shorten


@torch.no_grad()
def initialised(whole: Any, names: Collection[str], state: Any) -> dict[str, Tensor]:
    """The named parameters as transformers initialises them, unsharded, on the CPU.

    Args:
        whole: the unsharded model, with its parameters on meta.
        names: of parameters; where they are tied, any of their names.
        state: of random numbers (torch.get_rng_state() of rank 0).

    Returns:
        {name: values}, those that `from_pretrained` gives from that state on. The generator of this rank is advanced
        where it was in that state, else left as it was.

    Raises:
        CheckpointError: transformers has no rule for one of them.
    """
    before = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        _materialise(whole, set(names))
        whole.initialize_weights()
    finally:
        if not torch.equal(before, state):
            torch.set_rng_state(before)
    made = {name: whole.get_parameter(name).detach() for name in names}
    if left := [name for name, value in made.items() if value.isnan().any()]:
        raise CheckpointError(
            f"it lacks {shorten(sorted(left))}, which {type(whole).__name__} has no rule to initialise"
        )
    return made


def _materialise(whole: Any, names: set[str]) -> None:
    """Give memory to the named parameters, and mark all others as initialised, so that no rule touches them."""
    wanted = {id(whole.get_parameter(name)) for name in names}
    made: dict[int, nn.Parameter] = {}
    for module in whole.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in wanted:
                value = torch.full_like(parameter, torch.nan, device="cpu")
                module._parameters[name] = made.setdefault(
                    id(parameter), nn.Parameter(value, requires_grad=parameter.requires_grad)
                )
            else:
                parameter._is_hf_initialized = True
        for buffer in module._buffers.values():
            if buffer is not None:
                buffer._is_hf_initialized = True
    for module in whole.modules():  # marked already, when they were built on meta
        module._is_hf_initialized = all(getattr(p, "_is_hf_initialized", False) for p in module.parameters())
