"""torch.compile for the decode step, where a product has one row and all that counts is how fast weights are read.

BLAS does not read them as fast as one core can. Written as a sum of products, inductor makes a loop of it that reads at
the speed of memory: a token of SmolLM2 in fp32 takes half the time (bench/results/generate.jsonl). So products of up
to MOST_ROWS rows are rewritten before inductor compiles them: those of torch and those inside the ops of this package,
in every module.
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
Call = torch.ops.tpkernels


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


def _replicated(x: Tensor, w: Tensor, bias: Tensor | None, *call: Any) -> Tensor:
    return sum_of_products(x, w, bias)


def _all_reduced(x: Tensor, w: Tensor, bias: Tensor | None, group: str, world_size: int, codec: str) -> Tensor:
    y: Tensor = Call.all_reduce(sum_of_products(x, w), group, world_size, "sum", codec)
    return y if bias is None else y + bias


_REWRITTEN: dict[Any, Callable[..., Tensor]] = {
    torch.nn.functional.linear: sum_of_products,
    Call.replicated_gemm: _replicated,
    Call.replicated_gemm.default: _replicated,
    Call.gemm_all_reduce: _all_reduced,
    Call.gemm_all_reduce.default: _all_reduced,
}


def _backend(graph: GraphModule, inputs: list[Any], **options: Any) -> Any:
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in _REWRITTEN and _rows(node) <= MOST_ROWS:
            node.target = _REWRITTEN[node.target]
    graph.recompile()
    return compile_fx(graph, inputs, **options)


def _rows(node: Node) -> int:
    x = node.args[0]
    assert isinstance(x, Node)
    shape = x.meta["example_value"].shape
    return int(shape[:-1].numel())
