"""What a parameter is a part of survives whatever puts other parameters in its place; else it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.harness.parallelize import close, ids, tiny
from tpkernels import checkpoint, layers, parallelize
from tpkernels.comm.group import Group
from tpkernels.data_parallel import clip_grad_norm_
from tpkernels.shard import shard_info
from tpkernels.testing import run_ranks

Layer = layers.ColumnParallelLinear | layers.RowParallelLinear


class Positive(nn.Module):
    """W = exp(V): every number by itself."""

    def forward(self, v: Tensor) -> Tensor:
        return v.exp()

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.abs().log()


class Scaled(nn.Module):
    """W = s V: the gradient of s is a sum over the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.ones(()))

    def forward(self, v: Tensor) -> Tensor:
        return self.s * v


class Centred(nn.Module):
    """Every row minus the mean of the rows."""

    def forward(self, v: Tensor) -> Tensor:
        return v - v.mean(0)


def pair(kind: type[Layer], group: Group) -> tuple[nn.Linear, Layer]:
    """A linear and the same, cut; both give the full output."""
    torch.manual_seed(0)
    whole = nn.Linear(6, 9).double()
    options = {"gather_output": True} if kind is layers.ColumnParallelLinear else {"input_is_parallel": False}
    return whole, kind.from_linear(whole, group=group, **options)


def compare(cut: nn.Module, whole: nn.Module, group: Group, what: str) -> None:
    """Output, gradient norm, what a checkpoint says, and the values that a rank alone reads from it."""
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(3)).double()
    outputs = [module(x) for module in (whole, cut)]
    close(outputs[1], outputs[0], what, 1e-12)
    for output in outputs:
        output.square().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 1e9)
    for found in (cut, list(cut.parameters())):
        close(clip_grad_norm_(found, 1e9, groups=group), norm, f"{what}: norm", 1e-12)
    for (name, p), (_, q) in zip(cut.named_parameters(), whole.named_parameters(), strict=True):
        info = shard_info(p)
        close(p.grad, q.grad if info is None else info.part(q.grad), f"{what}: gradient of {name}", 1e-12)


def saved(cut: nn.Module, whole: nn.Module, group: Group, folder: str) -> None:
    """A model of one rank reads what the ranks saved: nothing of it was taken for a replica."""
    checkpoint.save(cut, folder, group=group)
    entries = checkpoint.peek(folder)["tensors"]
    shapes = {name.removeprefix("model/"): entry["shape"] for name, entry in entries.items()}
    assert shapes == {name: list(p.shape) for name, p in whole.state_dict().items()}


def weight_norm_of_rows(module: nn.Module) -> None:
    parametrizations.weight_norm(module, dim=0)


def weight_norm_of_columns(module: nn.Module) -> None:
    parametrizations.weight_norm(module, dim=1)


RIGHT: list[tuple[type[Layer], Callable[[nn.Module], Any]]] = [
    (layers.ColumnParallelLinear, weight_norm_of_rows),
    (layers.RowParallelLinear, weight_norm_of_columns),
    *((kind, lambda m: parametrize.register_parametrization(m, "weight", Positive())) for kind in Layer.__args__),
    (layers.ColumnParallelLinear, lambda m: parametrize.register_parametrization(m, "bias", Positive())),
    (layers.RowParallelLinear, lambda m: parametrize.register_parametrization(m, "bias", Scaled())),  # it is whole
]
REFUSED: list[tuple[type[Layer], Callable[[nn.Module], Any]]] = [
    (layers.RowParallelLinear, weight_norm_of_rows),
    (layers.ColumnParallelLinear, weight_norm_of_columns),
    *((kind, parametrizations.spectral_norm) for kind in Layer.__args__),
    *((kind, lambda m: parametrize.register_parametrization(m, "weight", Scaled())) for kind in Layer.__args__),
    (layers.ColumnParallelLinear, lambda m: parametrize.register_parametrization(m, "weight", Centred())),
    (layers.ColumnParallelLinear, parametrizations.orthogonal),
    *((kind, lambda m: prune.l1_unstructured(m, "weight", amount=0.3)) for kind in Layer.__args__),
    *((kind, nn.utils.spectral_norm) for kind in Layer.__args__),
]


