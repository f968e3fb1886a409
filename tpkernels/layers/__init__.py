"""Layers sharded over the ranks of a group, with the values, names and initialisation of the unsharded ones."""

from .base import init_shard_
from .embedding import VocabParallelEmbedding
from .embedding_bag import VocabParallelEmbeddingBag
from .functions import sum_gradient, take_shard
from .linear import ColumnParallelLinear, RowParallelLinear
from .loss import VocabParallelCrossEntropy
from .norm import LayerNorm, RMSNorm
from .random import ParallelDropout, check_same_rng, rank_rng, rng_state, set_rng_state

__all__ = [
    "ColumnParallelLinear",
    "LayerNorm",
    "ParallelDropout",
    "RMSNorm",
    "RowParallelLinear",
    "VocabParallelCrossEntropy",
    "VocabParallelEmbedding",
    "VocabParallelEmbeddingBag",
    "check_same_rng",
    "init_shard_",
    "rank_rng",
    "rng_state",
    "set_rng_state",
    "sum_gradient",
    "take_shard",
]
