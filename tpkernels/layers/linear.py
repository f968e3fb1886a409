"""nn.Linear cut over the ranks, along its outputs (column) or its inputs (row)."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import init

from tpkernels import ops
from tpkernels.comm.group import Group

from .base import Cut, ParallelModule, gather, init_shard_
from .functions import take_shard


class _ParallelLinear(ParallelModule):
    """What the two linears share. `_weight_dim` says which dimension of the weight [N, K] is cut."""

    _weight_dim: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        group: Group | None,
        sequence_parallel: bool,
        sequence_dim: int,
        codec: str,
        grad_codec: str | None,
        unit: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(group)
        self.in_features = in_features
        self.out_features = out_features
        self.sequence_parallel = sequence_parallel
        self.sequence_dim = sequence_dim
        self.codec = codec
        self.grad_codec = codec if grad_codec is None else grad_codec
        self.unit = unit
        cut = Cut(self._weight_dim, (out_features, in_features)[self._weight_dim], unit)
        self._add_parameter("weight", (out_features, in_features), cut, device=device, dtype=dtype)
        if bias:
            self._add_parameter("bias", (out_features,), self._bias_cut(cut), device=device, dtype=dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _bias_cut(self, weight_cut: Cut) -> Cut | None:
        return weight_cut if self._weight_dim == 0 else None

    def reset_parameters(self) -> None:
        """Draw the weights anew: bit for bit this rank's part of what nn.Linear draws for the same seed.

        All ranks must call it with their default generators in the same state; they end in that of the unsharded layer.
        """
        init_shard_(self.weight, lambda w: init.kaiming_uniform_(w, a=math.sqrt(5)), by_rows=True)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            init_shard_(self.bias, lambda b: init.uniform_(b, -bound, bound), by_rows=True)

    @classmethod
    def from_linear(cls, module: nn.Linear, *, group: Group | None = None, **options: Any) -> Self:
        """Cut an nn.Linear that all ranks hold: values, dtype, device, requires_grad and training flag are kept.

        Args:
            module: the same on all ranks; it is not changed, and its memory is free once the caller drops it.
            group: over which to cut; None means all ranks.
            options: the keyword arguments of the constructor, such as sequence_parallel.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{cls.__name__}.from_linear: module must be an nn.Linear, got {type(module).__name__}")
        bias = module.bias is not None
        new = cls(module.in_features, module.out_features, bias, group=group, device="meta", **options)
        return new._copy_from(module)

    def full_weight(self) -> Tensor:
        """Return the unsharded weight [N, K] on every rank (detached). Collective: all ranks must call it."""
        return self._full("weight")

    def full_bias(self) -> Tensor | None:
        """Return the unsharded bias [N] on every rank (detached), or None. Collective: all ranks must call it."""
        return None if self.bias is None else self._full("bias")

    def extra_repr(self) -> str:
        """Say the unsharded sizes, this rank's shard, and what differs from the defaults."""
        sizes = {"in_features": str(self.in_features), "out_features": str(self.out_features)}
        sizes[("out_features", "in_features")[self._weight_dim]] += f" (shard {self.weight.size(self._weight_dim)})"
        parts = [f"{name}={value}" for name, value in sizes.items()]
        parts += [f"bias={self.bias is not None}", f"rank={self.group.rank} of {self.group.world_size}"]
        if self.sequence_parallel:
            parts.append(f"sequence_dim={self.sequence_dim}")
        if self.codec != "none":
            parts.append(f"codec={self.codec!r}")
        if self.grad_codec != self.codec:
            parts.append(f"grad_codec={self.grad_codec!r}")
        return ", ".join(parts)


