"""Models that somebody changed on the instance before the cut: refused where it would go wrong, else still right."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from tests.harness.parallelize import close, ids, tiny
from tpkernels import parallelize
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.testing import run_ranks

pytest.importorskip("transformers")
Patch = Callable[[nn.Module, nn.Module], Any]  # (model, its down_proj or up_proj) -> anything


def own_forward(model: Any, linear: Any) -> None:
    linear.forward = types.MethodType(lambda self, x: F.linear(x, self.weight, self.bias), linear)


def accelerate_hook(model: Any, linear: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu"))


def offloaded(model: Any, linear: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device="cpu")


def dispatched(model: Any, linear: Any) -> None:
    from accelerate import dispatch_model

    dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


def replaced(make: Callable[[int, int], nn.Module]) -> Patch:
    def patch(model: Any, linear: Any) -> None:
        mlp = model.model.layers[0].mlp
        name = next(n for n, child in mlp.named_children() if child is linear)
        setattr(mlp, name, make(linear.in_features, linear.out_features))

    return patch


class OwnLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class TensorOfItsOwn(torch.Tensor):
    """As libraries of quantisation make them: it says that it is of a floating dtype."""


def packed(model: Any, linear: Any) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(TensorOfItsOwn))


def observe(module: nn.Module, *args: Any) -> None:
    """A hook."""


REFUSED: dict[str, tuple[Patch, str]] = {
    "own forward": (own_forward, r"(up|down)_proj \(Linear\) has a forward that was set on the instance"),
    "compiled forward": (
        lambda m, linear: setattr(linear, "forward", torch.compile(linear.forward)),
        "set on the instance",
    ),
    "accelerate": (accelerate_hook, r"hook of accelerate .*remove_hook_from_submodules\(model\) first"),
    "offload": (offloaded, r"the model has a hook of accelerate .*remove_hook_from_submodules\(model\) first"),
    "dispatch": (dispatched, r"the model has a hook of accelerate .*remove_hook_from_submodules\(model\) first"),
    "pruned": (
        lambda m, linear: prune.l1_unstructured(linear, "weight", amount=0.3),
        r"\['weight'\] of .*weight_orig.*prune",
    ),
    "old weight norm": (
        lambda m, linear: nn.utils.weight_norm(linear),
        r"\['weight'\] of .*weight_g.*remove_weight_norm",
    ),
    "old spectral norm": (
        lambda m, linear: nn.utils.spectral_norm(linear),
        r"\['weight'\] of .*weight_orig.*spectral_norm",
    ),
    "weight norm": (lambda m, linear: parametrizations.weight_norm(linear), r"a parametrization of \['weight'\]"),
    "spectral norm": (lambda m, linear: parametrizations.spectral_norm(linear), r"a parametrization of \['weight'\]"),
    "compiled": (replaced(lambda K, N: torch.compile(nn.Linear(K, N))), "is compiled"),  # type: ignore[arg-type]
    "scripted": (replaced(lambda K, N: torch.jit.script(nn.Linear(K, N).double())), "is scripted"),
    "lazy": (replaced(lambda K, N: nn.LazyLinear(N)), "has no size yet: run the model once"),
    "subclass": (replaced(lambda K, N: OwnLinear(K, N).double()), "a OwnLinear with a forward of its own"),
    "packed": (packed, "must hold a plain tensor, got TensorOfItsOwn"),
    "backward hook": (
        lambda m, linear: linear.register_full_backward_hook(observe),
        "1 hooks .* register them after the cut",
    ),
}
REFUSED_COLUMN: dict[str, tuple[Patch, str]] = {
    "hook": (lambda m, linear: linear.register_forward_hook(observe), r"up_proj has 1 hooks \(observe"),
}
REFUSED_ROW: dict[str, tuple[Patch, str]] = {
    "hook": (lambda m, linear: linear.register_forward_pre_hook(observe), r"down_proj has 1 hooks \(observe"),
}


def of_refused(group: Group, linear: str, cases: dict[str, tuple[Patch, str]]) -> None:
    for name, (patch, text) in cases.items():
        model: Any = tiny("llama", num_hidden_layers=1)
        patch(model, model.get_submodule(f"model.layers.0.mlp.{linear}"))
        classes = [type(m) for m in model.modules()]
        with pytest.raises(PlanError, match=text):
            parallelize(model, group=group)
        assert not hasattr(model, "tpk_plan") and [type(m) for m in model.modules()] == classes, name


def around_the_class(model: Any, linear: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 2, mlp)


def past_the_children(model: Any, linear: Any) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act_fn(F.linear(x, self.gate_proj.weight)) * F.linear(x, self.up_proj.weight)
        return F.linear(hidden, self.down_proj.weight)

    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(forward, mlp)


def hooked_and_unhooked(model: Any, linear: Any) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    dispatched(model, linear)
    remove_hook_from_submodules(model)
    assert "forward" in vars(linear)  # accelerate leaves the class's own there, bound


RIGHT: dict[str, Patch] = {
    "hooks taken away": hooked_and_unhooked,
    "a patched module around": around_the_class,
    "a fused module around": past_the_children,
    "a hook before a column layer": lambda m, linear: m.model.layers[0].mlp.up_proj.register_forward_pre_hook(observe),
    "a hook behind a row layer": lambda m, linear: m.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, output: output * 2
    ),
    "inputs that require gradients": lambda m, linear: m.enable_input_require_grads(),
    "a patched norm": lambda m, linear: setattr(
        m.model.norm, "forward", types.MethodType(lambda self, x: x * self.weight, m.model.norm)
    ),
}


def of_right(group: Group) -> None:
    for name, patch in RIGHT.items():
        whole, cut = tiny("llama", num_hidden_layers=1), tiny("llama", num_hidden_layers=1)
        for model in (whole, cut):
            patch(model, model.get_submodule("model.layers.0.mlp.up_proj"))
        parallelize(cut, group=group)
        close(cut(input_ids=ids()).logits, whole(input_ids=ids()).logits, name)
        assert all("forward" not in vars(m) or "Linear" not in type(m).__name__ for m in cut.modules()), name


def of_derived(group: Group) -> None:
    """Without a rule for it, a linear that is not what it seems stays whole, and the model is right."""
    import transformers as hf

    sizes = {"vocab_size": 61, "hidden_size": 24, "num_attention_heads": 6, "intermediate_size": 37}
    for patch in (REFUSED["pruned"], REFUSED["weight norm"], REFUSED["old spectral norm"]):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            model = hf.BertForMaskedLM(hf.BertConfig(**sizes, num_hidden_layers=1)).double().eval()
            patch[0](model, model.bert.encoder.layer[0].intermediate.dense)
            models.append(model)
        whole, cut = models[0], parallelize(models[1], group=group)
        assert "bert.encoder.layer.0.output.dense" in cut.tpk_plan.whole
        close(cut(input_ids=ids(vocab=61)).logits, whole(input_ids=ids(vocab=61)).logits, "derived")


def check() -> None:
    with Group.open() as group:
        for linear, more in (("up_proj", REFUSED_COLUMN), ("down_proj", REFUSED_ROW)):
            of_refused(group, linear, REFUSED | more)
        of_right(group)
        of_derived(group)


def test_what_was_changed_on_an_instance_is_refused_or_right() -> None:
    pytest.importorskip("accelerate")
    run_ranks(check, 2)
