"""The average with error feedback: one stream over connections has the bits of the ops it is composed of elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tpkernels import Group, RankMismatchError, ops
from tpkernels.compress import CODECS
from tpkernels.data_parallel import feedback
from tpkernels.data_parallel.feedback import average_with_feedback
from tpkernels.testing import run_ranks

PACKED = tuple(codec for codec in CODECS if codec != "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# None, parts without values, part of a block, blocks that end beside parts, pieces on all sides of the two lags.
LENGTHS = (0, 1, 3, 513, 5_003, 131_072, 3_000_007)
STEPS = 3


def gradient(n: int, rank: int, step: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * n + 10 * step + rank)
    x = torch.randn(n, generator=generator) * 10 ** torch.randn(n, generator=generator)
    return x.clamp(-1e4, 1e4).to(dtype)


def same(got: Tensor, want: Tensor, what: object) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype), (what, got.shape, want.shape)
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), what


def calls(group: Group) -> int:
    return int(group.stats()["by_op"].get("average_with_feedback", {}).get("calls", 0))


def check_the_stream_has_the_bits_of_the_ops() -> None:
    with Group.open(transport="group") as connected, Group.open(transport="shm", arena_bytes=1 << 22) as shared:
        for i, n in enumerate(LENGTHS):
            for j, codec in enumerate(PACKED):
                dtype = FLOATS[(i + j) % 3]
                streamed, composed = torch.zeros(n), torch.zeros(n)
                for step in range(STEPS):
                    x = gradient(n, connected.rank, step, dtype)
                    if step == 1 and n > 3 and connected.rank == 0:
                        x[n // 2] = torch.nan
                    before = calls(connected)
                    mean = average_with_feedback(x, streamed, codec, connected)
                    assert calls(connected) == before + 1
                    what = (n, codec, dtype, step)
                    same(mean, average_with_feedback(x, composed, codec, shared), what)
                    same(streamed, composed, what)
                    assert mean.isnan().any() == (step == 1 and n > 3), what


@pytest.mark.parametrize("R", [2, 3, 4])
def test_the_stream_has_the_bits_of_the_ops(R: int) -> None:
    run_ranks(check_the_stream_has_the_bits_of_the_ops, R)


def check_nothing_is_lost() -> None:
    """Averages and residuals are together the sum of the true averages, but for rounding of the sums to fp32."""
    n = 20_011
    with Group.open(transport="group") as group:
        R = group.world_size
        for codec in PACKED:
            residual, means, true = torch.zeros(n), torch.zeros(n).double(), torch.zeros(n).double()
            for step in range(8):
                means += average_with_feedback(gradient(n, group.rank, step, torch.float32), residual, codec, group)
                true += sum(gradient(n, r, step, torch.float32).double() for r in range(R)) / R
            kept = ops.all_reduce(residual.double(), group=group)
            largest = float(true.abs().max())
            torch.testing.assert_close(means + kept, true, rtol=0, atol=8 * R * 2**-23 * largest)


def test_nothing_is_lost() -> None:
    run_ranks(check_nothing_is_lost, 3)


def check_ranks_that_disagree_change_nothing() -> None:
    with Group.open(transport="group") as group:
        n = 5_003 + group.rank
        residual = torch.full((n,), 0.5)
        with pytest.raises(RankMismatchError, match="average_with_feedback"):
            average_with_feedback(torch.ones(n), residual, "int8", group)
        assert bool((residual == 0.5).all())
        x, residual = torch.ones(7), torch.zeros(7)
        same(average_with_feedback(x, residual, "fp16", group), x, "the group goes on")


def test_ranks_that_disagree_change_nothing() -> None:
    run_ranks(check_ranks_that_disagree_change_nothing, 2)


def test_the_stream_is_asked_for_groups_of_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on GPUs are registered in another module, where theirs would be taken for groups that were closed."""
    with Group.open() as group:
        monkeypatch.setattr(group, "is_cpu", False)
        monkeypatch.setattr(feedback, "_stream", lambda *_: pytest.fail("asked"))
        x = torch.ones(7)
        same(average_with_feedback(x, torch.zeros(7), "fp16", group), x, "one rank")
