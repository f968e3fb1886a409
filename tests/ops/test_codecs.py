"""Every codec through every op: bounds, bits, bytes on the wire, and what is not finite; and how one is added."""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.harness.ops import assert_same_on_all_ranks, check_forward, check_gradient, place_for, run_at
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.compress import CODECS, wire_bytes
from tpkernels.shard import part_sizes
from tpkernels.testing import run_ranks
from tpkernels.testing.case import CODEC_FLOOR, CODEC_ROUNDING, Sizes
from tpkernels.testing.cases import ALL_REDUCE_ADD_RMS_NORM, CASES

PACKED = tuple(codec for codec in CODECS if codec != "none")
PACKABLE = (torch.float32, torch.bfloat16, torch.float16)
TRANSPORTS = ("shm", "group")
ROOT = Path(__file__).parents[2]


def every_op(group: Group, shapes: list[Sizes]) -> None:
    """One dtype for each op, codec and shape in turn."""
    turn = 0
    for case in CASES:
        for s in shapes:
            for codec in PACKED if "codec" in case.options(s) else ():
                if case is ALL_REDUCE_ADD_RMS_NORM and CODEC_ROUNDING[codec] > 2.0**-5:
                    continue  # its bound is one of first order
                chosen = replace(s, R=group.world_size, codec=codec, dtype=PACKABLE[turn % 3])
                y = check_forward(case, chosen, group)
                if case.output_cut(chosen) is None:
                    assert_same_on_all_ranks(group, f"{case.name} {chosen}", y)
                check_gradient(case, chosen, group)
                turn += 1


def check_every_op_takes_every_codec() -> None:
    for transport in TRANSPORTS:
        with Group.open(transport=transport) as group:
            for codec in PACKED:
                x, residual = torch.randn(65, 300), torch.ones(65, 300)
                _, total = ops.all_reduce_add_rms_norm(x, residual, torch.ones(300), group=group, codec=codec)
                assert torch.equal(total, ops.all_reduce(x, group=group, codec=codec) + residual), codec
            every_op(group, [Sizes(R=0, M=7, N=5, K=11), Sizes(R=0, M=40, N=301, K=65, V=1201)])


@pytest.mark.parametrize("R", [2, 3])
def test_every_op_takes_every_codec(R: int) -> None:
    run_ranks(check_every_op_takes_every_codec, R)


