"""Codecs of their own for what the backward sends: bytes on the wire, values, second derivatives, compile, export."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness.layers import leaf
from tests.harness.ops import raised, run_at
from tpkernels import layers, ops
from tpkernels.comm.group import Group
from tpkernels.compress import CODECS, wire_bytes
from tpkernels.testing import run_ranks

OPS: dict[str, Callable[..., Tensor]] = {
    "reduce_scatter": ops.reduce_scatter,
    "all_gather": ops.all_gather,
    "gemm_reduce_scatter": ops.gemm_reduce_scatter,
    "all_gather_gemm": ops.all_gather_gemm,
    "replicated_gemm": ops.replicated_gemm,
}
TOKENS, N, K = 8, 16, 24


def inputs(name: str, group: Group) -> list[Tensor]:
    """Random tensors for an op: TOKENS per rank where the tokens are cut."""
    generator = torch.Generator("cpu").manual_seed(group.rank)
    cut = name in ("all_gather", "all_gather_gemm")
    tokens = TOKENS if cut else TOKENS * group.world_size
    shapes: list[tuple[int, ...]] = [(tokens, K), (N, K), (N,)] if "gemm" in name else [(tokens, K)]
    return [torch.randn(shape, generator=generator, device="cpu").to(group.device) for shape in shapes]


def sent(group: Group, call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and the bytes that this rank sent in it."""
    before = group.stats()["wire_bytes"]
    found = call()
    return found, int(group.stats()["wire_bytes"] - before)


def step(
    op: Callable[..., Tensor], arguments: Sequence[Tensor], group: Group, **options: Any
) -> tuple[Tensor, list[Tensor], int, int]:
    """The result, the gradients, and the bytes sent forward and backward."""
    leaves = [leaf(x) for x in arguments]
    y, forward = sent(group, lambda: op(*leaves, group=group, **options))
    dy = torch.randn(y.shape, generator=torch.Generator("cpu").manual_seed(7 + group.rank), device="cpu").to(y.device)
    grads, backward = sent(group, lambda: torch.autograd.grad(y, leaves, dy))
    return y.detach(), list(grads), forward, backward


def pairs(codecs: Sequence[str] = CODECS) -> Iterator[tuple[str, str]]:
    return itertools.permutations(codecs, 2)


def check_each_direction_has_its_own_codec(group: Group, codecs: Sequence[str] = CODECS) -> None:
    """Forward equals the op with `codec` for both, backward the op with `grad_codec` for both: values and bytes."""
    for name, op in OPS.items():
        arguments = inputs(name, group)
        both = {codec: step(op, arguments, group, codec=codec) for codec in codecs}
        for codec, grad_codec in pairs(codecs):
            y, grads, forward, backward = step(op, arguments, group, codec=codec, grad_codec=grad_codec)
            what = f"{name}, codec {codec}, grad_codec {grad_codec}"
            assert torch.equal(y, both[codec][0]), what
            assert forward == both[codec][2], f"{what}: {forward} bytes forward"
            assert torch.equal(grads[0], both[grad_codec][1][0]), f"{what}: gradient of x"
            # x is gathered again as it was forward; where dy is gathered it is the gradient's codec.
            like = both[codec if name == "all_gather_gemm" else grad_codec]
            for got, want in zip(grads[1:], like[1][1:], strict=True):
                assert torch.equal(got, want), f"{what}: gradients of the weights"
            again = forward if name == "all_gather_gemm" else 0
            own = both[grad_codec][3] - (both[grad_codec][2] if name == "all_gather_gemm" else 0)
            assert backward == again + own, f"{what}: {backward} bytes backward, expected {again} + {own}"
        packed = [both[codec][3] for codec in codecs if codec != "none"]
        assert min(packed) < both["none"][3], f"{name}: packing must show in the bytes at all"


def check_the_bytes_are_those_of_the_messages() -> None:
    with Group.open() as group:
        others = group.world_size - 1
        for codec, grad_codec in pairs():
            options = {"codec": codec, "grad_codec": grad_codec}
            _, _, forward, backward = step(ops.reduce_scatter, inputs("reduce_scatter", group), group, **options)
            part = TOKENS * K
            assert forward == others * wire_bytes(codec, part)
            assert backward == others * wire_bytes(grad_codec, part)


def check_second_derivatives_travel_as_the_forward_does() -> None:
    with Group.open() as group:
        x, dy = leaf(inputs("reduce_scatter", group)[0]), leaf(inputs("all_gather", group)[0])
        y = ops.reduce_scatter(x, group=group, codec="bf16", grad_codec="fp16")
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        assert torch.equal(dx, ops.all_gather(dy, group=group, codec="fp16"))
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        (ddy,) = torch.autograd.grad(dx, dy, v)
        assert torch.equal(ddy, ops.reduce_scatter(v, group=group, codec="bf16"))
        for name in ("gemm_reduce_scatter", "all_gather_gemm", "replicated_gemm"):
            found = []
            for options in ({}, {"codec": "bf16", "grad_codec": "fp16"}):
                arguments = [leaf(t) for t in inputs(name, group)]
                y = OPS[name](*arguments, group=group, **options)
                first = torch.autograd.grad(y.square().sum(), arguments[:2], create_graph=True)
                found.append(torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), arguments[:2]))
            for plain, packed in zip(*found, strict=True):
                error = float((plain - packed).norm() / plain.norm())
                assert 0 < error < 2e-2, f"{name}: {error}"  # bf16 rounds to 2^-9, several times on the way


