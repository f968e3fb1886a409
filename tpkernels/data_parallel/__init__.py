"""Gradients over the ranks: clipping by the norm of the unsharded model."""

from tpkernels.data_parallel.clip import clip_grad_norm_

__all__ = ["clip_grad_norm_"]
