"""Granite MoE: the shipped plan cuts only the experts; this one cuts the attention, too."""

from __future__ import annotations

from torch import nn

from ._shipped import ATTENTION, experts_of, present


def RULES(model: nn.Module) -> dict[str, str]:
    """The plan."""
    return ATTENTION | present(model, {"*.router.layer": "replicate"}) | experts_of(model)
