"""Phi-3: query, key and value in one linear, gate and up in another. The shipped plan gathers, this one cuts them."""

RULES = {
    "*.self_attn.qkv_proj": "packed_column:qkv",
    "*.self_attn.o_proj": "row",
    "*.mlp.gate_up_proj": "packed_column:2",
    "*.mlp.down_proj": "row",
}
