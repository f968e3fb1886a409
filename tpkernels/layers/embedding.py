"""Tables sharded along their rows, and nn.Embedding as one of them."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import init

from tpkernels import ops
from tpkernels.comm.group import Group

from .base import Cut, ParallelModule, init_shard_
from .functions import take_shard


class VocabParallelTable(ParallelModule):
    """A table of embeddings of which each rank holds its rows; the base of the layers that look rows up.

    Args:
        num_embeddings, embedding_dim: of the full table. num_embeddings need not divide by R.
        group: over which to shard; None means all ranks.
        padding_idx: this row starts as zeros. Negative counts from the end.
        device, dtype: as for nn.Embedding; "meta" allocates nothing.

    Raises:
        ValueError: padding_idx is outside the table.
    """

    weight: nn.Parameter
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        group: Group | None,
        padding_idx: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(group)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"{type(self).__name__}: padding_idx must be within the {num_embeddings} rows, got {padding_idx}"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        cut = Cut(0, num_embeddings)
        self._add_parameter("weight", (num_embeddings, embedding_dim), cut, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew: bit for bit this rank's shard of what torch's own layer draws for the same seed."""
        init_shard_(self.weight, init.normal_, by_rows=True)
        start, end = self._rows()
        if self.padding_idx is not None and start <= self.padding_idx < end:
            with torch.no_grad():
                self.weight[self.padding_idx - start].fill_(0)

    def full_weight(self) -> Tensor:
        """Return the full table on every rank (detached). Collective: all ranks must call it."""
        return self._full("weight")

    def _rows(self) -> tuple[int, int]:
        """The first row of this rank, and the one after its last."""
        info = self._info(self._cuts["weight"])
        return info.start, info.start + info.size


class VocabParallelEmbedding(VocabParallelTable):
    """nn.Embedding sharded along its rows: each rank looks up its own, the others' are zero, and the ranks sum.

        y = table[ids]                                   # [..., H] on every rank
        y_shard = split(y, R, sequence_dim)[rank]        # with sequence_parallel

    Args:
        num_embeddings, embedding_dim: as for nn.Embedding, the full sizes. num_embeddings need not divide by R.
        group: over which to shard; None means all ranks.
        padding_idx: this row starts as zeros and gets no gradient. Negative counts from the end.
        max_norm, scale_grad_by_freq, sparse: not supported; any other value than the default is a ValueError.
        sequence_parallel: return this rank's shard of the tokens only; its gradient is gathered.
        sequence_dim: the token dimension, such as 0 for ids [S, B] and 1 for [B, S].
        grad_codec: how the gradient is packed where sequence_parallel gathers it; forward nothing is packed.
        device, dtype: as for nn.Embedding; "meta" allocates nothing.

    Raises:
        ValueError: an argument that is not supported, or padding_idx outside the vocabulary; in forward, an id
            outside the vocabulary.

    Source: Shoeybi et al. 2019 (arXiv:1909.08053).
    """

    sequence_parallel: bool = False
    sequence_dim: int = 0
    grad_codec: str = "none"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        group: Group | None = None,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        sequence_parallel: bool = False,
        sequence_dim: int = 0,
        grad_codec: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _refuse(max_norm=max_norm, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)
        super().__init__(num_embeddings, embedding_dim, group, padding_idx, device, dtype)
        self.sequence_parallel = sequence_parallel
        self.sequence_dim = sequence_dim
        self.grad_codec = grad_codec

    @classmethod
    def from_embedding(cls, module: nn.Embedding, *, group: Group | None = None, **options: Any) -> Self:
        """Shard an nn.Embedding that all ranks hold: values, dtype, device, padding_idx and flags are kept.

        Args:
            module: the same on all ranks; it is not changed.
            group: over which to shard; None means all ranks.
            options: the keyword arguments of the constructor, such as sequence_parallel.

        Raises:
            TypeError: the module is no nn.Embedding.
            ValueError: the module uses max_norm, scale_grad_by_freq or sparse.
        """
        if not isinstance(module, nn.Embedding):
            raise TypeError(
                f"{cls.__name__}.from_embedding: module must be an nn.Embedding, got {type(module).__name__}"
            )
        new = cls(
            module.num_embeddings,
            module.embedding_dim,
            group=group,
            padding_idx=module.padding_idx,
            max_norm=module.max_norm,
            scale_grad_by_freq=module.scale_grad_by_freq,
            sparse=module.sparse,
            device="meta",
            **options,
        )
        return new._copy_from(module)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of the table for ids.

        Args:
            ids: [...], an integer dtype, the same on all ranks.

        Returns:
            [..., H], the dtype of the weight; with sequence_parallel this rank's tokens of it.

        Raises:
            ValueError, TypeError: the dtype or device of ids does not fit.
            TimeoutError, PeerLostError: a rank did not come within `group.timeout_s`, or died; the text names it.
        """
        y = ops.vocab_embedding(ids, self.weight, group=self.group, vocab_size=self._cuts["weight"].full_size)
        if self.padding_idx is not None:
            # The gradient stops at padding tokens; masking them is cheaper than masking a gradient of the table's size.
            y = torch.where((ids == self.padding_idx).unsqueeze(-1), y.detach(), y)
        if not self.sequence_parallel:
            return y
        return take_shard(y, self.sequence_dim, group=self.group, grad_codec=self.grad_codec)

    def extra_repr(self) -> str:
        """Return the full sizes, this rank's shard, and what differs from the defaults."""
        parts = [f"{self.num_embeddings} (shard {self.weight.size(0)})", str(self.embedding_dim)]
        parts.append(f"rank={self.group.rank} of {self.group.world_size}")
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        if self.sequence_parallel:
            parts.append(f"sequence_dim={self.sequence_dim}")
        return ", ".join(parts)


def _refuse(*, max_norm: float | None, scale_grad_by_freq: bool, sparse: bool) -> None:
    if max_norm is not None:
        raise ValueError(
            f"VocabParallelEmbedding: max_norm changes the table inside forward and is not supported, got {max_norm}; "
            f"use None and bound the rows after the optimiser's step"
        )
    if scale_grad_by_freq:
        raise ValueError("VocabParallelEmbedding: scale_grad_by_freq is not supported, got True; use False")
    if sparse:
        raise ValueError("VocabParallelEmbedding: sparse gradients are not supported, got sparse=True; use False")
