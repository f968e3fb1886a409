"""DeepSeek-V3: the shipped plan leaves the attention whole; this one cuts its heads."""

from ._mla import latent_attention as RULES

__all__ = ["RULES"]
