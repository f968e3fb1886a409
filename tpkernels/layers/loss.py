"""Cross entropy of logits that are sharded over the vocabulary."""

from __future__ import annotations

from torch import Tensor

from tpkernels import ops
from tpkernels.comm.group import Group

from .base import ParallelModule

REDUCTIONS = ("none", "mean", "sum")


class VocabParallelCrossEntropy(ParallelModule):
    """nn.CrossEntropyLoss for logits sharded over the vocabulary, the last dimension; no rank ever holds all logits.

        loss = cross_entropy(all_gather(logits_shard, dim=-1), target)      # the same on every rank

    Args:
        group: over which the vocabulary is sharded; None means all ranks.
        vocab_size: the full vocabulary. None: all ranks exchange their sizes in every call, and under torch.compile it
            is R times this rank's; uneven shards must have it given there.
        ignore_index: targets with this value are left out.
        label_smoothing: in [0, 1], spread over the full vocabulary.
        reduction: "none" | "mean" | "sum". The mean is over the tokens that are not ignored, and as in torch it is NaN
            when there is none.

    Raises:
        ValueError: reduction or label_smoothing is none of these; in forward, a target outside the vocabulary.
    """

    def __init__(
        self,
        *,
        group: Group | None = None,
        vocab_size: int | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(group)
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"VocabParallelCrossEntropy: reduction must be one of {list(REDUCTIONS)}, got {reduction!r}"
            )
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(
                f"VocabParallelCrossEntropy: label_smoothing must be between 0 and 1, got {label_smoothing}"
            )
        self.vocab_size = vocab_size
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def forward(self, logits_shard: Tensor, target: Tensor) -> Tensor:
        """Return the loss.

        Args:
            logits_shard: [..., V / R], this rank's shard of the vocabulary, fp32 | bf16 | fp16 | fp64.
            target: [...], replicated, ids in the full vocabulary or ignore_index.

        Returns:
            [...] with reduction "none", otherwise a scalar; fp32, or fp64 for fp64 logits.
        """
        loss = ops.vocab_cross_entropy(
            logits_shard,
            target,
            group=self.group,
            vocab_size=self.vocab_size,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
        if self.reduction == "none":
            return loss
        total = loss.sum()
        return total if self.reduction == "sum" else total / (target != self.ignore_index).sum()

    def extra_repr(self) -> str:
        """Return the vocabulary and what differs from the defaults."""
        parts = [f"vocab_size={self.vocab_size}", f"reduction={self.reduction!r}"]
        if self.label_smoothing:
            parts.append(f"label_smoothing={self.label_smoothing}")
        return ", ".join(parts)
