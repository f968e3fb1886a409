"""torch.compile for the decode step, where a product has one row and all that counts is how fast weights are read.

BLAS does not read them as fast as one core can. The ops of this package do (csrc/cpu/loops/gemv.h), and are called as
they are; torch's own linears of up to MOST_ROWS rows are rewritten, before inductor compiles them, as a sum of
products, of which it makes a loop that reads at the speed of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule, Node

MOST_ROWS = 4  # more rows are for a real GEMM
MOST_SHAPES = 64  # of a step in one process


def compiled(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a step of fixed shapes, with its products rewritten; other shapes compile anew, up to MOST_SHAPES."""
    made: Callable[..., Tensor] = torch.compile(step, backend=_backend, dynamic=False, fullgraph=True)

    def call(*args: Any, **options: Any) -> Tensor:
        # torch counts shapes by the code of the step, whichever decoder it belongs to, and gives up at the ninth.
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
            return made(*args, **options)

    return call


def sum_of_products(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[..., K] @ w[N, K].T + bias[N], sums in fp32 at least, rounded once."""
    rows = x.reshape(-1, x.shape[-1])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.stack([(row.to(wide) * w.to(wide)).sum(-1) for row in rows])
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype).reshape(*x.shape[:-1], w.shape[0])


def _backend(graph: GraphModule, inputs: list[Any], **options: Any) -> Any:
    for node in graph.graph.nodes:
        is_linear = node.op == "call_function" and node.target is torch.nn.functional.linear
        if is_linear and _rows(node) <= MOST_ROWS:
            node.target = sum_of_products
    graph.recompile()
    return compile_fx(graph, inputs, **options)


def _rows(node: Node) -> int:
    x = node.args[0]
    assert isinstance(x, Node)
    shape = x.meta["example_value"].shape
    return int(shape[:-1].numel())