def check_compile_and_export() -> None:
    with Group.open() as group:
        for name, op in OPS.items():
            arguments = inputs(name, group)
            size = {"dim_size": TOKENS * group.world_size} if name in ("all_gather", "all_gather_gemm") else {}
            options = {"codec": "none", "grad_codec": "fp16", **size}
            torch._dynamo.reset()

            def double(*xs: Tensor, op: Any = op, **rest: Any) -> Tensor:
                y: Tensor = op(*(x * 2 for x in xs), **rest) * 3
                return y

            want = step(double, arguments, group, **options)
            got = step(torch.compile(double, backend="aot_eager", fullgraph=True), arguments, group, **options)
            assert torch.equal(got[0], want[0])
            for a, b in zip(got[1], want[1], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            assert got[2:] == want[2:], f"{name}: bytes {got[2:]}, expected {want[2:]}"

        class Model(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return ops.reduce_scatter(x, group=group, codec="none", grad_codec="fp16")

        (x,) = inputs("reduce_scatter", group)
        exported = torch.export.export(Model(), (x,))
        assert "none, fp16)" in str(exported.graph), "both codecs are in the graph"
        assert torch.equal(exported.module()(x), Model()(x))


def check_layers_pass_both_codecs_on() -> None:
    with Group.open() as group:
        R = group.world_size
        part, whole = inputs("all_gather", group)[0], inputs("reduce_scatter", group)[0]
        ids = torch.arange(TOKENS * R) % N
        for sequence in (False, True):
            cut = {"group": group, "sequence_parallel": sequence}
            made: list[tuple[Callable[..., nn.Module], Tensor, bool]] = [
                (lambda **o: layers.ColumnParallelLinear(K, N, **o), part if sequence else whole, True),
                (lambda **o: layers.RowParallelLinear(K * R, N, **o), whole, True),
            ]
            if sequence:
                made += [
                    (lambda **o: layers.VocabParallelEmbedding(N, K, **o), ids, False),
                    (lambda **o: layers.RMSNorm(K, **o), part, False),
                    (lambda **o: layers.LayerNorm(K, **o), part, False),
                ]
            for make, x, packs_forward in made:
                counted = {}
                for codecs in (("none", "none"), ("none", "bf16"), ("bf16", "none"), ("bf16", "bf16")):
                    options = {"codec": codecs[0]} if packs_forward else {}
                    torch.manual_seed(0)
                    layer = make(grad_codec=codecs[1], **options, **cut)
                    source = leaf(x) if x.is_floating_point() else x
                    y, forward = sent(group, partial(layer, source))
                    _, backward = sent(group, y.sum().backward)
                    counted[codecs] = forward, backward
                name = f"{type(layer).__name__}, sequence_parallel={sequence}"
                silent_forward = not packs_forward or counted["none", "none"][0] == 0
                assert silent_forward or counted["bf16", "none"][0] < counted["none", "none"][0], name
                assert counted["none", "bf16"][0] == counted["none", "none"][0], name
                if counted["none", "none"][1]:
                    assert counted["none", "bf16"][1] < counted["none", "none"][1], name
                else:
                    assert (type(layer), sequence) == (layers.RowParallelLinear, False), name
        taken = layers.RowParallelLinear(K, N, group=group, input_is_parallel=False, grad_codec="bf16")
        x = leaf(torch.randn(TOKENS, K, generator=torch.Generator().manual_seed(0)))
        y = taken(x)
        _, backward = sent(group, y.sum().backward)
        own = TOKENS * (K // R + (group.rank < K % R))
        assert backward == (R - 1) * wire_bytes("bf16", own), f"{backward}"
        assert "grad_codec='bf16'" in repr(taken)


def check_unknown_codecs_are_named() -> None:
    with Group.open() as group:
        for name, op in OPS.items():
            for wants_grad in (False, True):
                arguments = [x.requires_grad_(wants_grad) for x in inputs(name, group)]
                text = raised(partial(op, *arguments, group=group, grad_codec="zip"), ValueError)
                assert text.startswith(f"{name}: grad_codec must be one of 'none', "), text
                assert text.endswith("got 'zip'"), text
            double = [x.detach().double() for x in inputs(name, group)]
            text = raised(partial(op, *double, group=group, grad_codec="fp16"), ValueError)
            assert text.startswith(f"{name}: grad_codec 'fp16' needs a dtype of float32, "), text
        norm = layers.RMSNorm(K, group=group, sequence_parallel=True, grad_codec="zip")
        if group.world_size > 1:
            text = raised(lambda: norm(torch.randn(2, K)), ValueError)
            assert text.startswith("sum_gradient: grad_codec must be one of"), text
        group.barrier()


def check_all() -> None:
    with Group.open() as group:
        check_each_direction_has_its_own_codec(group)
    check_the_bytes_are_those_of_the_messages()
    check_second_derivatives_travel_as_the_forward_does()
    check_layers_pass_both_codecs_on()
    check_unknown_codecs_are_named()


@pytest.mark.parametrize("R", [2, 3])
def test_forward_and_backward_have_codecs_of_their_own(R: int) -> None:
    run_ranks(check_all, R)


@pytest.mark.parametrize("place", ["emu", "virtual", "real"])
def test_devices_have_a_codec_for_each_direction_too(place: str) -> None:
    run_at(place, check_each_direction_has_its_own_codec, 2, ("none", "fp16", "bf16"))


def test_two_codecs_compile_and_export() -> None:
    run_ranks(check_compile_and_export, 2)
