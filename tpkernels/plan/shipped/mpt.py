"""MPT: query, key and value of all heads lie one behind the other in one linear.

A derived plan leaves its attention whole, because a bias for each head of all is added to the scores (ALiBi).
"""

from __future__ import annotations

from typing import Any

from torch import nn


def RULES(model: nn.Module) -> dict[str, str]:
    """The plan, for the bare model and for those with a head."""
    config: Any = model.config
    return {
        "*blocks.*.attn.Wqkv": f"packed_column:{config.d_model},{config.d_model},{config.d_model}",
        "*blocks.*.attn.out_proj": "row",
        "*blocks.*.ffn.up_proj": "column",
        "*blocks.*.ffn.down_proj": "row",
    }
