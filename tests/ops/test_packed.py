"""Sums of inputs that are packed already: the bits of the call that packs, whoever brings what; feedback closes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness.ops import raised, run_at
from tpkernels import RankMismatchError, ops
from tpkernels.comm.group import Group
from tpkernels.compress import CODECS, wire_bytes
from tpkernels.shard import part_sizes
from tpkernels.testing import run_ranks

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PACKED = tuple(codec for codec in CODECS if codec != "none")
SMALL_ARENA = 1 << 18  # slots of 32 KiB, so that a message of some thousand values travels in many pieces


def values(n: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of many magnitudes, in neighbouring blocks and between the ranks."""
    generator = torch.Generator().manual_seed(1000 * n + rank)
    return (torch.randn(n, generator=generator) * 10 ** torch.randn(n, generator=generator)).to(dtype)


def same(got: Tensor, want: Tensor, what: object) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype), (what, got.shape, want.shape)
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), what


def body(group: Group, lengths: tuple[int, ...]) -> None:
    """Both ops against the ones that pack, one dtype for each codec and length in turn."""
    R, rank = group.world_size, group.rank
    for i, n in enumerate(lengths):
        for j, codec in enumerate(CODECS):
            dtype = FLOATS[(i + j) % 3]
            x = values(n, rank, dtype).to(group.device)
            wire, parts = ops.compress(x, codec), ops.compress_parts(x, codec, group=group)
            for op in ("sum", "avg"):
                what = (n, codec, dtype, op)
                whole = ops.all_reduce_packed(wire, (n,), dtype, group=group, op=op, codec=codec)
                part = ops.reduce_scatter_packed(parts, n, dtype, group=group, op=op, codec=codec)
                if R == 1:
                    same(whole, ops.decompress(wire, (n,), dtype, codec), what)
                    same(part, whole, what)
                    continue
                same(whole, ops.all_reduce(x, group=group, op=op, codec=codec), what)
                same(part, ops.reduce_scatter(x, group=group, op=op, codec=codec), what)


def check_the_bits_of_the_packing_call(arena_bytes: int | None, lengths: tuple[int, ...]) -> None:
    for transport in ("shm", "group"):
        with Group.open(transport=transport, arena_bytes=arena_bytes if transport == "shm" else None) as group:
            body(group, lengths)


@pytest.mark.parametrize("R", [1, 2, 3, 4])
def test_a_packed_input_gives_the_bits_of_the_packing_call(R: int) -> None:
    run_ranks(check_the_bits_of_the_packing_call, R, SMALL_ARENA, (0, 1, 31, 513, 5_003, 100_001))


@pytest.mark.parametrize("opening", [{"transport": "peer"}, {"transport": "group"}, {}], ids=["peer", "group", "local"])
def test_on_emulated_devices_too(opening: dict[str, Any]) -> None:
    arena_bytes = 1 << 19 if opening.get("transport") == "peer" else None
    run_at("emu", body, 3 if opening else 1, (0, 1, 513, 5_003), arena_bytes=arena_bytes, **opening)


def check_feedback_closes() -> None:
    """What was sent and what was kept are what was put in, and what arrived is the sum of what was sent."""
    for transport in ("shm", "group"):
        with Group.open(transport=transport, arena_bytes=SMALL_ARENA if transport == "shm" else None) as group:
            R, rank = group.world_size, group.rank
            for codec in PACKED:
                for n in (513, 20_011):
                    sizes = part_sizes(n, R)
                    residuals = [torch.zeros(n) for _ in range(R)]
                    for step in range(3):
                        gradients = [values(n, 10 * step + r) for r in range(R)]
                        put_in = [torch.tensor(1 / R) * g + kept for g, kept in zip(gradients, residuals, strict=True)]
                        wires = [
                            ops.compress_parts(g, codec, group=group, residual=kept, scale=1 / R)
                            for g, kept in zip(gradients, residuals, strict=True)
                        ]
                        sent = [unpacked(wire, sizes, codec) for wire in wires]
                        for one, kept, want in zip(sent, residuals, put_in, strict=True):
                            assert torch.equal(one + kept, want), (codec, n, step)
                        exact = sent[0].clone()
                        for one in sent[1:]:
                            exact += one
                        arrived = ops.reduce_scatter_packed(wires[rank], n, torch.float32, group=group, codec=codec)
                        assert torch.equal(arrived, torch.split(exact, sizes)[rank]), (codec, n, step)
                        # The same through all_reduce_packed, whose owner packs the sum again.
                        again = ops.compress_with_feedback(gradients[rank], torch.zeros(n), codec, 1 / R)
                        mean = ops.all_reduce_packed(again, (n,), torch.float32, group=group, codec=codec)
                        scaled = gradients[rank] * torch.tensor(1 / R)
                        assert torch.equal(mean, ops.all_reduce(scaled, group=group, codec=codec))


def unpacked(wire: Tensor, sizes: list[int], codec: str) -> Tensor:
    parts = torch.split(wire, [wire_bytes(codec, size) for size in sizes])
    return torch.cat([ops.decompress(p, (s,), torch.float32, codec) for p, s in zip(parts, sizes, strict=True)])


def check_ranks_may_mix_but_not_disagree() -> None:
    for transport in ("shm", "group"):
        with Group.open(transport=transport) as group:
            R, rank = group.world_size, group.rank
            for n in (100, 3000):
                x = values(n, rank)
                want = ops.all_reduce(x, group=group, codec="fp16")
                wire = ops.compress(x, "fp16")
                if rank == 0:
                    got = ops.all_reduce_packed(wire, (n,), torch.float32, group=group, codec="fp16")
                else:
                    got = ops.all_reduce(x, group=group, codec="fp16")
                assert torch.equal(got, want), "a wire meets values"
                crooked = torch.cat([wire.new_zeros(1), wire])[1:]
                same(ops.all_reduce_packed(crooked, (n,), torch.float32, group=group, codec="fp16"), want, n)
                bf16 = ops.compress(x, "bf16")
                codec, mine = ("bf16", bf16) if rank == R - 1 else ("fp16", wire)

                def call(codec: str = codec, mine: Tensor = mine, n: int = n) -> Tensor:
                    return ops.all_reduce_packed(mine, (n,), torch.float32, group=group, codec=codec)

                text = raised(call, RankMismatchError)
                assert "codec fp16" in text and "codec bf16" in text, text
            by_op = group.stats()["by_op"]
            assert "all_reduce" in by_op and not any("packed" in name for name in by_op)


@pytest.mark.parametrize("check", [check_feedback_closes, check_ranks_may_mix_but_not_disagree])
def test_packed_on_three_ranks(check: Any) -> None:
    run_ranks(check, 3)


def test_packed_compiles_into_one_graph() -> None:
    run_ranks(check_compile, 2)


def check_compile() -> None:
    with Group.open() as group:

        def step(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            wire = ops.compress_with_feedback(x * 2, residual, "fp16", 0.5)
            whole = ops.all_reduce_packed(wire, x.shape, torch.float32, group=group, codec="fp16")
            parts = ops.compress_parts(x, "bf16", group=group)
            return whole + 1, ops.reduce_scatter_packed(parts, x.numel(), torch.float32, group=group, codec="bf16")

        torch._dynamo.reset()
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        for n in (700, 1300):
            x, kept, again = values(n, group.rank), torch.ones(n), torch.ones(n)
            for got, want in zip(compiled(x, kept), step(x, again), strict=True):
                assert torch.equal(got, want)
            assert torch.equal(kept, again)
