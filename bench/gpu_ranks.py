"""R ranks on one GPU for the bench: a communicator and a stream for each, in one thread."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tpkernels.comm.devices import load_cuda
from tpkernels.comm.group import Group

# Before CUDA starts: streams must not share a work queue, and no kernel may be loaded while another waits for it.
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}

_numbers = itertools.count(1)


class VirtualRanks:
    """Groups over arenas that all lie on the current GPU.

    Args:
        R: how many ranks.
        arena_bytes: of each.
        pool_bytes: what each may allocate later: while a kernel waits for a peer's, no memory may be allocated.
        peer: a single rank has an arena, too, so that it takes the kernels of several.
    """

    def __init__(self, R: int, arena_bytes: int, pool_bytes: int, peer: bool = False) -> None:
        kernels, obstacle = load_cuda()
        if kernels is None:
            raise RuntimeError(obstacle)
        self.R, device = R, torch.device("cuda", torch.cuda.current_device())
        # What is collected may free memory, which waits for the device, where one rank's kernel may wait for another's.
        gc.collect()
        gc.disable()
        arenas = [torch.zeros(arena_bytes, dtype=torch.uint8, device=device) for _ in range(R)]
        torch.cuda.synchronize()
        pointers, number = [arena.data_ptr() for arena in arenas], next(_numbers)
        self.streams: list[Any] = [torch.cuda.Stream() for _ in range(R)]
        self.groups = []
        for r, stream in enumerate(self.streams):
            with torch.cuda.stream(stream):
                held = [torch.empty(pool_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
                held += [torch.empty(1 << 19, dtype=torch.uint8, device=device) for _ in range(64)]
                del held
                small = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
                torch.addmm(small, small, small.t())  # cuBLAS has memory of its own for each stream
            name = f"bench/{number}@{r}"
            if R == 1 and not peer:
                made = kernels.open_local(name, "bench", device.index)
            else:
                made = kernels.open_peer(name, "bench", r, R, 20.0, device.index, pointers, 0, arena_bytes, arenas[r])
                made.share_device(R)
            self.groups.append(Group(made, None, 20.0, "streams of one GPU", device))

    def each(self, work: Callable[[int], Any]) -> list[Any]:
        """work(rank) on the stream of every rank, behind and in front of what the current stream does."""
        here, found = torch.cuda.current_stream(), []
        for r, stream in enumerate(self.streams):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                found.append(work(r))
        for stream in self.streams:
            here.wait_stream(stream)
        return found

    def force(self, path: str = "", blocks: int = 0, parts: int = 0) -> None:
        """The way that all ranks take, "" and 0: the rule's."""
        for group in self.groups:
            group._communicator.force(path=path, blocks=blocks, parts=parts)

    def close(self) -> None:
        """Report what went wrong on the device, and close."""
        try:
            for group in self.groups:
                group.check()
            for group in self.groups:
                group.close()
        finally:
            gc.enable()


def in_rank_order(xs: Sequence[Tensor]) -> Tensor:
    """The sum in fp32 in rank order, rounded once."""
    total = xs[0].float()
    for x in xs[1:]:
        total = total + x.float()
    return total.to(xs[0].dtype)
