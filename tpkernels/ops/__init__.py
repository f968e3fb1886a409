"""The ops: collectives, GEMMs fused with their collective, the norm after them, the vocabulary, and packing.

`_op` has the ways into an op, `_order` their order under torch.compile; checks, gradients, linear and sizes are shared.
"""

from __future__ import annotations

from . import flops as flops
from .collectives import all_gather, all_reduce, all_reduce_, reduce_scatter
from .fused_gemm import all_gather_gemm, gemm_all_reduce, gemm_reduce_scatter, replicated_gemm
from .norm import all_reduce_add_rms_norm, squared_norm
from .packing import (
    all_reduce_packed,
    compress,
    compress_parts,
    compress_with_feedback,
    decompress,
    reduce_scatter_packed,
)
from .vocab import vocab_cross_entropy, vocab_embedding

__all__ = [
    "all_gather",
    "all_gather_gemm",
    "all_reduce",
    "all_reduce_",
    "all_reduce_add_rms_norm",
    "all_reduce_packed",
    "compress",
    "compress_parts",
    "compress_with_feedback",
    "decompress",
    "gemm_all_reduce",
    "gemm_reduce_scatter",
    "reduce_scatter",
    "reduce_scatter_packed",
    "replicated_gemm",
    "squared_norm",
    "vocab_cross_entropy",
    "vocab_embedding",
]