def reduced(group: Group, codec: str, dtype: torch.dtype, n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(group.rank)
    x = (torch.randn(n, generator=generator) * 10 ** torch.randn(n, generator=generator)).to(dtype).to(group.device)
    y = ops.all_reduce(x, group=group, codec=codec)
    part = ops.reduce_scatter(x, group=group, codec=codec)
    return [t.cpu() for t in (y, part, ops.all_gather(part, group=group, codec=codec, dim_size=n))]


def body_of_bits(group: Group) -> list[list[Tensor]]:
    return [reduced(group, codec, PACKABLE[i % 3], n) for i, codec in enumerate(PACKED) for n in (513, 3001)]


def test_emulated_devices_get_the_bits_of_the_cpu() -> None:
    emulated = place_for("emu", 3)
    want = run_at("cpu", body_of_bits, 3)
    for transport in ("peer", "group"):
        got = emulated.run(body_of_bits, 3, transport=transport)
        for rank, (here, there) in enumerate(zip(got, want, strict=True)):
            for i, (found, expected) in enumerate(zip(here, there, strict=True)):
                for a, b in zip(found, expected, strict=True):
                    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (transport, rank, PACKED[i // 2])


def chunks(n: int, R: int, block: int) -> list[int]:
    """How the values of a message are dealt to their owners: whole blocks."""
    starts = [min(n, block * sum(part_sizes(math.ceil(n / block), R)[:r])) for r in range(R + 1)]
    return [b - a for a, b in pairwise(starts)]


def expected_bytes(op: str, transport: str, codec: str, n: int, group: Group) -> int:
    """Of one rank: its contributions to the others' chunks, and its own sum or part to each of the others."""
    R, rank = group.world_size, group.rank
    opening = (R - 1) * 64 if transport == "group" else 0  # fingerprints
    if op == "all_reduce":
        most = min(4096, 16384 // max(1, R - 1)) if transport == "group" else 1024
        if wire_bytes(codec, n) <= most:  # goes along with the opening, or is summed by everybody
            return opening + (R - 1) * wire_bytes(codec, n)
        mine = wire_bytes(codec, chunks(n, R, 512 if codec != "none" else 1)[rank])
        return opening + wire_bytes(codec, n) - mine + (R - 1) * mine
    parts = [wire_bytes(codec, size) for size in part_sizes(n, R)]
    if op == "reduce_scatter":
        return opening + sum(parts) - parts[rank]
    return opening + (R - 1) * parts[rank]


def check_wire_bytes() -> None:
    for transport in TRANSPORTS:
        with Group.open(transport=transport) as group:
            for codec in CODECS:
                for n in (100, 3000, 100_003):  # of one piece each, so that the formula is simple
                    group.reset_stats()
                    x = torch.ones(n)
                    ops.all_reduce(x, group=group, codec=codec)
                    part = ops.reduce_scatter(x, group=group, codec=codec)
                    ops.all_gather(part, group=group, codec=codec, dim_size=n)
                    for op, row in group.stats()["by_op"].items():
                        want = expected_bytes(op, transport, codec, n, group)
                        assert row["wire_bytes"] == want, (transport, codec, op, n, row["wire_bytes"], want)
                    packed = ops.compress(x, codec)
                    ops.all_reduce_packed(packed, (n,), torch.float32, group=group, codec=codec)
                    row = group.stats()["by_op"]["all_reduce"]
                    assert row["wire_bytes"] == 2 * expected_bytes("all_reduce", transport, codec, n, group)


@pytest.mark.parametrize("R", [2, 3])
def test_bytes_on_the_wire_are_what_the_codec_says(R: int) -> None:
    run_ranks(check_wire_bytes, R)


def check_nothing_that_is_not_finite_is_hidden() -> None:
    for transport in TRANSPORTS:
        with Group.open(transport=transport) as group:
            last = group.rank == group.world_size - 1
            for codec in PACKED:
                for bad in (math.nan, math.inf, -math.inf):
                    for n in (100, 2000):
                        x = torch.ones(n)
                        if last:
                            x[40] = bad
                        y = ops.all_reduce(x, group=group, codec=codec)
                        assert not y[40].isfinite(), (transport, codec, bad)
                        assert n == 100 or y[1024:].isfinite().all(), (transport, codec, bad)
                for value in (333_824.0, 65_504.0, 1e-6, 1e30, 1e-30):
                    y = ops.all_reduce(torch.full((3000,), value), group=group, codec=codec, op="avg")
                    error = 2.02 * (CODEC_ROUNDING[codec] + CODEC_FLOOR[codec]) + 1e-6
                    assert ((y / value - 1).abs() <= error).all(), (transport, codec, value)


def test_nothing_that_is_not_finite_is_hidden() -> None:
    run_ranks(check_nothing_that_is_not_finite_is_hidden, 2)


TOY = """
// toy: the upper half of a float, cut off.
//
// Wire 2 bytes a value. Error: half of 2^-7 of a value, towards zero. NaN whose upper half says so stays one.
#pragma once
#include "block.h"
namespace tpk {
struct ToyCodec : BlockLayout<uint16_t, NoScale, kCodecBlockValues, 0> {
  using Factors = NoScale;
  TPK_ALWAYS_INLINE static NoScale scale_of(uint32_t) { return {}; }
  TPK_ALWAYS_INLINE static NoScale packing(NoScale) { return {}; }
  TPK_ALWAYS_INLINE static NoScale unpacking(NoScale) { return {}; }
  TPK_ALWAYS_INLINE static uint16_t pack(float value, NoScale) { return static_cast<uint16_t>(bits_of(value) >> 16); }
  TPK_ALWAYS_INLINE static float unpack(uint16_t payload, NoScale) {
    return from_bits(static_cast<uint32_t>(payload) << 16);
  }
};
}  // namespace tpk
"""

PROGRAM = """
#include <cstdio>
#include <vector>
#include "core/wire.h"
using namespace tpk;
int main() {
  const Codec toy = codec_of("toy");
  if (toy == Codec::Count) return 1;
  const size_t n = 700;
  for (DType dtype : {DType::F32, DType::BF16}) wire_of(dtype, toy, ReduceOp::Avg);
  const Wire& wire = wire_of(DType::F32, toy, ReduceOp::Sum);
  if (wire.bytes(n) != 2 * n) return 2;
  std::vector<float> a(n), b(n), back(n);
  for (size_t i = 0; i < n; ++i) a[i] = static_cast<float>(i % 100), b[i] = 0.5f;
  std::vector<char> one(wire.bytes(n)), two(wire.bytes(n)), sum(wire.bytes(n));
  wire.encode(a.data(), one.data(), n), wire.encode(b.data(), two.data(), n);
  wire.decode(one.data(), back.data(), n);
  if (back != a) return 3;
  const void* inputs[] = {one.data(), two.data()};
  void* output = sum.data();
  wire.reduce(inputs, 2, &output, 1, n);
  wire.decode(sum.data(), back.data(), n);
  for (size_t i = 0; i < n; ++i) if (back[i] != a[i] + b[i]) return 4;
  wire.reduce_to_values(inputs, 2, back.data(), n);
  for (size_t i = 0; i < n; ++i) if (back[i] != a[i] + b[i]) return 5;
  std::printf("%s goes round\\n", name_of(toy));
}
"""


def test_a_codec_is_added_by_two_files(tmp_path: Path) -> None:
    """One that says what it does to a value, and its line in the list: then it is packed, summed and known by name."""
    csrc = tmp_path / "csrc"
    core = shutil.copytree(ROOT / "csrc/core", csrc / "core")
    (core / "codec" / "toy.h").write_text(TOY)
    listed = core / "codec" / "codec.h"
    text = listed.read_text()
    one_more = text.replace('#include "int8.h"', '#include "int8.h"\n#include "toy.h"')
    last = one_more.index("Codec)", one_more.rindex('  X("')) + len("Codec)")
    one_more = one_more[:last] + ' X("toy", Toy, ToyCodec)' + one_more[last:]
    assert one_more.count("toy") == 2
    listed.write_text(one_more)
    program, out = tmp_path / "program.cpp", tmp_path / "program"
    program.write_text(PROGRAM)
    sources = [
        str(core / name) for name in ("wire.cpp", "moves.cpp", "moves_v3.cpp", "moves_v4.cpp", "choose_moves.cpp")
    ]
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-I", str(csrc)]
    subprocess.run(["g++", *flags, str(program), *sources, "-o", str(out)], check=True, timeout=120)
    assert subprocess.run([out], check=True, capture_output=True, text=True).stdout == "toy goes round\n"
