"""GPT-2: fused query, key and value in a Conv1D."""

from __future__ import annotations

from torch import nn


def RULES(model: nn.Module) -> dict[str, str]:
    """The plan, for the bare model and for those with a head."""
    cross = any(".crossattention." in name for name, _ in model.named_modules())
    rules = {
        "*wte": "vocab",
        "*wpe": "replicate",
        "*h.*.attn.c_attn": "packed_column:3",
        "*h.*.attn.c_proj": "row",
        "*h.*.mlp.c_fc": "column",
        "*h.*.mlp.c_proj": "row",
    }
    if cross:
        rules |= {
            "*h.*.crossattention.q_attn": "column",
            "*h.*.crossattention.c_attn": "packed_column:2",
            "*h.*.crossattention.c_proj": "row",
        }
    return rules
