"""nn.EmbeddingBag sharded along its rows: the large tables of recommender models."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from tpkernels import ops
from tpkernels.comm.group import Group

from .embedding import VocabParallelTable
from .functions import sum_gradient

MODES = ("sum", "mean")


class VocabParallelEmbeddingBag(VocabParallelTable):
    """nn.EmbeddingBag sharded along its rows: each rank sums its own rows of each bag, and the ranks sum the bags.

        y[b] = sum_i w_i table[ids_i]                    # over the ids of bag b; [B, H] on every rank
        y[b] = y[b] / number of ids                      # mode "mean"; an empty bag gives zeros

    Args:
        num_embeddings, embedding_dim: as for nn.EmbeddingBag, the full sizes. num_embeddings need not divide by R.
        group: over which to shard; None means all ranks.
        mode: "sum" or "mean", as in torch ("max" is not supported).
        padding_idx: ids of this row belong to no bag, and the row gets no gradient. Negative counts from the end.
        include_last_offset: offsets have one entry more, the number of ids.
        codec: how the partial sums of the bags are packed on the wire.
        device, dtype: as for nn.EmbeddingBag; "meta" allocates nothing.

    Raises:
        ValueError: another mode, or padding_idx outside the table; in forward, ids, offsets or weights that do not fit.

    Source: row-wise sharded tables of Naumov et al. 2019 (arXiv:1906.00091).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        group: Group | None = None,
        mode: str = "mean",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        codec: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"VocabParallelEmbeddingBag: mode must be one of {', '.join(MODES)}, got {mode!r}")
        super().__init__(num_embeddings, embedding_dim, group, padding_idx, device, dtype)
        self.mode = mode
        self.include_last_offset = include_last_offset
        self.codec = codec

    @classmethod
    def from_embedding_bag(cls, module: nn.EmbeddingBag, *, group: Group | None = None, codec: str = "none") -> Self:
        """Shard an nn.EmbeddingBag that all ranks hold: values, dtype, device and options are kept.

        Args:
            module: the same on all ranks; it is not changed.
            group: over which to shard; None means all ranks.
            codec: as in the constructor.

        Raises:
            TypeError: the module is no nn.EmbeddingBag.
            ValueError: the module uses max_norm, scale_grad_by_freq, sparse, or mode "max".
        """
        if not isinstance(module, nn.EmbeddingBag):
            raise TypeError(
                f"{cls.__name__}.from_embedding_bag: module must be an nn.EmbeddingBag, got {type(module).__name__}"
            )
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                raise ValueError(
                    f"{cls.__name__}.from_embedding_bag: {option} is not supported, got {getattr(module, option)}"
                )
        new = cls(
            module.num_embeddings,
            module.embedding_dim,
            group=group,
            mode=module.mode,
            padding_idx=module.padding_idx,
            include_last_offset=module.include_last_offset,
            codec=codec,
            device="meta",
        )
        return new._copy_from(module)

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Sum the rows of each bag.

        Args:
            ids: [B, L], B bags of L ids, or [N] with offsets; replicated, int64 or int32, each within the table.
            offsets: [B] (or [B + 1] with include_last_offset), where each bag begins in ids; only with ids [N].
            per_sample_weights: the shape of ids, for mode "sum"; replicated, and so is its gradient.

        Returns:
            [B, H] on every rank, the dtype of the table.
        """
        ids, offsets, weights = self._checked(ids, offsets, per_sample_weights)
        start, end = self._rows()
        counted = torch.ones_like(ids, dtype=torch.bool) if self.padding_idx is None else ids != self.padding_idx
        mine = (ids >= start) & (ids < end) & counted
        if weights is not None:
            (weights,) = sum_gradient(weights, group=self.group)
        y = ops.all_reduce(self._bags(ids - start, offsets, weights, mine), group=self.group, codec=self.codec)
        if self.mode == "sum":
            return y
        sizes = _count(counted, offsets).clamp(min=1).unsqueeze(1)
        return y / sizes.to(y.dtype)

    def _bags(self, local: Tensor, offsets: Tensor, weights: Tensor | None, mine: Tensor) -> Tensor:
        """This rank's part of the sum of every bag. Ids of other ranks are dropped, so that R ranks share the work.

        Under torch.compile, where sizes must not depend on values, they stay, with a weight of zero.
        """
        if self.weight.size(0) == 0:
            # Zero, but a function of all inputs: the gradient of the weights is summed by all ranks.
            nothing = 0.0 if weights is None else torch.where(mine, weights, 0).sum()
            return self.weight.new_zeros(offsets.numel() - 1, self.embedding_dim) + self.weight.sum() + nothing
        if is_compiling():
            scale = mine.to(self.weight.dtype) if weights is None else torch.where(mine, weights, 0)
            return self._embedding_bag(torch.where(mine, local, 0), offsets, scale)
        starts = F.pad(_count(mine, offsets).cumsum(0), (1, 0)).to(offsets.dtype)
        return self._embedding_bag(local[mine], starts, None if weights is None else weights[mine])

    def _embedding_bag(self, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        return F.embedding_bag(
            ids, self.weight, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )

    def _checked(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids [N], where each bag begins and the last one ends [B + 1], and the weights [N]."""
        name = type(self).__name__
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: ids must be int64 or int32, got {ids.dtype}")
        if weights is not None and (self.mode != "sum" or weights.shape != ids.shape):
            raise ValueError(
                f"{name}: per_sample_weights must have the shape of ids, {list(ids.shape)}, and mode 'sum', got shape "
                f"{list(weights.shape)} and mode {self.mode!r}"
            )
        if weights is not None and weights.dtype != self.weight.dtype:
            raise TypeError(f"{name}: per_sample_weights must be {self.weight.dtype}, got {weights.dtype}")
        flat = None if weights is None else weights.reshape(-1)
        if ids.dim() == 2 and offsets is None:
            ends = torch.arange(ids.size(0) + 1, dtype=ids.dtype, device=ids.device) * ids.size(1)
            return self._within(ids.reshape(-1)), ends, flat
        if ids.dim() != 1 or offsets is None or offsets.dim() != 1:
            raise ValueError(
                f"{name}: ids must be [B, L] without offsets or [N] with offsets [B], got ids {list(ids.shape)} and "
                f"offsets {None if offsets is None else list(offsets.shape)}"
            )
        offsets = offsets.to(ids.dtype)
        if not self.include_last_offset:
            offsets = F.pad(offsets, (0, 1), value=ids.numel())
        return self._within(ids), self._ordered(offsets, ids.numel()), flat

    def _within(self, ids: Tensor) -> Tensor:
        if is_compiling() or ids.numel() == 0:
            return ids
        low, high = torch.aminmax(ids)
        fits = (low >= 0) & (high < self.num_embeddings)
        if ids.device.type != "cpu":
            torch._assert_async(fits)
        elif not bool(fits):
            bad = int(low) if int(low) < 0 else int(high)
            raise ValueError(f"{type(self).__name__}: ids must be in [0, {self.num_embeddings}), got {bad}")
        return ids

    def _ordered(self, offsets: Tensor, total: int) -> Tensor:
        if is_compiling() or offsets.device.type != "cpu":
            return offsets
        if int(offsets[0]) != 0 or int(offsets[-1]) != total or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"{type(self).__name__}: offsets must begin with 0 and rise to {total} at most, got {offsets.tolist()}"
            )
        return offsets

    def extra_repr(self) -> str:
        """Return the full sizes, this rank's shard, and what differs from the defaults."""
        parts = [f"{self.num_embeddings} (shard {self.weight.size(0)})", str(self.embedding_dim), f"mode={self.mode!r}"]
        parts.append(f"rank={self.group.rank} of {self.group.world_size}")
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        return ", ".join(parts + ([f"codec={self.codec!r}"] if self.codec != "none" else []))


def _count(chosen: Tensor, offsets: Tensor) -> Tensor:
    """The number of chosen ids of each bag."""
    before = F.pad(chosen.to(offsets.dtype).cumsum(0), (1, 0))
    ends = before[offsets]
    return ends[1:] - ends[:-1]
