"""GPT-OSS: attention sinks, one for each head, are cut with the heads; experts over the ranks."""

from ._shipped import ATTENTION

RULES = ATTENTION | {"*.mlp.experts": "expert"}
