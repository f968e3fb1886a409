"""nn.Linear sharded over the ranks, along its outputs (column) or its inputs (row)."""

from __future__ import annotations

import math
from typing import Any, Self, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn import init

from tpkernels import ops
from tpkernels.comm.group import Group

from .base import Cut, ParallelModule, gather, init_shard_
from .block_random import BlockRandom
from .functions import local_linear, sum_shared, take_shard
from .shared_input import SharedInput


class LinearOptions(TypedDict, total=False):
    """The options of both linears, which their docstrings explain."""

    group: Group | None
    sequence_parallel: bool
    sequence_dim: int
    codec: str
    grad_codec: str | None
    unit: int
    device: torch.device | str | None
    dtype: torch.dtype | None


class _ParallelLinear(ParallelModule):
    """What the two linears share. `_weight_dim` is the sharded dimension of the weight [N, K].

    The class attributes are what `convert` sets where a linear of a model becomes a parallel one.
    """

    _weight_dim: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    sequence_parallel: bool = False
    sequence_dim: int = 0
    codec: str = "none"
    grad_codec: str = "none"
    transposed: bool = False  # the weight is stored as [K, N]: Conv1D of transformers
    random: BlockRandom | None = None  # the stretch of the rank's own random numbers that the layer begins or ends

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        group: Group | None = None,
        sequence_parallel: bool = False,
        sequence_dim: int = 0,
        codec: str = "none",
        grad_codec: str | None = None,
        unit: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(group)
        self.in_features = in_features
        self.out_features = out_features
        self.sequence_parallel = sequence_parallel
        self.sequence_dim = sequence_dim
        self.codec = codec
        self.grad_codec = codec if grad_codec is None else grad_codec
        cut = Cut(self._weight_dim, (out_features, in_features)[self._weight_dim], unit)
        self._add_parameter("weight", (out_features, in_features), cut, device=device, dtype=dtype)
        if bias:
            bias_cut = cut if self._weight_dim == 0 else None
            self._add_parameter("bias", (out_features,), bias_cut, device=device, dtype=dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew: bit for bit this rank's shard of what nn.Linear draws for the same seed.

        All ranks must call it with their default generators in the same state; they end in that of the unsharded layer.
        """

        def fill(weight: Tensor) -> None:
            init.kaiming_uniform_(weight.t() if self.transposed else weight, a=math.sqrt(5))

        init_shard_(self.weight, fill, by_rows=not self.transposed)
        if self.bias is not None:
            K = self._full_sizes()[1]
            bound = 1 / math.sqrt(K) if K > 0 else 0
            init_shard_(self.bias, lambda b: init.uniform_(b, -bound, bound), by_rows=True)

    @classmethod
    def from_linear(cls, module: nn.Linear, *, group: Group | None = None, **options: Any) -> Self:
        """Shard an nn.Linear that all ranks hold: values, dtype, device, requires_grad and training flag are kept.

        Args:
            module: the same on all ranks; it is not changed, and its memory is free once the caller drops it.
            group: over which to shard; None means all ranks.
            options: the keyword arguments of the constructor, such as sequence_parallel.

        Raises:
            TypeError: the module is no nn.Linear.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{cls.__name__}.from_linear: module must be an nn.Linear, got {type(module).__name__}")
        bias = module.bias is not None
        new = cls(module.in_features, module.out_features, bias, group=group, device="meta", **options)
        return new._copy_from(module)

    def _mark(self) -> None:
        super()._mark()
        if "weight" in self._cuts:
            self.group.note_shards(len(set(self._info(self._cuts["weight"]).sizes)) == 1)

    def full_weight(self) -> Tensor:
        """Return the full weight [N, K] on every rank (detached). Collective: all ranks must call it."""
        full = self._full("weight")
        return full.t() if self.transposed else full

    def full_bias(self) -> Tensor | None:
        """Return the full bias [N] on every rank (detached), or None. Collective: all ranks must call it."""
        return None if self.bias is None else self._full("bias")

    def local_parameter(self, name: str) -> Tensor | None:
        """Return this rank's parameter for use in a forward; the gradient of indices that ranks share is summed."""
        parameter: Tensor | None = getattr(self, name)
        if parameter is None:
            return None
        cut = self._cuts.get(name)
        if cut is not None and cut.runs and parameter.requires_grad and torch.is_grad_enabled():
            info = self._info(cut)
            if info.shared:
                return sum_shared(parameter, info)
        return parameter

    def _operands(self) -> tuple[Tensor, Tensor | None]:
        """The local weight, as [N, K], and bias."""
        weight = cast(Tensor, self.local_parameter("weight"))
        return (weight.t() if self.transposed else weight), self.local_parameter("bias")

    def _full_sizes(self) -> tuple[int, int]:
        """The full N and K."""
        shape = list(self.weight.shape)
        sizes = shape[::-1] if self.transposed else shape
        sizes[self._weight_dim] = self._cuts["weight"].full_size
        return sizes[0], sizes[1]

    def extra_repr(self) -> str:
        """Return the full sizes, this rank's shard, and what differs from the defaults."""
        N, K = self._full_sizes()
        sizes = [f"out_features={N}", f"in_features={K}"]
        sizes[self._weight_dim] += f" (shard {self.weight.size(self._cuts['weight'].dim)})"
        parts = [*reversed(sizes), f"bias={self.bias is not None}"]
        parts.append(f"rank={self.group.rank} of {self.group.world_size}")
        if self.sequence_parallel:
            parts.append(f"sequence_dim={self.sequence_dim}")
        if self.codec != "none":
            parts.append(f"codec={self.codec!r}")
        if self.grad_codec != self.codec:
            parts.append(f"grad_codec={self.grad_codec!r}")
        return ", ".join(parts)


class ColumnParallelLinear(_ParallelLinear):
    """nn.Linear sharded along its output features: rank r computes its columns of y, without communication.

        y_shard = x @ w_shard.T + bias_shard             # [..., N / R]
        y = all_gather(y_shard, dim=-1)                  # with gather_output

    The gradient of x is summed over the ranks while the weight gradient is being computed. With sequence_parallel, x is
    this rank's shard of the tokens: it is gathered on the way in, and its gradient scattered on the way back.

    Args:
        in_features, out_features, bias: as for nn.Linear, the full sizes. out_features need not divide by R.
        group: over which to shard; None means all ranks.
        gather_output: return all N features on every rank instead of this rank's.
        sequence_parallel: x is sharded along sequence_dim.
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
    gather_output: bool = False
    input_grad_summed: bool = False  # in front of the layer, by the block around it, so not by the layer
    shared: SharedInput | None = None  # the layers that take the same x and sum its gradient together

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gather_output: bool = False,
        **options: Unpack[LinearOptions],
    ) -> None:
        super().__init__(in_features, out_features, bias, **options)
        self.gather_output = gather_output

    def forward(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        """Multiply.

        Args:
            x: [..., K], also [K], replicated, or this rank's tokens with sequence_parallel.
            sequence_size: the number of tokens along sequence_dim on all ranks together. None: the ranks exchange
                theirs, and under torch.compile it is R times this rank's; uneven shards must have it given there.

        Returns:
            [..., N / R], or [..., N] with gather_output.
        """
        if x.dim() == 1:
            return self.forward(x.unsqueeze(0), sequence_size).squeeze(0)
        weight, bias = self._operands()
        if self.random is not None:
            self.random.switch_to_own(self.group)
        y = self._product(x, weight, bias, sequence_size)
        if not self.gather_output:
            return y
        cut = self._cuts["weight"]
        return gather(y, -1, cut.full_size, self.group, unit=cut.unit)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, sequence_size: int | None) -> Tensor:
        """This rank's outputs of all tokens."""
        if self.sequence_parallel:
            return ops.all_gather_gemm(
                x,
                weight,
                bias,
                group=self.group,
                dim=self.sequence_dim,
                dim_size=sequence_size,
                codec=self.codec,
                grad_codec=self.grad_codec,
            )
        if torch.is_grad_enabled():
            summed = x if self.input_grad_summed else None
            if summed is None and self.shared is not None:
                summed = self.shared.enter(x, self.group)
            if summed is not None:
                return local_linear(summed, weight, bias, self.group)
        return ops.replicated_gemm(x, weight, bias, group=self.group, codec=self.grad_codec)


class RowParallelLinear(_ParallelLinear):
    """nn.Linear sharded along its input features: the ranks' products are summed, while they are still being computed.

        y = all_reduce(x_shard @ w_shard.T) + bias       # [..., N]
        y_shard = split(y, R, sequence_dim)[rank]        # with sequence_parallel

    Args:
        in_features, out_features, bias: as for nn.Linear, the full sizes. in_features need not divide by R. The bias is
            replicated and added once; its gradient is whole on every rank.
        group: over which to shard; None means all ranks.
        input_is_parallel: x is this rank's [..., K / R], as a ColumnParallelLinear returns it. False: x is replicated
            [..., K], the layer takes its shard, and the gradient of x is gathered.
        sequence_parallel: return this rank's shard of the tokens only.
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
    input_is_parallel: bool = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        input_is_parallel: bool = True,
        **options: Unpack[LinearOptions],
    ) -> None:
        super().__init__(in_features, out_features, bias, **options)
        self.input_is_parallel = input_is_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and sum over the ranks.

        Args:
            x: [..., K / R], also [K / R], or replicated [..., K] with input_is_parallel=False.

        Returns:
            [..., N] on every rank, or this rank's tokens of it with sequence_parallel.

        Raises:
            ValueError: x does not have this rank's features, or the full ones with input_is_parallel=False.
        """
        if x.dim() == 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        weight, bias = self._operands()
        if self.random is not None:
            self.random.switch_back()
        if not self.input_is_parallel:
            cut = self._cuts["weight"]
            if x.size(-1) != cut.full_size:
                raise ValueError(
                    f"RowParallelLinear: with input_is_parallel=False x must have the unsharded {cut.full_size} "
                    f"features, got shape {list(x.shape)}"
                )
            x = take_shard(x, -1, group=self.group, unit=cut.unit, grad_codec=self.grad_codec)
        if self.sequence_parallel:
            return ops.gemm_reduce_scatter(
                x,
                weight,
                bias,
                group=self.group,
                dim=self.sequence_dim,
                codec=self.codec,
                grad_codec=self.grad_codec,
            )
        return ops.gemm_all_reduce(x, weight, bias, group=self.group, codec=self.codec)
