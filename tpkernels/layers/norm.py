"""RMSNorm and LayerNorm with replicated weights, also where each rank holds only its shard of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpkernels.comm.group import Group

from .base import ParallelModule
from .functions import sum_gradient


class NormOptions(TypedDict, total=False):
    """The options of both norms, which their docstrings explain."""

    group: Group | None
    sequence_parallel: bool
    grad_codec: str
    device: torch.device | str | None
    dtype: torch.dtype | None


class _Norm(ParallelModule):
    """What the two norms share. With sequence_parallel the gradients of the weights are summed inside backward."""

    _unsharded: ClassVar[type[nn.Module]]
    weight: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None,
        parameters: dict[str, bool],
        *,
        group: Group | None = None,
        sequence_parallel: bool = False,
        grad_codec: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(group)
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape = shape
        self.eps = eps
        self.elementwise_affine = parameters["weight"]
        self.sequence_parallel = sequence_parallel
        self.grad_codec = grad_codec
        for name, exists in parameters.items():
            if exists:
                self._add_parameter(name, shape, None, device=device, dtype=dtype)
            else:
                self.register_parameter(name, None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones and the bias to zeros."""
        for name, parameter in self._parameters.items():
            if parameter is not None:
                nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)

    @classmethod
    def from_norm(cls, module: nn.Module, *, group: Group | None = None, **options: Any) -> Self:
        """Make the layer from torch's norm of the same name: values, dtype, device and flags are kept.

        Args:
            module: the same on all ranks; it is not changed.
            group: over which the tokens are sharded; None means all ranks.
            options: the keyword arguments of the constructor, such as sequence_parallel.

        Raises:
            TypeError: the module is no such norm.
        """
        if not isinstance(module, cls._unsharded):
            raise TypeError(
                f"{cls.__name__}.from_norm: module must be an nn.{cls._unsharded.__name__}, got {type(module).__name__}"
            )
        old: Any = module
        bias = {"bias": old.bias is not None} if isinstance(module, nn.LayerNorm) else {}
        new: Any = cls
        made: Self = new(
            old.normalized_shape, old.eps, old.elementwise_affine, group=group, device="meta", **bias, **options
        )
        return made._copy_from(module)

    def _local_parameters(self, *names: str) -> dict[str, Tensor | None]:
        """The parameters for use in a forward; where tokens are sharded, their gradients are summed together."""
        found: dict[str, Tensor | None] = {name: getattr(self, name) for name in names}
        if self.sequence_parallel:
            own = {name: p for name, p in found.items() if p is not None}
            summed = sum_gradient(*own.values(), group=self.group, grad_codec=self.grad_codec)
            found |= zip(own, summed, strict=True)
        return found

    def extra_repr(self) -> str:
        """Return what nn.LayerNorm returns, and whether the tokens are sharded."""
        text = f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
        return text + (", sequence_parallel=True" if self.sequence_parallel else "")


class RMSNorm(_Norm):
    """nn.RMSNorm with a replicated weight.

    With sequence_parallel the input is this rank's shard of the tokens. Forward needs no communication; the weight's
    gradient, of which each rank has the part of its tokens, is summed over the ranks inside backward, so that .grad is
    the same and whole on all of them and nothing must be remembered after backward.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as for nn.RMSNorm.
        group: the ranks over which the tokens are sharded; None means all ranks.
        sequence_parallel: the input is sharded over the ranks along any dimension that is not normalised.
        grad_codec: how the gradients of the weights are packed where sequence_parallel sums them.
    """

    _unsharded = nn.RMSNorm

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        **options: Unpack[NormOptions],
    ) -> None:
        super().__init__(normalized_shape, eps, {"weight": elementwise_affine}, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Return x / sqrt(mean(x^2) + eps) * weight over the normalised dimensions.

        Args:
            x: [..., *normalized_shape]; with sequence_parallel this rank's tokens.

        Returns:
            the shape of x.
        """
        return F.rms_norm(x, self.normalized_shape, self._local_parameters("weight")["weight"], self.eps)


class LayerNorm(_Norm):
    """nn.LayerNorm with replicated weight and bias; sequence_parallel as in `RMSNorm`, one collective for both.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as for nn.LayerNorm.
        group: the ranks over which the tokens are sharded; None means all ranks.
        sequence_parallel: the input is sharded over the ranks along any dimension that is not normalised.
        grad_codec: how the gradients of the weights are packed where sequence_parallel sums them.
    """

    _unsharded = nn.LayerNorm
    eps: float
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        **options: Unpack[NormOptions],
    ) -> None:
        parameters = {"weight": elementwise_affine, "bias": elementwise_affine and bias}
        super().__init__(normalized_shape, eps, parameters, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Return (x - mean) / sqrt(var + eps) * weight + bias over the normalised dimensions.

        Args:
            x: [..., *normalized_shape]; with sequence_parallel this rank's tokens.

        Returns:
            the shape of x.
        """
        return F.layer_norm(x, self.normalized_shape, **self._local_parameters("weight", "bias"), eps=self.eps)
