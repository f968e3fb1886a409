"""Good arguments of every registered op, below the public functions: for opcheck, leaks, and the fakes of CUDA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.testing.case import Sizes

CALLS = torch.ops.tpkernels


def sizes(group: Group, **changes: Any) -> Sizes:
    """Even over the ranks: what compiling takes when no size is given."""
    R = group.world_size
    return replace(Sizes(R=R, M=2 * R, N=3 * R, K=4 * R, V=5 * R), **changes)


def op_calls(group: Group) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every registered op with good arguments."""
    R, rank, name = group.world_size, group.rank, group.name
    x, w, bias, dy = torch.randn(2 * R, 3), torch.randn(5, 3), torch.randn(5), torch.randn(2 * R, 5)
    part, dy_part = torch.randn(2, 3), torch.randn(2, 5)
    table, ids = torch.randn(4, 3), torch.randint(4 * R, (3, 2))
    logits, target = torch.randn(3, 4), torch.randint(4 * R, (3,))
    start, loss = 4 * rank, torch.randn(3)
    needs = (True, True, True)

    def leaf(t: Tensor) -> Tensor:
        return t.clone().requires_grad_()

    return [
        (CALLS.all_reduce, (leaf(x), name, R, "sum", "none")),
        (CALLS.all_reduce, (leaf(x), name, R, "avg", "fp16")),
        (CALLS.all_reduce, (leaf(x), name, R, "max", "none")),
        (CALLS.all_reduce, (ids, name, R, "min", "none")),
        (CALLS.all_reduce_, (x.clone(), name, R, "sum", "none")),
        (CALLS.reduce_scatter, (leaf(x), name, R, rank, 0, "sum", "none", "fp16")),
        (CALLS.reduce_scatter, (leaf(x), name, R, rank, 1, "max", "none", "none")),
        (CALLS.all_gather, (leaf(part), name, R, rank, 0, 2 * R, "none", "none")),
        (CALLS.all_gather, (leaf(part), name, R, rank, 1, -1, "bf16", "fp16")),
        (CALLS.all_gather, (ids > 2, name, R, rank, 1, 2 * R, "none", "none")),
        (CALLS.gemm_all_reduce, (leaf(x), leaf(w), leaf(bias), name, R, "none")),
        (CALLS.gemm_all_reduce, (leaf(x), leaf(w), None, name, R, "fp16")),
        (CALLS.gemm_reduce_scatter, (leaf(x), leaf(w), leaf(bias), name, R, rank, 0, "none", "bf16")),
        (CALLS.all_gather_gemm, (leaf(part), leaf(w), leaf(bias), name, R, rank, 0, 2 * R, "none", "none")),
        (CALLS.all_gather_gemm, (leaf(part), leaf(w), None, name, R, rank, 0, -1, "none", "fp16")),
        (CALLS.replicated_gemm, (leaf(x), leaf(w), leaf(bias), name, R, "none")),
        (CALLS.linear_backward, (dy, x, w, *needs, name)),
        (CALLS.linear_backward, (dy, x, w, False, True, False, name)),
        (CALLS.replicated_gemm_backward, (dy, x, w, *needs, name, R, "none")),
        (CALLS.gemm_reduce_scatter_backward, (dy_part, x, w, *needs, name, R, 0, 2 * R, "none")),
        (CALLS.all_gather_gemm_backward, (dy, part, w, *needs, name, R, rank, 0, 2 * R, "none", "fp16")),
        (CALLS.vocab_embedding, (ids, leaf(table), name, R, start, 4 * R)),
        (CALLS.vocab_embedding_backward, (torch.randn(3, 2, 3), ids, start, 4)),
        (CALLS.vocab_cross_entropy, (leaf(logits), target, name, R, start, 4 * R, -100, 0.1)),
        (CALLS.vocab_cross_entropy_backward, (loss, logits, target, (loss + 5).double(), start, 4 * R, -100, 0.1)),
        (CALLS.all_reduce_add_rms_norm, (leaf(x), leaf(x), leaf(x[0]), name, R, 1e-5, "none")),
        (CALLS.all_reduce_add_rms_norm, (leaf(x), x.clone(), leaf(x[0]), name, R, 0.0, "fp16")),
        (CALLS.rms_norm_backward, (x.clone(), None, x.clone(), x[0].clone(), x[:, 0].exp(), True, True)),
        (CALLS.rms_norm_backward, (x.clone(), x.clone(), x.clone(), x[0].clone(), x[:, 0].exp(), True, False)),
        (CALLS.squared_norm, ([x.clone(), bias.half()],)),
        (CALLS.compress, (x.clone(), "fp16")),
        (CALLS.compress, (ids, "none")),
        (CALLS.decompress, (torch.zeros(22, dtype=torch.uint8), [3, 1], torch.bfloat16, "fp16")),
        (CALLS.compress_with_feedback, (x.clone(), x.clone(), "bf16", 0.5)),
        (CALLS.all_reduce_packed, (ops.compress(x, "fp16"), [2 * R, 3], torch.float32, name, R, "sum", "fp16")),
        (CALLS.reduce_scatter_packed, (ops.compress(x, "none"), 6 * R, torch.float32, name, R, rank, "sum", "none")),
    ]
