"""BLOOM: query, key and value of a head lie together in one linear, so that whole heads are cut like a plain one.

A derived plan leaves its attention whole, because a bias for each head of all is added to the scores (ALiBi).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tpkernels.errors import PlanError


def RULES(model: nn.Module) -> dict[str, str]:
    """The plan, for the bare model and for those with a head."""
    config: Any = model.config
    if config.slow_but_exact and config.pretraining_tp > 1:
        raise PlanError("Plan: BLOOM with slow_but_exact takes its weights past their layers, and cannot be cut")
    return {
        "*h.*.self_attention.query_key_value": "column",
        "*h.*.self_attention.dense": "row",
        "*h.*.mlp.dense_h_to_4h": "column",
        "*h.*.mlp.dense_4h_to_h": "row",
    }
