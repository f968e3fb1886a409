"""Which engine multiplies in the linears of a model, in one line."""

from __future__ import annotations

from collections import Counter

from torch import nn

from .linear import _ParallelLinear


def engines_line(model: nn.Module, rows: int) -> str:
    """Return a sentence on the engines of the sharded linears of a model; "" where it has none on the CPU.

    Args:
        model: with sharded linears.
        rows: tokens of a call on a rank.
    """
    counts: Counter[str] = Counter()
    profile = ""
    for layer in model.modules():
        if isinstance(layer, _ParallelLinear) and layer.group.is_cpu:
            N, K = layer.weight.shape if not layer.transposed else reversed(layer.weight.shape)
            found = layer.group.explain("replicated_gemm", M=rows, N=N, K=K, dtype=layer.weight.dtype)
            counts[found.engine] += 1
            profile = found.profile
    if not counts:
        return ""
    engines = ", ".join(f"{count} by {engine}" for engine, count in counts.most_common())
    why = f"the machine's profile {profile}" if profile else "the rule of sizes"
    return f"linears of {rows:,} rows: {engines}, chosen by {why}"
