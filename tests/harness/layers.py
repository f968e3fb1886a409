"""What the layer tests share: integer-valued data, whose sums are exact, and comparisons with unsharded modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpkernels.comm.group import Group
from tpkernels.shard import part, shard_info

F64 = torch.float64


def integers(*shape: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    """Small integers held in floats: every sum of them is exact, so results can be compared with torch.equal."""
    generator = torch.Generator("cpu").manual_seed(seed)
    found = torch.randint(-4, 5, shape, generator=generator, device="cpu")
    return found.to(torch.get_default_device(), dtype)


def make_integer(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give a module integer-valued parameters."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(integers(*parameter.shape, seed=seed + i))
    return module


def mine(full: Tensor, dim: int, group: Group, unit: int = 1) -> Tensor:
    """This rank's part of a tensor that all ranks hold."""
    return part(full, dim, group.world_size, group.rank, unit)


def leaf(tensor: Tensor) -> Tensor:
    """A copy to differentiate for."""
    return tensor.detach().clone().requires_grad_()


def assert_equal(got: Tensor | None, want: Tensor | None, what: str) -> None:
    """Bit for bit, with a message."""
    assert got is not None, what
    assert want is not None, what
    assert got.dtype == want.dtype, f"{what}: {got.dtype} {want.dtype}"
    assert torch.equal(got, want), f"{what}: {got} {want}"


def assert_close(got: Tensor | None, want: Tensor | None, what: str, terms: int = 1024) -> None:
    """Within the rounding of sums of `terms` terms in the dtype of `got`, relative to the largest wanted value."""
    assert got is not None, what
    assert want is not None, what
    bound = terms * torch.finfo(got.dtype).eps * max(1.0, float(want.detach().abs().max()) if want.numel() else 0.0)
    error = (got.detach().double() - want.detach().double()).abs()
    assert got.shape == want.shape, f"{what}: {got.shape} {want.shape}"
    assert not error.numel() or float(error.max()) <= bound, f"{what}: {float(error.max())} > {bound}"


def assert_same_step(layer: nn.Module, reference: nn.Module, *, exact: bool, terms: int = 1024) -> None:
    """Compare all gradients, make one SGD step on both, and compare all parameters, each with its part of the other."""
    others = dict(reference.named_parameters())
    assert {name for name, _ in layer.named_parameters()} == set(others)
    for module in (layer, reference):
        if others:  # a norm may have no parameters
            torch.optim.SGD(module.parameters(), lr=0.5).step()
    for name, parameter in layer.named_parameters():
        info = shard_info(parameter)
        for got, full, what in (
            (parameter.grad, others[name].grad, "gradient"),
            (parameter.data, others[name].data, "value"),
        ):
            assert full is not None
            want = full if info is None else info.part(full)
            if exact:
                assert_equal(got, want.contiguous(), f"{what} of {name}")
            else:
                assert_close(got, want, f"{what} of {name}", terms)