class ColumnParallelLinear(_ParallelLinear):
    """nn.Linear whose output features are cut: rank r computes its columns of y, without communication.

        y_shard = x @ w_shard.T + bias_shard             # [..., N / R]
        y = all_gather(y_shard, dim=-1)                  # with gather_output

    The gradient of x is summed over the ranks while the weight gradient is being computed. With sequence_parallel, x is
    this rank's part of the tokens: it is gathered on the way in, and its gradient scattered on the way back.

    Args:
        in_features, out_features, bias: as for nn.Linear, unsharded. out_features need not divide by R.
        group: over which to cut; None means all ranks.
        gather_output: return all N features on every rank instead of this rank's.
        sequence_parallel: x is cut along sequence_dim.
        sequence_dim: the token dimension of x, such as 0 for [S, B, K] and 1 for [B, S, K].
        codec: how values are packed on the wire.
        grad_codec: how the backward packs the partial gradients of x; None: as `codec`.
        unit: so many neighbouring output features stay on one rank (attention: head_dim).
        device, dtype: as for nn.Linear; "meta" allocates nothing.

    Raises:
        ValueError: out_features is not a multiple of unit; in forward, shapes do not fit.

    Source: Shoeybi et al. 2019 (arXiv:1909.08053); sequence parallel: Korthikanti et al. 2022 (arXiv:2205.05198).
    """

    _weight_dim = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: Group | None = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        sequence_dim: int = 0,
        codec: str = "none",
        grad_codec: str | None = None,
        unit: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            group=group,
            sequence_parallel=sequence_parallel,
            sequence_dim=sequence_dim,
            codec=codec,
            grad_codec=grad_codec,
            unit=unit,
            device=device,
            dtype=dtype,
        )
        self.gather_output = gather_output

    def forward(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        """Multiply.

        Args:
            x: [..., K], replicated, or this rank's tokens with sequence_parallel.
            sequence_size: the number of tokens along sequence_dim on all ranks together. None asks the ranks, or
                under torch.compile takes R times this rank's; an uneven cut must be given there.

        Returns:
            [..., N / R], or [..., N] with gather_output.
        """
        if self.sequence_parallel:
            y = ops.all_gather_gemm(
                x,
                self.weight,
                self.bias,
                group=self.group,
                dim=self.sequence_dim,
                dim_size=sequence_size,
                codec=self.codec,
                grad_codec=self.grad_codec,
            )
        else:
            y = ops.replicated_gemm(x, self.weight, self.bias, group=self.group, codec=self.grad_codec)
        return gather(y, -1, self.out_features, self.group, unit=self.unit) if self.gather_output else y


class RowParallelLinear(_ParallelLinear):
    """nn.Linear whose input features are cut: the ranks' products are summed, while they are still being computed.

        y = all_reduce(x_shard @ w_shard.T) + bias       # [..., N]
        y_shard = split(y, R, sequence_dim)[rank]        # with sequence_parallel

    Args:
        in_features, out_features, bias: as for nn.Linear, unsharded. in_features need not divide by R. The bias is
            replicated and added once; its gradient is whole on every rank.
        group: over which to cut; None means all ranks.
        input_is_parallel: x is this rank's [..., K / R], as a ColumnParallelLinear leaves it. False: x is replicated
            [..., K], the layer takes its part, and the gradient of x is gathered.
        sequence_parallel: return this rank's part of the tokens only.
        sequence_dim: the token dimension of y, such as 0 for [S, B, N] and 1 for [B, S, N].
        codec: how partial sums are packed on the wire.
        grad_codec: how the backward packs a gradient that it gathers (with sequence_parallel that of y, with
            input_is_parallel=False that of x); None: as `codec`.
        unit: so many neighbouring input features stay on one rank (attention: head_dim).
        device, dtype: as for nn.Linear; "meta" allocates nothing.

    Raises:
        ValueError: in_features is not a multiple of unit; in forward, shapes do not fit.

    Source: Shoeybi et al. 2019 (arXiv:1909.08053); sequence parallel: Korthikanti et al. 2022 (arXiv:2205.05198).
    """

    _weight_dim = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: Group | None = None,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        sequence_dim: int = 0,
        codec: str = "none",
        grad_codec: str | None = None,
        unit: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            group=group,
            sequence_parallel=sequence_parallel,
            sequence_dim=sequence_dim,
            codec=codec,
            grad_codec=grad_codec,
            unit=unit,
            device=device,
            dtype=dtype,
        )
        self.input_is_parallel = input_is_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and sum over the ranks.

        Args:
            x: [..., K / R], or replicated [..., K] with input_is_parallel=False.

        Returns:
            [..., N] on every rank, or this rank's tokens of it with sequence_parallel.
        """
        if not self.input_is_parallel:
            if x.size(-1) != self.in_features:
                raise ValueError(
                    f"RowParallelLinear: with input_is_parallel=False x must have the unsharded {self.in_features} "
                    f"features, got shape {list(x.shape)}"
                )
            x = take_shard(x, -1, group=self.group, unit=self.unit, grad_codec=self.grad_codec)
        if self.sequence_parallel:
            return ops.gemm_reduce_scatter(
                x,
                self.weight,
                self.bias,
                group=self.group,
                dim=self.sequence_dim,
                codec=self.codec,
                grad_codec=self.grad_codec,
            )
        return ops.gemm_all_reduce(x, self.weight, self.bias, group=self.group, codec=self.codec)
