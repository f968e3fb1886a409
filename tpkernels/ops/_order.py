"""Under torch.compile: every collective is called, and in the order of the program, whatever a rank does with results.

A compiler that takes a collective for a function drops calls whose results a rank does not use, and lets calls that do
not depend on each other change places, each rank in its own way; what then meets pairs up silently. torch's ordered
effects thread a token through calls, which keeps all of them, in order, in the graphs of AOTAutograd. In torch 2.11 to
2.14 two steps do not hold to it, and are helped here:

- Inductor files an effect's dependence on the one before under the name of a buffer and looks it up under that of an
  operation, so that its scheduler (memory, fusion) moves calls all the same. The lowering below files it rightly.
- Activation checkpointing asks for calls to be made again in the backward, where the token is not known: compiling ends
  in an assertion. Results of collectives are kept instead, as the partitioner keeps those of other effects.
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

_RECOMPUTED = "recompute"  # what activation checkpointing says of a node to the partitioner
_Checkpointing = getattr(torch.utils.checkpoint, "_CachingTorchDispatchMode", None)


def communicates(*names: str) -> None:
    """Register that ops meet other ranks. An op that writes to its arguments cannot be one: see `all_reduce_`."""
    for name in names:
        qualified = f"tpkernels::{name}"
        torch.library._register_effectful_op(qualified, EffectType.ORDERED)
        torch.library.register_torch_dispatch(qualified, FunctionalTensorMode, _traced)
        if _Checkpointing is not None:
            torch.library.register_torch_dispatch(qualified, _Checkpointing, _checkpointed)


def _traced(mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """What happens when AOTAutograd traces a call."""
    # All that the code of a graph with effects depends on is in the graph, as in any other; torch, which does not say
    # so, would compile it anew in every process.
    with_effects._cacheable = True
    inductor = sys.modules.get("torch._inductor.lowering")  # imported by now where it is the backend
    if inductor is not None and op not in inductor.lowerings:
        inductor.register_lowering(op, type_promotion_kind=None)(_lowered(op, inductor))
    said = torch.fx.traceback.current_meta
    held = said.pop(_RECOMPUTED, None)
    try:
        return mode.__torch_dispatch__(op, types, args, kwargs)
    finally:
        if held is not None:
            said[_RECOMPUTED] = held


def _checkpointed(mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """What happens to a call inside selective checkpointing (all checkpointing, where torch 2.13 compiles it)."""
    policy = mode.policy_fn
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None:
        mode.policy_fn = lambda *args, **kwargs: None  # nothing is said of the node
    try:
        return mode.__torch_dispatch__(op, types, args, kwargs)
    finally:
        mode.policy_fn = policy


def _lowered(op: Any, inductor: Any) -> Callable[..., Any]:
    """Inductor's own call of an op it does not know, behind the operation that has the token."""
    call, V = inductor.fallback_handler(op, add_to_fallback_set=False), inductor.V

    def lower(*args: Any, **kwargs: Any) -> Any:
        before, known = V.graph.effectful_ops.get(EffectType.ORDERED), len(V.graph.operations)
        results = call(*args, **kwargs)
        if before is not None:
            for made in V.graph.operations[known:]:
                V.graph.additional_buffer_deps[made.get_operation_name()].add(before.get_name())
        return results

    return lower
