"""A step of all decoder layers in one call (csrc/cpu/decoder.h), past their modules.

The modules of a Llama-like decoder make about forty calls of torch a layer, which take longer than the reading of the
weights of a small model. Here the parameters that the modules hold are passed to one function, anew in every step and
without a copy, so that they may be loaded or replaced at any time. What modules may do beside that computation (hooks,
adapters, parametrizations, forwards of other classes) is looked for before each step; then the modules run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_of_torch
from torch.utils.hooks import RemovableHandle

from tpkernels._native import _C
from tpkernels.comm.group import Group
from tpkernels.layers import ColumnParallelLinear, RowParallelLinear
from tpkernels.layers.block_random import BlockRandom
from tpkernels.layers.shared_input import SharedInput
from tpkernels.plan.adapters.apply import AdapterGuard
from tpkernels.plan.outputs import BlockWatch, CacheCheck, GatheredAttentions
from tpkernels.plan.same_inputs import SameInputs

has_any_global_hook: Callable[[], bool] = module_of_torch._has_any_global_hook
# What parallelize has registered, which changes no logits in inference.
HOOKS = (AdapterGuard, BlockRandom, BlockWatch, CacheCheck, GatheredAttentions, SameInputs, SharedInput)
MOST_ROWS = 128  # of a step; with more, modules take no longer beside their products
_PLAIN = 2  # of _C.plainness
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
ATTENTIONS = ("sdpa", "eager")
ACTIVATIONS = ("SiLUActivation", "SiLU")
CLASSES = {"": "DecoderLayer", "self_attn": "Attention", "mlp": "MLP"}
NORMS = ("input_layernorm", "post_attention_layernorm")
COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")
WITH_BIAS = COLUMNS[:3]


class _OtherModel(Exception):
    """A module that does not compute what a step computes."""


class _Layer:
    """The modules of one decoder layer, verified."""

    def __init__(self, layer: nn.Module, family: str) -> None:
        self._modules: dict[str, Any] = {"": layer}
        self._children = list[tuple[dict[str, Any], str, Any, type]]()
        for name in (*CLASSES, *NORMS, *COLUMNS, *ROWS, "mlp.act_fn"):
            if name:
                parent, _, last = name.rpartition(".")
                module = self._modules[parent]._modules[last]
                self._modules[name] = module
                self._children.append((self._modules[parent]._modules, last, module, type(module)))
        for name, suffix in (*CLASSES.items(), *((name, "RMSNorm") for name in NORMS)):
            _check_class(self._modules[name], family, suffix)
        if type(self._modules["mlp.act_fn"]).__name__ not in ACTIVATIONS:
            raise _OtherModel("the activation is not SiLU")
        for module in self._modules.values():
            _check_bare(module)
        for name in (*COLUMNS, *ROWS):
            self._check_linear(name)
        self._rows = [self._modules[name] for name in ROWS]
        self.group: Group = self._rows[0].group
        if self._rows[1].group is not self.group:
            raise _OtherModel("a layer has two groups")
        attention, norms = self._modules["self_attn"], [self._modules[name] for name in NORMS]
        self._numbers = (*(float(norm.variance_epsilon) for norm in norms), float(attention.scaling))

    def _check_linear(self, name: str) -> None:
        module: Any = self._modules[name]
        kind: Any = ColumnParallelLinear if name in COLUMNS else RowParallelLinear
        fits = isinstance(module, kind) and not (module.sequence_parallel or module.transposed)
        if fits and name in COLUMNS:
            fits = not module.gather_output
        elif fits:
            fits = module.input_is_parallel and module.codec == "none"
        if not fits or (name not in WITH_BIAS and module.bias is not None):
            raise _OtherModel(f"{name} is not a sharded linear without options")

    @property
    def classes(self) -> set[Any]:
        """Those of the modules."""
        return {type(self._modules[""]), *(kind for *_, kind in self._children)}

    def is_unchanged(self) -> bool:
        """Whether the modules are those that were verified, with their group and the forwards of their classes."""
        return self._rows[0].group is self._rows[1].group is self.group and all(
            parent.get(name) is module and type(module) is kind and "forward" not in module.__dict__
            for parent, name, module, kind in self._children
        )

    def reserve(self, memory: Any) -> None:
        """Allocate the layer's keys and values where that was not done."""
        if not memory.is_initialized:
            weight, head_dim = self._modules["self_attn.k_proj"].weight, self._modules["self_attn"].head_dim
            states = weight.new_empty(1, weight.shape[0] // head_dim, 1, head_dim)
            memory.lazy_initialization(states, states)

    def parts(self, memory: Any) -> tuple[Any, ...]:
        """What `_C.decode_step` takes of a layer.

        Args:
            memory: with the layer's keys and values.
        """
        q, k, v, gate, up = (self._modules[name]._parameters for name in COLUMNS)
        o, down = (self._modules[name]._parameters["weight"] for name in ROWS)
        before, behind = (self._modules[name]._parameters["weight"] for name in NORMS)
        projections = (part for linear in (q, k, v) for part in (linear["weight"], linear.get("bias")))
        inner = (gate["weight"], up["weight"], down)
        return (before, *projections, o, behind, *inner, memory.keys, memory.values, *self._numbers)


def _check_class(module: nn.Module, family: str, suffix: str) -> None:
    kind = type(module)
    place = f"transformers.models.{family}.modeling_{family}"
    wanted = FAMILIES[family] + suffix
    if (kind.__module__, kind.__name__, kind.forward.__module__) != (place, wanted, place):
        raise _OtherModel(f"a {kind.__module__}.{kind.__name__} is in the place of a {wanted}")


def _check_forward(kind: Any) -> None:
    """Raise if something of another package was put in the place of a class's forward."""
    home = kind.__module__.partition(".")[0]
    if getattr(kind.forward, "__globals__", {}).get("__name__", "").partition(".")[0] != home:
        raise _OtherModel(f"the forward of {kind.__name__} is not that of {home}")


def _check_bare(module: nn.Module) -> None:
    """Raise unless a module has its class's forward and no hooks but those of HOOKS."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not isinstance(getattr(hook, "__self__", hook), HOOKS):
            raise _OtherModel(f"a {type(module).__name__} has a hook")
    if "forward" in module.__dict__:
        raise _OtherModel(f"a {type(module).__name__} has a forward of its own")


def _layers_of(model: Any) -> list[_Layer]:
    family = str(model.config.model_type)
    if family not in FAMILIES:
        raise _OtherModel(f"the models are those of {', '.join(FAMILIES)}, got {family}")
    if model.config._attn_implementation not in ATTENTIONS:
        raise _OtherModel(f"the attention is {model.config._attn_implementation}")
    _check_class(model, family, "ForCausalLM")
    _check_class(model.model, family, "Model")
    _check_class(model.model.norm, family, "RMSNorm")
    for module in (model, model.model, model.model.norm):
        _check_bare(module)
    layers = [_Layer(layer, family) for layer in model.model.layers[: model.config.num_hidden_layers]]
    if not layers or any(layer.group is not layers[0].group for layer in layers) or not layers[0].group.is_cpu:
        raise _OtherModel("the layers are not those of one group on the CPU")
    return layers


class Stack:
    """The decoder layers of a model of one of FAMILIES, sharded over CPU ranks.

    Args:
        model: a decoder of transformers with a head.

    Attributes:
        group: the ranks.

    Raises:
        ValueError: it is another model, or its modules do more than what a step computes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = cast(Any, model)
        try:
            self._verify()
        except (_OtherModel, AttributeError, KeyError) as error:
            raise ValueError(f"generate: no step of all layers in one call: {error}") from error

    def _verify(self) -> None:
        self._layers = _layers_of(self._model)
        model = self._model
        classes = {type(model), type(model.model), type(model.model.norm)}.union(*(x.classes for x in self._layers))
        for kind in classes:
            _check_forward(kind)
        self._forwards = {kind: kind.forward for kind in classes}
        self._hooks = RemovableHandle.next_id  # counts every hook that is registered
        self.group = self._layers[0].group

    def takes(self, ids: Tensor) -> bool:
        """Whether a step for these tokens [rows, 1] computes what the modules would, on rows of their own."""
        if ids.shape[0] > MOST_ROWS or self._model.training or _C.plainness(ids) != _PLAIN:
            return False
        if torch.is_autocast_enabled("cpu") or has_any_global_hook():
            return False
        if RemovableHandle.next_id == self._hooks and self._is_unchanged():
            return True
        try:
            self._verify()
        except (_OtherModel, AttributeError, KeyError):
            return False
        return True

    def _is_unchanged(self) -> bool:
        same_forwards = all(kind.forward is forward for kind, forward in self._forwards.items())
        return same_forwards and all(layer.is_unchanged() for layer in self._layers)

    def run(self, embedded: Tensor, slots: Tensor, positions: Tensor, cache: Any) -> Tensor | None:
        """Return the hidden states [rows, 1, D] behind the last norm, or None where a tensor does not fit.

        Args:
            embedded: [rows, 1, D], of one token each.
            slots, positions: [rows], of the tokens: several of one slot are next to each other in its sequence.
            cache: its layers have keys and values [slots, heads, max_length, head_dim]; the tokens' own are added.
        """
        decoder = self._model.model
        cos, sin = decoder.rotary_emb(embedded, positions[:, None])
        y = torch.empty_like(embedded)
        for layer, memory in zip(self._layers, cache.layers, strict=True):
            layer.reserve(memory)
        parts = [layer.parts(memory) for layer, memory in zip(self._layers, cache.layers, strict=True)]
        norm = decoder.norm
        made = _C.decode_step(
            y[:, 0],
            embedded[:, 0],
            parts,
            norm.weight,
            norm.variance_epsilon,
            cos[:, 0],
            sin[:, 0],
            slots,
            positions,
            cache.count,
            cache.max_length,
            self.group._address,
        )
        return y if made else None
