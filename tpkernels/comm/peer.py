"""Opening over peer memory (transport "peer"): the GPUs of one host map each other's memory, or no rank opens.

torch's symmetric memory allocates, exchanges the handles and maps. The kernels take the addresses as integers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tpkernels.comm.bootstrap import Bootstrap
from tpkernels.comm.host import Opening, RankInfo, obstacle_to_one_host

# torch's own switch: two ranks on one GPU take turns on it, which is right for tests of small sizes and nothing else.
_OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


@dataclass(frozen=True)
class PeerArenas:
    """The arenas of all ranks as this process sees them.

    Attributes:
        pointers: of every rank's arena, in rank order.
        multicast: the address at which the switch reaches all of them at once, 0 when it cannot.
        keeps: objects that own the memory and the mappings.
    """

    pointers: list[int]
    multicast: int
    keeps: tuple[Any, ...]


class _Rendezvous:
    """How often this process has exchanged symmetric memory here.

    torch (up to 2.13 at least) gives the keys of such an exchange a number that counts those of the whole process, so
    that ranks which have done another number of them wait for keys that nobody writes (pytorch issue 196082).
    """

    count = 0


_rendezvous = _Rendezvous()


def check_gpus(ranks: Sequence[RankInfo]) -> None:
    """Raise ValueError, on every rank, where two ranks of one host work on one GPU: neither peers nor NCCL can."""
    if os.environ.get(_OVERLAPPING) == "1":
        return
    users: dict[str, list[int]] = {}
    for r, info in enumerate(ranks):
        assert info.gpu is not None
        users.setdefault(info.gpu.uuid, []).append(r)
    for r, info in enumerate(ranks):
        assert info.gpu is not None
        sharing = users[info.gpu.uuid]
        if len(sharing) > 1 and r == sharing[0]:
            raise ValueError(
                f"Group.open: each rank needs a GPU of its own, and ranks {sharing} all work on {info.gpu.name}: call "
                f"torch.cuda.set_device(local_rank) first, or pass device=f'cuda:{{local_rank}}'"
            )


def obstacle_to_peers(ranks: Sequence[RankInfo], max_peers: int) -> str | None:
    """Why these ranks cannot reach each other's GPU memory, None when they can try. The same answer on every rank."""
    if len(ranks) > max_peers:
        return f"the group has {len(ranks)} ranks, and at most {max_peers} can reach each other's GPU memory"
    return obstacle_to_one_host(ranks)


def open_peer(opening: Opening, nbytes: int, device: torch.device, kernels: Any) -> tuple[Any, str]:
    """Open over peer memory; collective.

    Args:
        opening: of ranks on one host.
        nbytes: of each rank's arena.
        device: this rank's GPU.
        kernels: the compiled CUDA module.

    Returns:
        the communicator and the reason for it; or None, and why peer memory cannot be used here.

    Raises:
        OSError: an arena does not fit into the memory of a GPU; the same on every rank.
    """
    rank, ranks, wanted, problems = opening.rank, opening.ranks, opening.wanted, _Problems(opening.bootstrap)
    problems.note(_unreachable(ranks, rank))
    if (failure := problems.first()) is not None:
        return None, failure
    with problems.of(f"rank {rank} could not allocate {nbytes} bytes of symmetric memory on {device}"):
        arena = _allocate(nbytes, device)
    if (failure := problems.first()) is not None:
        if "out of memory" in failure:
            raise OSError(f"Group.open: {failure}. Pass a smaller arena_bytes, or free memory of that GPU")
        return None, failure
    counts = opening.bootstrap.gather(_rendezvous.count)
    if len(set(counts)) > 1:
        return None, (
            f"the ranks have exchanged GPU memory a different number of times ({', '.join(map(str, counts))}): torch "
            f"numbers these exchanges by process, and would wait for ever. Open groups of all ranks first"
        )
    with problems.of(f"rank {rank} could not map the GPU memory of the others"):
        _rendezvous.count += 1
        assert isinstance(opening.process_group, dist.ProcessGroup)
        arenas = _map(arena, opening.process_group)
        if wanted.multicast and not arenas.multicast:
            raise RuntimeError("the switch between the GPUs offers no multicast")
    if (failure := problems.first()) is not None:
        return None, failure
    communicator: Any = None
    multicast = arenas.multicast if wanted.multicast else 0
    with problems.of(f"rank {rank} could not open its arena"):
        arena[: kernels.limits()["signal_bytes"]].zero_()
        torch.cuda.synchronize(device)
        communicator = kernels.open_peer(
            opening.name, opening.label, rank, len(ranks), wanted.timeout_s, device.index, arenas.pointers,
            multicast, nbytes, arenas.keeps,
        )  # fmt: skip
    if (failure := problems.first()) is not None:  # behind it, every rank has zeroed its signals
        if communicator is not None:
            communicator.close()
        return None, failure
    switch = ", and the switch between them may sum" if multicast else ""
    return communicator, f"the GPUs of all ranks reach each other's memory{switch}"


class _Problems:
    """The problem of each rank in a step, shared after it, so that either all ranks go on or none does."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        self._bootstrap = bootstrap
        self._mine: str | None = None

    def note(self, problem: str | None) -> None:
        """Keep this rank's problem of a step for `first`."""
        self._mine = problem

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Note what the body raises, in one line."""
        problem: str | None = None
        try:
            yield
        except (RuntimeError, OSError, ValueError) as error:
            problem = f"{what}: {str(error).strip().splitlines()[0]}"
        self.note(problem)

    def first(self) -> str | None:
        """The problem of the first rank that had one in the last step, on every rank; all ranks call this."""
        return self._bootstrap.first_obstacle(self._mine)


def _unreachable(ranks: Sequence[RankInfo], rank: int) -> str | None:
    """Which GPU of another rank this rank's cannot reach, as far as this process sees that GPU at all."""
    mine = ranks[rank].gpu
    assert mine is not None
    here = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    for r, info in enumerate(ranks):
        assert info.gpu is not None
        index = here.get(info.gpu.uuid, mine.index)  # a GPU that this process cannot see may be within reach
        if index != mine.index and not torch.cuda.can_device_access_peer(mine.index, index):
            return f"the GPU of rank {rank} ({mine.name}) cannot access the memory of that of rank {r} (no P2P)"
    return None


def _allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    """Memory of its own, not a piece of torch's pool of symmetric memory: ranks may have used that pool differently."""
    from torch._C._distributed_c10d import _SymmetricMemory

    memory: torch.Tensor = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)
    return memory


def _map(arena: torch.Tensor, process_group: dist.ProcessGroup) -> PeerArenas:
    """Exchange and map the arenas of all ranks; every rank calls this."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    handle = symmetric_memory.rendezvous(arena, process_group.group_name)
    bases = [int(pointer) for pointer in handle.buffer_ptrs]
    offset = arena.data_ptr() - bases[process_group.rank()]  # the bases are those of the allocations
    lost = [r for r, base in enumerate(bases) if base == 0]
    if lost:
        raise RuntimeError(f"the memory of ranks {lost} is not mapped (backend {_backend(arena.device)})")
    return PeerArenas([base + offset for base in bases], int(handle.multicast_ptr or 0), (arena, handle))


def _backend(device: torch.device) -> str:
    from torch._C._distributed_c10d import _SymmetricMemory

    return str(_SymmetricMemory.get_backend(device))
