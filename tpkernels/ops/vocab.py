"""Embedding and cross entropy over a vocabulary that is cut over the ranks.

Every function: the public name, the fake kernel (what torch.compile sees), the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpkernels.comm.group import Group, resolve
from tpkernels.compress import FLOATS
from tpkernels.shard import part_size, part_start

from ._op import Op
from .checks import check_size, check_tensor, names, sums_dtype
from .gradients import copy_to
from .sizes import sizes_of_ranks

VOCAB_EMBEDDING = Op("vocab_embedding", communicates=True)
VOCAB_CROSS_ENTROPY = Op("vocab_cross_entropy", communicates=True)
VOCAB_EMBEDDING_BACKWARD = Op("vocab_embedding_backward")
VOCAB_CROSS_ENTROPY_BACKWARD = Op("vocab_cross_entropy_backward")

_IDS = (torch.int64, torch.int32)


def _start_and_size(op: str, shard: int, vocab_size: int | None, group: Group) -> tuple[int, int]:
    """Return the first id of this rank's part of the vocabulary, and the size of the vocabulary.

    Args:
        op: the public function, for the text.
        shard: how many ids this rank has.
        vocab_size: cut by the rule of shard.py; None: the ranks exchange their sizes.
        group: the ranks.
    """
    R, rank = group.world_size, group.rank
    if vocab_size is not None:
        check_size(op, "vocab_size", vocab_size)
        expected = part_size(vocab_size, R, rank)
        if shard != expected:
            raise ValueError(
                f"{op}: rank {rank} of {R} must have {expected} of the {vocab_size} ids of vocab_size, got {shard}"
            )
        return part_start(vocab_size, R, rank), vocab_size
    sizes = sizes_of_ranks(shard, group)
    return sum(sizes[:rank]), sum(sizes)


def vocab_embedding(
    ids: Tensor, table_shard: Tensor, *, group: Group | None = None, vocab_size: int | None = None
) -> Tensor:
    """Look ids up in a table whose rows are cut over the ranks.

    Equal to:

        table = cat([table_0, ..., table_{R-1}])     # [V, D]
        y = table[ids]                               # [..., D], the same on every rank

    Args:
        ids: [...], replicated, int64 | int32, each in [0, V).
        table_shard: [V / R, D], this rank's rows, fp32 | bf16 | fp16 | fp64. Any cut in rank order, even or not.
        group: the ranks; None means all ranks of the default process group.
        vocab_size: V, cut so that the first ranks have one row more. None: the ranks exchange their sizes (a short call
            more, and any cut is right); under torch.compile it means R equal parts.

    Returns:
        y, contiguous, the dtype of table_shard. One rank holds each row, so nothing is rounded.

    Gradient: local, each rank adds up the rows that are its own.

    Raises:
        TypeError, ValueError: shapes, dtypes or sizes do not fit, or an id is outside the vocabulary.
        RankMismatchError: the ranks called with different shapes or dtypes.
        TimeoutError, PeerLostError: a rank did not come within `group.timeout_s`, or died; the text names it.

    Source: vocabulary-parallel embedding of Shoeybi et al. 2019 (arXiv:1909.08053).
    """
    group = resolve(group)
    call = VOCAB_EMBEDDING.way(group, ids, table_shard)
    if call is VOCAB_EMBEDDING.dispatch:
        check_tensor("vocab_embedding", "ids", ids, group)
        check_tensor("vocab_embedding", "table_shard", table_shard, group)
    if ids.dtype not in _IDS:
        raise ValueError(f"vocab_embedding: ids must have a dtype of {names(_IDS)}, got {names([ids.dtype])}")
    if table_shard.dtype not in FLOATS:
        raise ValueError(
            f"vocab_embedding: table_shard must have a dtype of {names(FLOATS)}, got {names([table_shard.dtype])}"
        )
    if table_shard.dim() != 2:
        raise ValueError(
            f"vocab_embedding: table_shard must have 2 dims [V / R, D], got {table_shard.dim()} "
            f"(shape {list(table_shard.shape)})"
        )
    start, size = _start_and_size("vocab_embedding", table_shard.shape[0], vocab_size, group)
    return call(ids, table_shard, group.name, group.world_size, start, size)  # type: ignore[no-any-return]


@VOCAB_EMBEDDING.fake
def _vocab_embedding_fake(
    ids: Tensor, table_shard: Tensor, group: str, world_size: int, vocab_start: int, vocab_size: int
) -> Tensor:
    return table_shard.new_empty([*ids.shape, table_shard.shape[1]])


@VOCAB_EMBEDDING_BACKWARD.fake
def _vocab_embedding_backward_fake(dy: Tensor, ids: Tensor, vocab_start: int, shard_size: int) -> Tensor:
    return dy.new_empty([shard_size, dy.shape[-1]])


def _vocab_embedding_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, table_shard, ctx.group, ctx.world_size, ctx.start, _ = inputs
    ctx.shard = table_shard.shape[0]
    ctx.save_for_backward(ids)


def _vocab_embedding_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        mine, local = _own(ids, ctx.start, ctx.shard)
        dy = copy_to(dy, ctx.group, ctx.world_size)
        rows = torch.where(mine.unsqueeze(-1), dy, torch.zeros_like(dy)).reshape(ids.numel(), dy.shape[-1])
        dtable = dy.new_zeros(ctx.shard, dy.shape[-1]).index_add(0, local.reshape(-1), rows) if ctx.shard else None
    else:
        dtable = VOCAB_EMBEDDING_BACKWARD(dy, ids, ctx.start, ctx.shard)
    return None, dtable, None, None, None, None


def _own(ids: Tensor, start: int, shard: int) -> tuple[Tensor, Tensor]:
    """Return a mask of the ids of this rank's shard, and their rows there (0 for the others)."""
    local = ids - start
    mine = (local >= 0) & (local < shard)
    return mine, local.masked_fill(~mine, 0).to(torch.int64)


