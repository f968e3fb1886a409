"""Many ranks on one host: here threads of one process, which open the arenas as processes do."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tpkernels._native import _C
from tpkernels.compress import CODECS

Call = torch.ops.tpkernels


def every_rank(R: int, arena_bytes: int, body: Callable[[str, int], Tensor | str]) -> list[Tensor | str]:
    """body(group name, rank) on R ranks of one arena file, at the same time; the text of what it raised."""
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.posix_fallocate(fd, 0, R * arena_bytes)
    comms = [_C.open_shm(f"many/{R}/{r}", "many", r, R, 60.0, fd, arena_bytes, [os.getpid()] * R, 2) for r in range(R)]
    os.close(fd)
    found: list[Tensor | str] = [""] * R

    def work(r: int) -> None:
        try:
            found[r] = body(f"many/{R}/{r}", r)
        except Exception as error:
            found[r] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=work, args=(r,)) for r in range(R)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for comm in comms:
        comm.close()
    return found


def value(r: int) -> float:
    return float(r % 5 + 1)


@pytest.mark.parametrize("R", [64, 65, 130])
def test_every_op_is_right_with_more_ranks_than_sixty_four(R: int) -> None:
    total = sum(value(r) for r in range(R))

    def body(name: str, r: int) -> Tensor:
        for n in (3, 20_000):
            x = torch.full((n,), value(r))
            for codec in ("none", "fp16"):
                y = Call.all_reduce(x, name, R, "sum", codec)
                assert (y - total).abs().max() <= total * 2**-8, (n, codec)
            Call.all_reduce_(x, name, R, "max", "none")
            assert torch.equal(x, torch.full((n,), 5.0))
        inside = Call.arena_empty(name, [9000], torch.float32).fill_(value(r))
        assert torch.equal(Call.all_reduce(inside, name, R, "sum", "none"), torch.full((9000,), total))
        mine = Call.reduce_scatter(inside, name, R, r, 0, "sum", "none", "none")
        assert torch.equal(mine, torch.full_like(mine, total))
        Call.all_reduce_(inside, name, R, "sum", "none")
        assert torch.equal(inside, torch.full((9000,), total))
        part = Call.reduce_scatter(torch.full((R * 301,), value(r)), name, R, r, 0, "avg", "none", "none")
        assert torch.allclose(part, torch.full((301,), total / R))
        whole = Call.all_gather(torch.full((7,), value(r)), name, R, r, 0, 7 * R, "none", "none")
        assert torch.equal(whole, torch.tensor([value(s) for s in range(R)]).repeat_interleave(7))
        return whole

    assert [found for found in every_rank(R, 1 << 18, body) if isinstance(found, str)] == []


def test_a_slot_that_has_no_room_for_a_block_of_every_rank_is_refused_on_all_of_them() -> None:
    R = 65

    def body(name: str, r: int) -> Tensor:
        with pytest.raises(ValueError, match="open the group with a larger arena_bytes"):
            Call.reduce_scatter(torch.full((R * 600,), 1.0), name, R, r, 0, "sum", "fp16", "none")
        return Call.all_reduce(torch.ones(5), name, R, "sum", "none")  # type: ignore[no-any-return]

    for found in every_rank(R, 1 << 18, body):
        assert isinstance(found, Tensor), found
        assert torch.equal(found, torch.full((5,), float(R)))


def test_with_room_for_blocks_every_codec_works() -> None:
    R = 70

    def body(name: str, r: int) -> Tensor:
        for codec in sorted(CODECS):
            y = Call.reduce_scatter(torch.full((R * 600,), 2.0), name, R, r, 0, "sum", codec, "none")
            assert (y - 2.0 * R).abs().max() <= 2.0 * R * 2**-3, codec
        return y

    assert [found for found in every_rank(R, 1 << 20, body) if isinstance(found, str)] == []
