"""Multi-head latent attention and mixtures with shared experts, as DeepSeek builds them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ._shipped import experts_of, present


def latent_attention(model: nn.Module) -> dict[str, str]:
    """The plan: heads are cut behind the latent projections, which stay whole; dense layers and experts are cut.

    The rotary part of the keys goes from its projection straight to all heads, so its gradient is summed.
    """
    config: Any = model.config
    attention = {
        "*.self_attn.q_proj": "column",
        "*.self_attn.q_a_proj": "replicate",
        "*.self_attn.q_b_proj": "column",
        "*.self_attn.kv_a_proj_with_mqa": f"sum_tail:{config.qk_rope_head_dim}",
        "*.self_attn.kv_b_proj": "column",
        "*.self_attn.o_proj": "row",
    }
    mlp = {"*.gate_proj": "column", "*.up_proj": "column", "*.down_proj": "row", "*.mlp.gate": "replicate"}
    if not isinstance(next((m for n, m in model.named_modules() if n.endswith(".mlp.gate")), None), nn.Linear):
        del mlp["*.mlp.gate"]
    return present(model, attention | mlp) | experts_of(model)