VOCAB_EMBEDDING.gradient(_vocab_embedding_gradient, _vocab_embedding_context)


def vocab_cross_entropy(
    logits_shard: Tensor,
    target: Tensor,
    *,
    group: Group | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of every token over logits whose vocabulary, the last dimension, is cut over the ranks.

    Equal to, without ever holding logits of the full vocabulary:

        logits = cat([logits_0, ..., logits_{R-1}], dim=-1)                   # [..., V]
        lse = log(sum(exp(logits), dim=-1))
        loss = lse - (1 - s) * logits[target] - s / V * sum(logits, dim=-1)   # s = label_smoothing
        loss[target == ignore_index] = 0                                      # [...], the same on every rank

    Args:
        logits_shard: [..., V / R], fp32 | bf16 | fp16 | fp64. Any cut in rank order, even or not.
        target: [...], replicated, int64 | int32, each in [0, V) or ignore_index.
        group: the ranks; None means all ranks of the default process group.
        vocab_size: V, cut so that the first ranks have one id more. None: the ranks exchange their sizes (a short call
            more, and any cut is right); under torch.compile it means R equal parts.
        ignore_index: the target of tokens that do not count.
        label_smoothing: in [0, 1], the part of the target that is spread over the full vocabulary.

    Returns:
        the loss of every token, fp32 (fp64 for fp64 logits), summed in that dtype. Every rank has the same bits.

    Gradient: local. Autocast changes nothing here.

    Raises:
        TypeError, ValueError: shapes, dtypes or sizes do not fit, or a target is outside the vocabulary.
        RankMismatchError, TimeoutError, PeerLostError: as in `vocab_embedding`.

    Source: vocabulary-parallel cross entropy of Shoeybi et al. 2019 (arXiv:1909.08053).
    """
    group = resolve(group)
    call = VOCAB_CROSS_ENTROPY.way(group, logits_shard, target)
    plain = call is not VOCAB_CROSS_ENTROPY.dispatch
    _check_loss(logits_shard, target, ignore_index, label_smoothing, group, plain=plain)
    start, size = _start_and_size("vocab_cross_entropy", logits_shard.shape[-1], vocab_size, group)
    smoothing = float(label_smoothing)
    loss, _ = call(logits_shard, target, group.name, group.world_size, start, size, ignore_index, smoothing)
    return loss  # type: ignore[no-any-return]


def _check_loss(
    logits: Any, target: Any, ignore_index: Any, label_smoothing: Any, group: Group, *, plain: bool
) -> None:
    op = "vocab_cross_entropy"
    if not plain:
        check_tensor(op, "logits_shard", logits, group)
        check_tensor(op, "target", target, group)
    if logits.dtype not in FLOATS:
        raise ValueError(f"{op}: logits_shard must have a dtype of {names(FLOATS)}, got {names([logits.dtype])}")
    if target.dtype not in _IDS:
        raise ValueError(f"{op}: target must have a dtype of {names(_IDS)}, got {names([target.dtype])}")
    if logits.dim() < 1 or logits.shape[:-1] != target.shape:
        raise ValueError(
            f"{op}: target must have the shape of logits_shard without the last dim, "
            f"got {list(target.shape)} and {list(logits.shape)}"
        )
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, int | float):
        raise TypeError(f"{op}: label_smoothing must be a float, got {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")


@VOCAB_CROSS_ENTROPY.fake
def _vocab_cross_entropy_fake(logits_shard: Tensor, target: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    loss = logits_shard.new_empty(target.shape, dtype=sums_dtype(logits_shard.dtype))
    return loss, logits_shard.new_empty(target.shape, dtype=torch.float64)


@VOCAB_CROSS_ENTROPY_BACKWARD.fake
def _vocab_cross_entropy_backward_fake(dloss: Tensor, logits_shard: Tensor, *rest: Any) -> Tensor:
    return logits_shard.new_empty(logits_shard.shape)


def _vocab_cross_entropy_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_shard, target, *ctx.call = inputs
    ctx.save_for_backward(logits_shard, target, output[1])
    ctx.set_materialize_grads(False)  # lse is the op's own: its gradient is there only in a second derivative


def _vocab_cross_entropy_gradient(ctx: Any, dloss: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, target, lse = ctx.saved_tensors
    nothing = [None] * (len(ctx.call) + 1)
    if torch.is_grad_enabled():
        return _differentiable_gradient(ctx, dloss, dlse), *nothing
    dlogits: Tensor | None = None
    if dloss is not None:
        dlogits = VOCAB_CROSS_ENTROPY_BACKWARD(dloss, logits, target, lse, *ctx.call[2:])
    if dlse is not None:
        through_lse = (dlse.unsqueeze(-1) * _softmax(logits, lse)).to(logits.dtype)
        dlogits = through_lse if dlogits is None else dlogits + through_lse
    return dlogits, *nothing


def _softmax(logits: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(logits.to(lse.dtype) - lse.unsqueeze(-1))


def _differentiable_gradient(ctx: Any, dloss: Tensor | None, dlse: Tensor | None) -> Tensor | None:
    """Return the gradient of the logits, from differentiable ops, for second derivatives."""
    logits, target, lse = ctx.saved_tensors
    group, world_size, start, size, ignore_index, smoothing = ctx.call
    softmax = _softmax(logits, copy_to(lse, group, world_size))
    total: Tensor | None = None
    if dloss is not None:
        scale = copy_to(dloss, group, world_size).masked_fill(target == ignore_index, 0.0).unsqueeze(-1)
        mine, local = _own(target, start, logits.shape[-1])
        hot = torch.arange(logits.shape[-1], device=logits.device) == torch.where(mine, local, -1).unsqueeze(-1)
        total = scale * (softmax - (1.0 - smoothing) * hot - smoothing / size)
    if dlse is not None:
        through_lse = copy_to(dlse, group, world_size).unsqueeze(-1) * softmax
        total = through_lse if total is None else total + through_lse
    return None if total is None else total.to(logits.dtype)


VOCAB_CROSS_ENTROPY.gradient(_vocab_cross_entropy_gradient, _vocab_cross_entropy_context)
