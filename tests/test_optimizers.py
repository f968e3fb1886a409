"""Optimizers on cut models: every step is the part of the step on the unsharded model, whatever the optimizer."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness.ops import raised
from tests.harness.ranks import nightly
from tpkernels import checkpoint, optimizers
from tpkernels.comm.group import Group
from tpkernels.errors import RankMismatchError
from tpkernels.layers import ColumnParallelLinear, RowParallelLinear
from tpkernels.shard import shard_info
from tpkernels.testing import run_ranks


class Lamb(torch.optim.Optimizer):
    """Steps as long as the parameter, along the gradient: a norm of each tensor."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * (p.norm() / p.grad.norm()), alpha=group["lr"])


class Shampoo(Lamb):
    """Preconditioners of rows and columns, kept as state; the step of the class above is called from inside."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None and p.dim() == 2):
            state = self.state[p]
            for side, product in (("left", p.grad @ p.grad.T), ("right", p.grad.T @ p.grad)):
                state[side] = state.get(side, torch.eye(len(product), dtype=p.dtype)) + product
            p.grad = torch.linalg.solve(state["left"], p.grad) @ torch.linalg.inv(state["right"])
        super().step()


class Prodigious(torch.optim.Optimizer):
    """A step that depends on the sum over all gradients."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        every = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        total = torch.stack([p.grad.square().sum() for p in every]).sum().sqrt()
        for p in every:
            p.sub_(p.grad / total, alpha=self.param_groups[0]["lr"])


class SignSGD(Lamb):
    """Value by value, but nobody knows."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])


class Sam(torch.optim.Optimizer):
    """Two steps: up, by the norm over all gradients, and back and down."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.base = torch.optim.AdamW(self.param_groups, lr=lr, eps=1e-3)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        every = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        total = torch.stack([p.grad.square().sum() for p in every]).sum().sqrt()
        for p in every:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad / total, alpha=0.5)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p in self.state):
            p.data = self.state[p]["old"]
        self.base.step()


class SamAdam(torch.optim.AdamW):
    """The same by inheritance: the step is Adam's own."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, lr=lr, eps=1e-3)
        self.old: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        every = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        total = torch.stack([p.grad.square().sum() for p in every]).sum().sqrt()
        for p in every:
            self.old[p] = p.clone()
            p.add_(p.grad / total, alpha=0.5)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p, old in self.old.items():
            p.copy_(old)
        self.step()


class AdamOfNormedGradients(torch.optim.AdamW):
    """Adam's step behind a helper that looks at all gradients."""

    def _init_group(self, group: Any, *lists: Any) -> Any:
        total = torch.stack([p.grad.square().sum() for p in group["params"] if p.grad is not None]).sum().sqrt()
        for p in (p for p in group["params"] if p.grad is not None):
            p.grad = p.grad / total
        return super()._init_group(group, *lists)  # type: ignore[misc]


class ClipsItself(torch.optim.AdamW):
    """Adam's step behind torch's own norm over all gradients."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.05)
        super().step()


class Lookahead(torch.optim.Optimizer):
    """Steps of another optimizer that looks at full tensors."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.base = Lamb(self.param_groups, lr=lr)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()


class ScheduleFree(torch.optim.Optimizer):
    """Trains one point, is evaluated at another: `eval` and `train` go between them."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def eval(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p in self.state):
            p.lerp_(self.state[p]["z"], -1.0)

    @torch.no_grad()
    def train(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p in self.state):
            p.lerp_(self.state[p]["z"], 0.5)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            z = self.state[p].setdefault("z", p.clone())
            z.sub_(p.grad, alpha=0.01)
            p.lerp_(z, 0.3)


class Fails(Lamb):
    """Changes some parameters and raises."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        raise ArithmeticError("half way")


