"""The ops: collectives, GEMMs fused with their collective, and the vocabulary.

collectives.py, fused_gemm.py and vocab.py hold the public functions; the modules with an underscore what they share.
"""

from __future__ import annotations

from .collectives import all_gather, all_reduce, all_reduce_, reduce_scatter
from .fused_gemm import all_gather_gemm, gemm_all_reduce, gemm_reduce_scatter, replicated_gemm
from .vocab import vocab_cross_entropy, vocab_embedding

__all__ = [
    "all_gather",
    "all_gather_gemm",
    "all_reduce",
    "all_reduce_",
    "gemm_all_reduce",
    "gemm_reduce_scatter",
    "reduce_scatter",
    "replicated_gemm",
    "vocab_cross_entropy",
    "vocab_embedding",
]