def check_parametrizations(group: Group, folder: str) -> None:
    for number, (kind, patch) in enumerate(RIGHT):
        whole, cut = pair(kind, group)
        for module in (whole, cut):
            patch(module)
        compare(cut, whole, group, f"right {number}")
        for again in (copy.deepcopy(cut), cut):
            saved(again, whole, group, f"{folder}/{number}-{again is cut}")
        cut.load_state_dict(cut.state_dict(), assign=True)
        clip_grad_norm_(cut, 1.0, groups=group)
        name = next(iter(cut.parametrizations))  # type: ignore[arg-type]
        for module in (whole, cut):
            parametrize.remove_parametrizations(module, name)
            module.zero_grad()
        compare(cut, whole, group, f"removed {number}")
    for kind, patch in REFUSED:
        whole, cut = pair(kind, group)
        before, parameters = type(cut), {id(p) for p in cut.parameters()}
        with pytest.raises(ValueError, match="is cut"):
            patch(cut)
        assert type(cut) is before and {id(p) for p in cut.parameters()} == parameters
        if patch is not parametrizations.orthogonal:  # torch has put its inverse of it in the place of the values
            compare(cut, whole, group, "refused")
    _, cut = pair(layers.ColumnParallelLinear, group)
    with pytest.raises(ValueError, match="weight is cut, and pruning, weight_norm"):
        nn.utils.weight_norm(cut)
    with pytest.raises(ValueError, match="no such parameter"):  # torch takes the weight away first
        clip_grad_norm_(cut, 1.0, groups=group)
    _, cut = pair(layers.ColumnParallelLinear, group)
    parametrize.register_parametrization(cut, "weight", Positive())
    parametrize.register_parametrization(cut, "weight", Centred())
    with pytest.raises(ValueError, match="a parametrization that needs the whole"):
        clip_grad_norm_(cut, 1.0, groups=group)


def check_replacements(group: Group) -> None:
    def assigned(cut: Any) -> None:
        cut.weight = nn.Parameter(cut.weight.detach().clone())
        cut.bias = nn.Parameter(cut.bias.detach().clone())

    def put(cut: Any) -> None:  # as accelerate does
        cut._parameters["weight"] = nn.Parameter(cut.weight.detach().clone())

    def swapped(cut: Any) -> None:
        torch.utils.swap_tensors(cut.weight, nn.Parameter(cut.weight.detach().clone()))

    def loaded(cut: Any) -> None:
        cut.load_state_dict({k: v.clone() for k, v in cut.state_dict().items()}, assign=True)

    def emptied(cut: Any) -> None:
        state = {k: v.clone() for k, v in cut.state_dict().items()}
        cut.to_empty(device="cpu").load_state_dict(state)

    def converted(cut: Any) -> None:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            cut.float().double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    def from_a_vector(cut: Any) -> None:
        vector = nn.utils.parameters_to_vector(cut.parameters())
        nn.utils.vector_to_parameters(vector, cut.parameters())

    for kind in Layer.__args__:
        for change in (assigned, put, swapped, loaded, emptied, converted, from_a_vector):
            whole, cut = pair(kind, group)
            whole.float().double()
            cut.float().double()
            change(cut)
            cut(torch.ones(2, 6).double())
            for p in (*cut.parameters(), *whole.parameters()):
                info = shard_info(p)
                p.grad = torch.ones_like(p) if info is None else info.part(torch.ones(info.full_shape(p)).double())
            norm = clip_grad_norm_(cut, 1e9, groups=group)
            close(norm, torch.nn.utils.clip_grad_norm_(whole.parameters(), 1e9), change.__name__, 1e-12)
        whole, cut = pair(kind, group)
        with pytest.raises(ValueError, match=r"weight must be this rank's .* got shape \[9, 6\]: take the part"):
            cut.weight = nn.Parameter(whole.weight.detach())
        cut._parameters["weight"] = nn.Parameter(whole.weight.detach())
        with pytest.raises(ValueError, match=r"weight .*: expected this rank's .* got shape \[9, 6\]"):
            clip_grad_norm_(cut, 1.0, groups=group)


def check_models(group: Group) -> None:
    """The same on linears of a model that was cut in place."""
    whole = tiny("llama", num_hidden_layers=1)
    cut = parallelize(copy.deepcopy(whole), group=group)
    for model in (whole, cut):
        parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
        head = model.lm_head
        head.weight = nn.Parameter(head.weight.detach() * 2)
        model(input_ids=ids(), labels=ids()).loss.backward()
    with pytest.raises(ValueError, match=r"weight is cut along dimension 1, and \['_WeightNorm'\] needs the full"):
        parametrizations.weight_norm(cut.model.layers[0].mlp.down_proj)
    close(cut(input_ids=ids()).logits, whole(input_ids=ids()).logits, "model")
    norms = [clip_grad_norm_(found, 0.1, groups=group) for found in (list(cut.parameters()), cut)]
    close(norms[0], torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1), "norm")


def check(folder: str) -> None:
    with Group.open() as group:
        check_parametrizations(group, folder)
        check_replacements(group)
        check_models(group)


@pytest.mark.parametrize("R", [2, 3])
def test_the_marks_of_shards_survive_or_their_loss_is_refused(R: int, tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    run_ranks(check, R, str(tmp_path))
