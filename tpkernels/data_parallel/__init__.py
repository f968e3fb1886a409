"""Gradients over the ranks: averaged and packed beside the backward pass, clipped by their norm over all."""

from .aggregator import GradAggregator
from .clip import clip_grad_norm_
from .outer import OuterSGD
from .scaling import unscale_
from .sparse import TopK
from .state import AggregatorState, reshard_state

__all__ = [
    "AggregatorState",
    "GradAggregator",
    "OuterSGD",
    "TopK",
    "clip_grad_norm_",
    "reshard_state",
    "unscale_",
]
