"""The baseline of the training step: tpkernels.train.gpt's parts, written with torch.distributed alone.

F.linear and gloo collectives, sharded like Megatron-LM's layers (Shoeybi et al. 2019, arXiv:1909.08053) and with their
overlap: the input gradient of a column-parallel linear is all-reduced (async_op) while the weight gradient is computed.
Even shards only. Nothing of tpkernels is used but the sizes of the shards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tpkernels.shard import ShardInfo, mark_shard, part
from tpkernels.train.gpt import GPT, Parts


def plain_parts() -> Parts:
    """Parts over the default process group."""
    return Parts(
        embedding=Embedding, column=column, row=row, norm=nn.LayerNorm, loss=cross_entropy, gather_logits=gather_logits
    )


def column(in_features: int, out_features: int, bias: bool = True, *, unit: int = 1) -> nn.Module:
    del unit  # even cuts keep heads whole by themselves
    return Linear(in_features, out_features, bias, dim=0)


def row(in_features: int, out_features: int, bias: bool = True, *, unit: int = 1) -> nn.Module:
    del unit
    return Linear(in_features, out_features, bias, dim=1)


class Linear(nn.Module):
    """nn.Linear cut along dim 0 (column) or 1 (row) of its weight, drawn whole and cut so that the start is equal."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dim: int) -> None:
        super().__init__()
        whole = nn.Linear(in_features, out_features, bias)
        self.dim = dim
        self.weight = cut(whole.weight, dim)
        self.bias = None if not bias else cut(whole.bias, 0) if dim == 0 else whole.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.dim == 0:
            return ColumnLinear.apply(x, self.weight, self.bias)
        y = SumOverRanks.apply(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class ColumnLinear(torch.autograd.Function):
    """x @ w.T + b; backward sums the gradient of x over the ranks meanwhile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight
        travelling = dist.all_reduce(dx, async_op=True)
        dw = dy.t() @ x
        db = dy.sum(0) if ctx.has_bias else None
        travelling.wait()
        return dx, dw, db


class SumOverRanks(torch.autograd.Function):
    """all_reduce; its gradient is the same on all ranks already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


class Embedding(nn.Module):
    """nn.Embedding with its rows cut: rows of other ranks count as zeros, then all_reduce."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = cut(nn.Embedding(num_embeddings, embedding_dim).weight, 0)
        self.start = dist.get_rank() * self.weight.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self.start
        outside = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(outside, 0), self.weight)
        return SumOverRanks.apply(rows.masked_fill(outside.unsqueeze(-1), 0.0))


class Loss(nn.Module):
    """The loss of a model as a forward, which is what DDP takes."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        return self.model.loss(ids, target)


class CrossEntropy(torch.autograd.Function):
    """Three all_reduces of one number a token, as Megatron-LM does it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        largest = logits.amax(dim=-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        shifted = logits - largest.unsqueeze(-1)
        local = target - dist.get_rank() * logits.shape[-1]
        outside = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(outside, 0)
        picked = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(outside, 0.0)
        dist.all_reduce(picked)
        exponentials = shifted.exp_()
        total = exponentials.sum(dim=-1)
        dist.all_reduce(total)
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), local, outside)
        return total.log() - picked

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        probabilities, local, outside = ctx.saved_tensors
        gradient = probabilities.clone()
        gradient.scatter_add_(-1, local.unsqueeze(-1), -(~outside).to(gradient.dtype).unsqueeze(-1))
        return gradient.mul_(dloss.unsqueeze(-1)), None


def cross_entropy(logits: Tensor, target: Tensor, vocab: int) -> Tensor:
    del vocab  # even cuts
    return CrossEntropy.apply(logits, target)


def gather_logits(logits: Tensor, vocab: int) -> Tensor:
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, logits.contiguous())
    return torch.cat(parts, dim=-1)[:, :vocab]


def cut(whole: Tensor, dim: int) -> nn.Parameter:
    """This rank's shard as a parameter, with its ShardInfo, as the layers' parameters."""
    R, rank = dist.get_world_size(), dist.get_rank()
    if whole.size(dim) % R:
        raise ValueError(f"the plain model has even cuts only: {whole.size(dim)} does not divide over {R} ranks")
    parameter = nn.Parameter(part(whole.detach(), dim, R, rank).clone())
    mark_shard(parameter, ShardInfo(dim, whole.size(dim), R, rank))
    return parameter


def clip_grad_norm_(parameters: list[Tensor], max_norm: float) -> Tensor:
    """One all_reduce of the sum of squares of cut parameters; replicated ones count once."""
    squares = [torch.zeros(()), torch.zeros(())]
    for parameter in parameters:
        if parameter.grad is not None:
            squares[hasattr(parameter, "tpk_shard")] += parameter.grad.square().sum()
    replicated, cut_ones = squares
    dist.all_reduce(cut_ones)
    norm = (replicated + cut_ones).sqrt()
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
