"""Gradients over the ranks: averaged and packed beside the backward pass, clipped by their norm over all ranks."""

from .aggregator import GradAggregator
from .agree import Agreement, replicas_agree
from .clip import clip_grad_norm_
from .hooks import CommHook, comm_hook
from .outer import OuterSGD
from .replica_check import check_replicas, replicas_callback
from .scaling import unscale_
from .sparse import TopK
from .state import AggregatorState, reshard_state
from .zero import zero_optimizer

__all__ = [
    "AggregatorState",
    "Agreement",
    "CommHook",
    "GradAggregator",
    "OuterSGD",
    "TopK",
    "check_replicas",
    "clip_grad_norm_",
    "comm_hook",
    "replicas_agree",
    "replicas_callback",
    "reshard_state",
    "unscale_",
    "zero_optimizer",
]
