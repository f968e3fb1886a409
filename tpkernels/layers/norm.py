"""RMSNorm and LayerNorm whose weights are replicated, also where each rank holds only its part of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpkernels.comm.group import Group

from .base import ParallelModule
from .functions import sum_gradient


class _Norm(ParallelModule):
    """What the two norms share. With sequence_parallel the gradients of the weights are summed inside backward."""

    weight: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None,
        elementwise_affine: bool,
        *,
        group: Group | None,
        sequence_parallel: bool,
        grad_codec: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(group)
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape = shape
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.sequence_parallel = sequence_parallel
        self.grad_codec = grad_codec
        if elementwise_affine:
            self._add_parameter("weight", shape, None, device=device, dtype=dtype)
        else:
            self.register_parameter("weight", None)

    def _parameters_of_shards(self, *parameters: Tensor | None) -> list[Tensor | None]:
        if not self.sequence_parallel:
            return list(parameters)
        found = [p for p in parameters if p is not None]
        summed = iter(sum_gradient(*found, group=self.group, grad_codec=self.grad_codec))
        return [None if p is None else next(summed) for p in parameters]

    def extra_repr(self) -> str:
        """Say what nn.LayerNorm says, and whether the tokens are cut."""
        text = f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
        return text + (", sequence_parallel=True" if self.sequence_parallel else "")


class RMSNorm(_Norm):
    """nn.RMSNorm with a replicated weight.

    With sequence_parallel the input is this rank's part of the tokens. Forward needs no communication; the weight's
    gradient, of which each rank has the part of its tokens, is summed over the ranks inside backward, so that .grad is
    the same and whole on all of them and nothing must be remembered after backward.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as for nn.RMSNorm.
        group: the ranks over which the tokens are cut; None means all ranks.
        sequence_parallel: the input is cut over the ranks along any dimension that is not normalised.
        grad_codec: how the gradients of the weights are packed where sequence_parallel sums them.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        group: Group | None = None,
        sequence_parallel: bool = False,
        grad_codec: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            normalized_shape,
            eps,
            elementwise_affine,
            group=group,
            sequence_parallel=sequence_parallel,
            grad_codec=grad_codec,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    @classmethod
    def from_norm(cls, module: nn.RMSNorm, *, group: Group | None = None, **options: Any) -> Self:
        """Take over the values, dtype, device and flags of an nn.RMSNorm."""
        if not isinstance(module, nn.RMSNorm):
            raise TypeError(f"RMSNorm.from_norm: module must be an nn.RMSNorm, got {type(module).__name__}")
        affine = module.elementwise_affine
        new = cls(module.normalized_shape, module.eps, affine, group=group, device="meta", **options)
        return new._copy_from(module)

    def forward(self, x: Tensor) -> Tensor:
        """Return x / sqrt(mean(x^2) + eps) * weight over the normalised dimensions."""
        (weight,) = self._parameters_of_shards(self.weight)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class LayerNorm(_Norm):
    """nn.LayerNorm with replicated weight and bias; sequence_parallel as in `RMSNorm`, one collective for both.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as for nn.LayerNorm.
        group: the ranks over which the tokens are cut; None means all ranks.
        sequence_parallel: the input is cut over the ranks along any dimension that is not normalised.
        grad_codec: how the gradients of the weights are packed where sequence_parallel sums them.
    """

    eps: float
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        group: Group | None = None,
        sequence_parallel: bool = False,
        grad_codec: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            normalized_shape,
            eps,
            elementwise_affine,
            group=group,
            sequence_parallel=sequence_parallel,
            grad_codec=grad_codec,
            device=device,
            dtype=dtype,
        )
        if elementwise_affine and bias:
            self._add_parameter("bias", self.normalized_shape, None, device=device, dtype=dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones and the bias to zeros."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_norm(cls, module: nn.LayerNorm, *, group: Group | None = None, **options: Any) -> Self:
        """Take over the values, dtype, device and flags of an nn.LayerNorm."""
        if not isinstance(module, nn.LayerNorm):
            raise TypeError(f"LayerNorm.from_norm: module must be an nn.LayerNorm, got {type(module).__name__}")
        bias = module.bias is not None
        affine = module.elementwise_affine
        new = cls(module.normalized_shape, module.eps, affine, bias, group=group, device="meta", **options)
        return new._copy_from(module)

    def forward(self, x: Tensor) -> Tensor:
        """Return (x - mean) / sqrt(var + eps) * weight + bias over the normalised dimensions."""
        weight, bias = self._parameters_of_shards(self.weight, self.bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