class OwnDefaults(torch.optim.AdamW):
    """A step that is inherited as it is."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)


MATRICES_ONLY = {"Muon": lambda params: torch.optim.Muon(params, lr=0.05)}
ELEMENTWISE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    kind.__name__: kind for kind in optimizers.ELEMENTWISE if kind is not torch.optim.SparseAdam
} | {"AdamW with own defaults": OwnDefaults}
WHOLE: dict[str, Callable[[Any], torch.optim.Optimizer]] = MATRICES_ONLY | {
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.05),
    "LAMB": lambda params: Lamb(params, lr=0.05),
    "Shampoo": lambda params: Shampoo(params, lr=0.05),
    "Prodigy": lambda params: Prodigious(params, lr=0.05),
    "unknown": lambda params: SignSGD(params, lr=0.05),
}


class Block(nn.Module):
    """Uneven cuts along rows and along columns, and a replicated norm."""

    def __init__(self, group: Group | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        up, down = nn.Linear(10, 7).double(), nn.Linear(7, 10).double()
        self.norm = nn.LayerNorm(10).double()
        self.up: nn.Module = up if group is None else ColumnParallelLinear.from_linear(up, group=group)
        self.down: nn.Module = down if group is None else RowParallelLinear.from_linear(down, group=group)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return y


def data(step: int) -> Tensor:
    return torch.randn(5, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def part_of(parameter: Tensor, full: Tensor) -> Tensor:
    info = shard_info(parameter)
    return full if info is None else info.part(full)


def trained(model: nn.Module, name: str, make: Callable[[Any], torch.optim.Optimizer], steps: int = 3) -> nn.Module:
    optimizer = make([p for p in model.parameters() if p.dim() == 2 or name not in MATRICES_ONLY])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    for step in range(steps):

        def closure(step: int = step) -> Any:
            optimizer.zero_grad()
            (loss := model(data(step)).square().sum()).backward()
            return loss

        if name in ("Adafactor", "Muon") and step == 1:
            assert optimizer.step(closure) > 0
        else:
            closure()
            optimizer.step()
        scheduler.step()
    return model


def two_steps(model: nn.Module, kind: Any, zero_grad: bool) -> nn.Module:
    optimizer = kind(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        model(data(step)).square().sum().backward()
        optimizer.first_step(zero_grad=zero_grad)
        assert all((p.grad is None) == zero_grad for p in model.parameters())
        model(data(step)).square().sum().backward()
        optimizer.second_step()
    return model


def there_and_back(model: nn.Module) -> nn.Module:
    optimizer = ScheduleFree(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.train()
        optimizer.zero_grad()
        model(data(step)).square().sum().backward()
        optimizer.step()
        optimizer.eval()
    return model


def what_a_class_brings_beside_its_step_is_right() -> None:
    group = Group.open()
    runs: dict[str, Callable[[nn.Module], nn.Module]] = {
        "Sam": lambda m: two_steps(m, Sam, True),
        "Sam, gradients added up": lambda m: two_steps(m, Sam, False),
        "SamAdam": lambda m: two_steps(m, SamAdam, True),
        "a helper": lambda m: trained(m, "", lambda params: AdamOfNormedGradients(params, lr=0.05, eps=1e-1)),
        "a norm of torch": lambda m: trained(m, "", lambda params: ClipsItself(params, lr=0.05, eps=1e-1)),
        "another inside": lambda m: trained(m, "", lambda params: Lookahead(params, lr=0.05)),
        "schedule-free": there_and_back,
    }
    for name, run in runs.items():
        cut, want = run(Block(group)), dict(run(Block()).named_parameters())
        for key, parameter in cut.named_parameters():
            torch.testing.assert_close(parameter, part_of(parameter, want[key]), msg=lambda m, n=name: f"{n}: {m}")
            whole = want[key].grad
            assert parameter.grad is not None and whole is not None
            torch.testing.assert_close(parameter.grad, part_of(parameter, whole), msg=lambda m, n=name: f"{n}: {m}")
    group.close()


def every_step_is_the_part_of_the_whole_one() -> None:
    group = Group.open()
    for name, make in (ELEMENTWISE | WHOLE).items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cut = trained(Block(group), name, make)
        assert any("gathers the cut parameters" in str(w.message) for w in caught) == (name in WHOLE), name
        want = dict(trained(Block(), name, make).named_parameters())
        for key, parameter in cut.named_parameters():
            torch.testing.assert_close(parameter, part_of(parameter, want[key]), msg=lambda m, n=name: f"{n}: {m}")
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape, "gradients are parts again"
    group.close()


def trouble_changes_nothing_and_is_named() -> None:
    group = Group.open(timeout_s=20)
    model = Block(group)
    model(data(0)).square().sum().backward()
    before = copy.deepcopy(model.state_dict())
    lbfgs = torch.optim.LBFGS(model.parameters())
    assert "a closure that runs the model cannot be called" in raised(lambda: lbfgs.step(lambda: 0.0), ValueError)
    for given in (lambda: 0.0, model(data(0)).sum()):  # a loss, as LOMO takes it
        assert "ELEMENTWISE.add(Lamb)" in raised(lambda g=given: Lamb(model.parameters(), lr=0.1).step(g), ValueError)
    if group.rank == 1:
        model.up.weight.grad = None
    text = raised(Lamb(model.parameters(), lr=0.1).step, RankMismatchError)
    assert "each with a gradient on all ranks or on none" in text and "nothing has changed" in text
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    model.zero_grad()
    model(data(0)).square().sum().backward()
    assert raised(Fails(model.parameters(), lr=0.1).step, ArithmeticError) == "half way"
    assert all(p.shape == before[key].shape for key, p in model.named_parameters()), "a step that fails leaves parts"
    whole = Block()
    whole(data(0)).square().sum().backward()
    Lamb(whole.parameters(), lr=0.1).step()
    for (key, got), want in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got, part_of(got, want), msg=key)
    group.close()
    text = raised(Lamb(model.parameters(), lr=0.1).step, ValueError)
    assert "is closed" in text and "set_group" in text


def declared_elementwise_steps_on_parts() -> None:
    group = Group.open()
    optimizers.ELEMENTWISE.add(SignSGD)
    try:
        group.reset_stats()
        model = Block(group)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        SignSGD(model.parameters(), lr=0.1).step()
        assert group.stats()["calls"] == 0
    finally:
        optimizers.ELEMENTWISE.remove(SignSGD)
    group.close()


def muon_is_that_of_whole_matrices(folder: str) -> None:
    """Bit for bit for the same gradients, with its state as shards, which go through state dicts and checkpoints."""
    group = Group.open()
    cut, whole = Block(group).float(), Block().float()
    wholes = dict(whole.named_parameters())
    pairs = [(p, wholes[name]) for name, p in cut.named_parameters() if p.dim() == 2]
    muons = [torch.optim.Muon([pair[i] for pair in pairs], lr=0.05) for i in range(2)]
    for step in range(4):
        for i, (p, w) in enumerate(pairs):
            w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(10 * step + i))
            p.grad = part_of(p, w.grad).clone()
        for muon in muons:
            muon.step()
        for p, w in pairs:
            momentum, want = muons[0].state[p]["momentum_buffer"], muons[1].state[w]["momentum_buffer"]
            assert p.shape == momentum.shape and torch.equal(momentum, part_of(p, want))
            assert torch.equal(p, part_of(p, w)), f"step {step}"
        if step == 1:
            torch.save(muons[0].state_dict(), stored := io.BytesIO())
            stored.seek(0)
            muons[0] = torch.optim.Muon([p for p, _ in pairs], lr=0.01)
            muons[0].load_state_dict(torch.load(stored))
        if step == 2:
            checkpoint.save(cut, f"{folder}/muon", group=group, optimizer=muons[0])
            muons[0] = torch.optim.Muon([p for p, _ in pairs], lr=0.01)
            checkpoint.load(cut, f"{folder}/muon", group=group, optimizer=muons[0])
    group.close()


@pytest.mark.parametrize("R", [3, *nightly(2, 4)])
def test_muon_has_the_bits_of_whole_matrices(tmp_path: Path, R: int) -> None:
    run_ranks(muon_is_that_of_whole_matrices, R, str(tmp_path))


@pytest.mark.parametrize("R", [3, *nightly(2)])
def test_every_step_is_the_part_of_the_whole_one(R: int) -> None:
    run_ranks(every_step_is_the_part_of_the_whole_one, R, fresh=True)


def test_methods_beside_the_step_and_gradients_that_a_step_changes_are_those_of_the_whole_model() -> None:
    run_ranks(what_a_class_brings_beside_its_step_is_right, 2)


def test_what_a_step_on_whole_tensors_cannot_do_is_refused_before_anything_changes() -> None:
    run_ranks(trouble_changes_nothing_and_is_named, 2)


def test_a_class_that_is_said_to_be_elementwise_steps_without_a_collective() -> None:
    run_ranks(declared_elementwise_steps_on_parts, 2)
