"""Collectives under torch.compile: every call is kept, in the order of the program, whatever a rank does with results.

A compiler that treats a collective as a pure function drops calls whose results a rank does not use, and reorders calls
that do not depend on each other, on each rank in another way; the ranks' calls then pair up wrongly, without an error.
torch's ordered effects thread a token through calls, which keeps all of them, in order, in the graphs of AOTAutograd.
Two steps of torch 2.11 to 2.14 drop that order; this module adds to them:

- Inductor records an effect's dependence on the one before under the name of a buffer and reads it under that of an
  operation, so that its scheduler (memory, fusion) still moves calls. The lowering below uses that of the operation.
- Activation checkpointing repeats calls in the backward, where there is no token: compiling ends in an assertion.
  Results of collectives are saved instead, as the partitioner saves those of other effects.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.fx.traceback
import torch.utils.checkpoint
from torch._higher_order_ops.effects import with_effects
from torch._library.effects import EffectType
from torch._subclasses.functional_tensor import FunctionalTensorMode

_RECOMPUTED = "recompute"  # the key of the mark by which activation checkpointing has the partitioner repeat a node
_Checkpointing = getattr(torch.utils.checkpoint, "_CachingTorchDispatchMode", None)


def keep_in_order(op: str) -> None:
    """Register that an op, "namespace::name", has an effect: every call of it is kept, in the order of the program."""
    torch.library._register_effectful_op(op, EffectType.ORDERED)
    torch.library.register_torch_dispatch(op, FunctionalTensorMode, _traced)
    if _Checkpointing is not None:
        torch.library.register_torch_dispatch(op, _Checkpointing, _checkpointed)


def _traced(mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Runs a call that AOTAutograd traces."""
    # The code of a graph with effects depends on the graph alone, so that it may be cached; without this mark torch
    # compiles it anew in every process.
    with_effects._cacheable = True
    inductor = sys.modules.get("torch._inductor.lowering")  # imported by now where it is the backend
    if inductor is not None and op not in inductor.lowerings:
        inductor.register_lowering(op, type_promotion_kind=None)(_lowered(op, inductor))
    meta = torch.fx.traceback.current_meta
    recomputed = meta.pop(_RECOMPUTED, None)
    try:
        return mode.__torch_dispatch__(op, types, args, kwargs)
    finally:
        if recomputed is not None:
            meta[_RECOMPUTED] = recomputed


def _checkpointed(mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Runs a call inside selective checkpointing (all checkpointing, where torch 2.13 compiles it)."""
    policy = mode.policy_fn
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None:
        mode.policy_fn = lambda *args, **kwargs: None  # no mark on the node
    try:
        return mode.__torch_dispatch__(op, types, args, kwargs)
    finally:
        mode.policy_fn = policy


def _lowered(op: Any, inductor: Any) -> Callable[..., Any]:
    """Inductor's call of an op without a lowering, made to depend on the operation before it that has the token."""
    call, V = inductor.fallback_handler(op, add_to_fallback_set=False), inductor.V

    def lower(*args: Any, **kwargs: Any) -> Any:
        before, count = V.graph.effectful_ops.get(EffectType.ORDERED), len(V.graph.operations)
        results = call(*args, **kwargs)
        if before is not None:
            for made in V.graph.operations[count:]:
                V.graph.additional_buffer_deps[made.get_operation_name()].add(before.get_name())
        return results

    return lower
