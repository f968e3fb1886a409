"""GPT-BigCode: queries of all heads and one key and value for all of them in one linear, or three of each head."""

from __future__ import annotations

from typing import Any

from torch import nn


def RULES(model: nn.Module) -> dict[str, str]:
    """The plan, for the bare model and for those with a head."""
    config: Any = model.config
    size = config.hidden_size // config.num_attention_heads
    return {
        "*wpe": "replicate",
        "*h.*.attn.c_attn": f"packed_column:{config.hidden_size},{size},{size}" if config.multi_query else "column",
        "*h.*.attn.c_proj": "row",
        "*h.*.mlp.c_fc": "column",
        "*h.*.mlp.c_proj": "row",
    }
