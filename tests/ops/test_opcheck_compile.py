"""Every op under opcheck, torch.compile(fullgraph=True), torch.export, meta tensors, make_fx and the profiler."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.harness.op_calls import op_calls, sizes
from tests.harness.ops import assert_within, check_forward
from tests.harness.ranks import nightly
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks
from tpkernels.testing.case import Case, Sizes
from tpkernels.testing.cases import CASES, VOCAB_CROSS_ENTROPY, VOCAB_EMBEDDING


def check_opcheck() -> None:
    with Group.open() as group:
        for op, arguments in op_calls(group):
            torch.manual_seed(0)
            torch.library.opcheck(op.default, arguments)


def registered_names() -> set[str]:
    return {
        schema.name.removeprefix("tpkernels::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("tpkernels::")
    }


def check_opcheck_covers_every_op() -> None:
    with Group.open() as group:
        checked = {op.default.name().removeprefix("tpkernels::") for op, _ in op_calls(group)}
        made_of_nothing = {"arena_empty", "device_arena_empty", "exchange_sizes"}
        assert registered_names() - checked == made_of_nothing, "those make no tensor from a tensor"


def compiled_step(case: Case, s: Sizes, group: Group) -> Callable[..., Tensor]:
    """The op between other ops, as in a model."""

    def step(*arguments: Tensor | None) -> Tensor:
        scaled = [x * 2 if x is not None and x.is_floating_point() else x for x in arguments]
        return case.call(s, scaled, group) * 3

    return step


def settings_of(case: Case, group: Group, backend: str) -> list[Sizes]:
    """Two, unless code would be generated twice for the same: to inductor, op and codec are words that it hands on."""
    plain, other = sizes(group), sizes(group, op="avg", bias=False, codec="fp16")
    absent = [[x is None for x in case.arguments(s, group.rank)] for s in (plain, other)]
    return [plain] if backend == "inductor" and absent[0] == absent[1] else [plain, other]


def check_compile(backend: str) -> None:
    with Group.open() as group:
        for case in CASES:
            for s in settings_of(case, group, backend):
                torch._dynamo.reset()
                step = compiled_step(case, s, group)
                compiled = torch.compile(step, backend=backend, fullgraph=True)
                results = []
                for fn in (step, compiled):
                    leaves = [
                        x.requires_grad_() if x is not None and x.is_floating_point() else x
                        for x in case.arguments(s, group.rank)
                    ]
                    y = fn(*leaves)
                    y.sum().backward()
                    results.append([y, *(x.grad for x in leaves if x is not None and x.requires_grad)])
                for want, got in zip(*results, strict=True):
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda m, c=case: f"{c.name}: {m}")
                with torch.no_grad():
                    torch.testing.assert_close(compiled(*case.arguments(s, group.rank)), results[0][0].detach())


def with_sizes(case: Case) -> Case:
    """The case with the sizes given that the ranks would otherwise ask each other, or take for even when compiling."""

    def options(s: Sizes) -> dict[str, Any]:
        sized = {"all_gather": {"dim_size": s.M}, "all_gather_gemm": {"dim_size": s.M}}
        vocab = {"vocab_size": s.V} if case in (VOCAB_EMBEDDING, VOCAB_CROSS_ENTROPY) else {}
        return {**case.options(s), **sized.get(case.name, vocab)}

    return replace(case, options=options)


def check_a_shared_compile_cache(folder: str) -> None:
    """Rank after rank compiles, each into the cache that the ones before have filled; the others run the plain step."""
    cache = mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder})
    with Group.open() as group, cache, torch._inductor.config.patch(fx_graph_cache=True):
        for case in CASES:
            s = sizes(group)
            step = compiled_step(with_sizes(case), s, group)
            for turn in range(group.world_size):
                torch._dynamo.reset()
                run = torch.compile(step, fullgraph=True) if group.rank == turn else step
                leaves = [
                    x.requires_grad_() if x is not None and x.is_floating_point() else x
                    for x in case.arguments(s, group.rank)
                ]
                run(*leaves).sum().backward()


def check_compile_with_dynamic_shapes() -> None:
    with Group.open() as group:
        R = group.world_size
        for case in CASES:
            torch._dynamo.reset()
            graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
            step = compiled_step(case, sizes(group), group)
            compiled = torch.compile(step, backend=graphs, fullgraph=True, dynamic=True)
            counts = []
            for M in (11, 12, 13, 14):  # no size that another dimension has, which would make them one symbol
                arguments = case.arguments(sizes(group, M=M * R), group.rank)
                torch.testing.assert_close(compiled(*arguments), step(*arguments))
                counts.append(graphs.frame_count)
            assert counts[0] == counts[-1], f"{case.name}: compiled again for another number of tokens: {counts}"


def check_compile_of_uneven_cuts() -> None:
    """With the sizes given, uneven cuts compile, too."""
    with Group.open() as group:
        R = group.world_size
        s = Sizes(R=R, M=2 * R + 1, N=R + 1, K=3 * R + 1, V=4 * R + 1)
        for case in CASES:
            known = with_sizes(case)
            torch._dynamo.reset()
            compiled = torch.compile(compiled_step(known, s, group), backend="aot_eager", fullgraph=True)
            leaves = [
                x.requires_grad_() if x is not None and x.is_floating_point() else x
                for x in known.arguments(s, group.rank)
            ]
            plain = known.call(s, [x * 2 if x is not None and x.is_floating_point() else x for x in leaves], group) * 3
            y = compiled(*leaves)
            torch.testing.assert_close(y, plain)
            y.sum().backward()
            assert all(x.grad is not None for x in leaves if x is not None and x.requires_grad)


class Module(nn.Module):
    """One op as a model, for torch.export."""

    def __init__(self, case: Case, s: Sizes, group: Group) -> None:
        super().__init__()
        self.case, self.s, self.group = case, s, group
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, *arguments: Tensor | None) -> Tensor:
        return self.case.call(self.s, list(arguments), self.group) * self.weight


def check_export() -> None:
    with Group.open() as group:
        for case in CASES:
            s = sizes(group)
            arguments = tuple(case.arguments(s, group.rank))
            module = Module(case, s, group)
            for strict in (False, True):
                program = torch.export.export(module, arguments, strict=strict)
                targets = {str(node.target) for node in program.graph.nodes}
                assert f"tpkernels.{case.name}.default" in targets, (case.name, targets)
                torch.testing.assert_close(program.module()(*arguments), module(*arguments))


def check_export_with_dynamic_tokens() -> None:
    with Group.open() as group:
        for case in CASES:
            s = sizes(group)
            arguments = tuple(case.arguments(s, group.rank))
            shapes = ([{0: torch.export.Dim.AUTO} if x is not None else None for x in arguments],)
            shapes = tuple(shapes[0])
            program = torch.export.export(Module(case, s, group), arguments, dynamic_shapes=(shapes,))
            torch.testing.assert_close(program.module()(*arguments), Module(case, s, group)(*arguments))


def check_in_place_compiles() -> None:
    with Group.open() as group:

        def step(x: Tensor) -> Tensor:
            y = x * 2
            ops.all_reduce_(y, group=group, op="sum")
            return y + 1

        for backend in ("aot_eager", "inductor"):
            torch._dynamo.reset()
            compiled = torch.compile(step, backend=backend, fullgraph=True)
            x = torch.arange(5.0)
            assert torch.equal(compiled(x), x * 2 * group.world_size + 1)
            assert torch.equal(x, torch.arange(5.0))


def check_meta_and_fake() -> None:
    with Group.open() as group:
        for case in CASES:
            s = sizes(group, M=2 * group.world_size)
            arguments = case.arguments(s, group.rank)
            y = case.call(s, arguments, group)
            known = replace(case, options=lambda s, case=case: {**case.options(s), **explicit(case, s)})
            meta = known.call(s, [None if x is None else x.to("meta") for x in arguments], group)
            assert (meta.shape, meta.dtype, meta.device.type) == (y.shape, y.dtype, "meta"), case.name
            with torch._subclasses.FakeTensorMode() as mode:
                fakes = [None if x is None else mode.from_tensor(x) for x in arguments]
                fake = known.call(s, fakes, group)
            assert (fake.shape, fake.dtype, fake.stride()) == (y.shape, y.dtype, y.stride()), case.name


def explicit(case: Case, s: Sizes) -> dict[str, int]:
    """The sizes that only the ranks know, given."""
    if case.name.startswith("all_gather"):
        return {"dim_size": s.M}
    return {"vocab_size": s.V} if case in (VOCAB_EMBEDDING, VOCAB_CROSS_ENTROPY) else {}


def check_what_stands_between_is_not_skipped() -> None:
    """The fast path skips the dispatcher only where no mode, transform or profiler observes the call."""
    with Group.open() as group:
        R = group.world_size
        x = torch.arange(4.0)
        total = R * x
        graph = make_fx(lambda t: ops.all_reduce(t, group=group))(x)
        assert "tpkernels.all_reduce" in graph.code
        with pytest.raises(NotImplementedError, match=r"torch\.func"):  # has no way into ops with Python autograd
            torch.func.grad(lambda t: ops.all_reduce(t * t, group=group).sum())(x)
        seen = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(str(func))
                return func(*args, **(kwargs or {}))

        class Overridden(torch.Tensor):
            pass

        with Watch():
            assert torch.equal(ops.all_reduce(x, group=group), total)
        assert "tpkernels.all_reduce.default" in seen
        assert type(ops.all_reduce(x.as_subclass(Overridden), group=group)) is Overridden
        assert torch.equal(ops.all_reduce(nn.Parameter(x), group=group).detach(), total)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            ops.all_reduce(x, group=group)
            ops.gemm_all_reduce(torch.ones(2, 3), torch.ones(4, 3), group=group)
        names = {event.key for event in profile.key_averages()}
        assert {"tpkernels::all_reduce", "tpkernels::gemm_all_reduce"} <= names
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones(4))
            with pytest.raises(NotImplementedError, match="forward-mode"):  # never a tangent lost in silence
                ops.all_reduce(dual, group=group)
        z = torch.complex(x, x).conj()
        assert torch.equal(ops.all_reduce(z.imag, group=group), -total)


@pytest.mark.parametrize(
    "check",
    [
        check_opcheck,
        check_opcheck_covers_every_op,
        check_compile_with_dynamic_shapes,
        check_compile_of_uneven_cuts,
        check_export,
        check_export_with_dynamic_tokens,
        check_in_place_compiles,
        check_meta_and_fake,
        check_what_stands_between_is_not_skipped,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_ops_are_good_citizens_of_torch(check: Callable[[], None]) -> None:
    run_ranks(check, 2, timeout=240.0)


# Inductor compiles every op in test_compile_order.py, too.
@pytest.mark.parametrize(
    ("backend", "R"), [("aot_eager", 3), *nightly(("eager", 3), ("aot_eager", 1), ("inductor", 2))]
)
def test_ops_compile_into_one_graph_with_the_same_result(backend: str, R: int) -> None:
    run_ranks(check_compile, R, backend, timeout=300.0)


@pytest.mark.nightly
def test_ranks_that_share_a_compile_cache_do_not_get_each_others_backward(tmp_path: Path) -> None:
    run_ranks(check_a_shared_compile_cache, 2, str(tmp_path), timeout=300.0)


def check_references() -> None:
    with Group.open() as group:
        for case in CASES:
            y = check_forward(case, sizes(group), group)
            assert_within(y, y, torch.zeros(()), case.name)


def test_the_sizes_of_these_tests_are_right_for_every_op() -> None:
    run_ranks(check_references, 2)
