"""The baselines of the ops: the same with torch alone, written as a user would."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# The same two functions; torch 2.13 renamed them and warns at each call of the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gloo_all_reduce(x: Tensor) -> Tensor:
    """In place."""
    dist.all_reduce(x)
    return x


def gloo_reduce_scatter(out: Tensor, x: Tensor) -> Tensor:
    """Into a kept output."""
    reduce_scatter(out, x)
    return out


def gloo_all_reduce_slice(x: Tensor, start: int, length: int) -> Tensor:
    """What many write instead of gloo's reduce_scatter, which is slower from some size on."""
    dist.all_reduce(x)
    return x.narrow(0, start, length)


def gloo_all_gather(out: Tensor, x_shard: Tensor) -> Tensor:
    """Into a kept output."""
    all_gather(out, x_shard)
    return out


def linear_gloo(x_shard: Tensor, w_shard: Tensor) -> Tensor:
    """F.linear, then gloo's all_reduce in place."""
    return gloo_all_reduce(F.linear(x_shard, w_shard))


def linear_gloo_reduce_scatter(out: Tensor, x_shard: Tensor, w_shard: Tensor) -> Tensor:
    """F.linear, then gloo's reduce_scatter."""
    return gloo_reduce_scatter(out, F.linear(x_shard, w_shard))


def gloo_all_gather_linear(whole: Tensor, x_shard: Tensor, w_shard: Tensor) -> Tensor:
    """gloo's all_gather, then F.linear."""
    return F.linear(gloo_all_gather(whole, x_shard), w_shard)


def onednn_linear(x: Tensor, w: Tensor) -> Tensor:
    """The linear of torch's own oneDNN, which F.linear does not take in fp32."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return y


def why_no_onednn(dtype: torch.dtype) -> str | None:
    """None if oneDNN's linear runs here for this dtype, otherwise the reason in words."""
    x = torch.ones(2, 4, dtype=dtype)
    try:
        onednn_linear(x, x)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def add_rms_norm_gloo(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """gloo's all_reduce in place, the residual, torch's RMSNorm."""
    return F.rms_norm(gloo_all_reduce(x) + residual, weight.shape, weight, eps)


def embedding_gloo(ids: Tensor, table_shard: Tensor, start: int) -> Tensor:
    """Rows of other ranks as zeros, then gloo's all_reduce."""
    local = ids - start
    outside = (local < 0) | (local >= table_shard.shape[0])
    rows = F.embedding(local.masked_fill(outside, 0), table_shard)
    return gloo_all_reduce(rows.masked_fill_(outside.unsqueeze(-1), 0))


def cross_entropy_gloo(logits_shard: Tensor, target: Tensor, start: int) -> Tensor:
    """Three all_reduces of one number a token: largest logit, sum of exponentials, logit of the target."""
    logits = logits_shard.float()
    largest = logits.amax(dim=-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    shifted = logits - largest.unsqueeze(-1)
    local = target - start
    outside = (local < 0) | (local >= logits.shape[-1])
    picked = shifted.gather(-1, local.masked_fill(outside, 0).unsqueeze(-1)).squeeze(-1).masked_fill_(outside, 0)
    total = shifted.exp_().sum(dim=-1)
    dist.all_reduce(picked)
    dist.all_reduce(total)
    return total.log_() - picked


def gathered_cross_entropy_gloo(parts: Tensor, logits_shard: Tensor, target: Tensor) -> Tensor:
    """All logits to every rank (parts is [R, tokens, words / R]), then torch's own loss."""
    all_gather(parts.flatten(0, 1), logits_shard)
    whole = parts.transpose(0, 1).reshape(logits_shard.shape[0], -1)
    return F.cross_entropy(whole.float(), target, reduction="none")
