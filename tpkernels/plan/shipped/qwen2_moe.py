"""Qwen2 MoE: the shipped plan leaves the expert that all tokens share whole; this one cuts it, too."""

from __future__ import annotations

from torch import nn

from ._shipped import ATTENTION, experts_of, present


def RULES(model: nn.Module) -> dict[str, str]:
    """The plan; layers may be dense, or mixtures with a shared expert."""
    mlp = {
        "*.gate_proj": "column",
        "*.up_proj": "column",
        "*.down_proj": "row",
        "*.mlp.shared_expert_gate": "replicate",
    }
    return ATTENTION | present(model, mlp) | experts_of(model)
