"""Random numbers in tensor parallel: the same on all ranks for replicated tensors, different ones for sharded tensors.

One rule holds for all: the default generators of all ranks are in the same state (`torch.manual_seed(same)` at the
start; `check_same_rng` raises when they differ), and everything random is derived from them. So there is no second
generator that a checkpoint, `torch.utils.checkpoint` or a resumed run could forget:

- replicated tensors: plain torch calls. All ranks draw the same numbers.
- sharded tensors, `ParallelDropout(shard_dim=...)`: all ranks draw the mask of the full tensor and each takes its
  shard. The run equals the unsharded one, bit for bit on the CPU, whatever R is; the mask costs a byte for every
  element of the full tensor.
- anything else that must differ over the ranks, `with rank_rng(group)`: numbers from (default generator, rank). They
  cost no more than elsewhere, and depend on R.

torch.utils.checkpoint (preserve_rng_state=True, its default) replays all three. Under torch.compile ParallelDropout
traces without a graph break, with inductor's own numbers as for nn.Dropout; `rank_rng` breaks the graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from tpkernels import ops
from tpkernels.comm.group import Group, resolve
from tpkernels.errors import RankMismatchError
from tpkernels.ops.sizes import sizes_of_ranks
from tpkernels.shard import part

from .base import ParallelModule


class ParallelDropout(ParallelModule):
    """nn.Dropout for replicated or sharded activations.

    Args:
        p: the probability with which an element becomes zero; the others are divided by 1 - p.
        group: over which the activations are sharded; None means all ranks.
        shard_dim: the sharded dimension: -1 behind a ColumnParallelLinear, the token dimension under
            sequence parallel. None: they are replicated, and so is the mask.
        unit: the number of neighbouring indices of shard_dim that make one item.

    Raises:
        ValueError: p is not within [0, 1]; in forward, x is not this rank's shard of full_size.
    """

    def __init__(
        self, p: float = 0.5, *, group: Group | None = None, shard_dim: int | None = None, unit: int = 1
    ) -> None:
        super().__init__(group)
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"ParallelDropout: p must be between 0 and 1, got {p}")
        self.p = p
        self.shard_dim = shard_dim
        self.unit = unit

    def forward(self, x: Tensor, full_size: int | None = None) -> Tensor:
        """Drop elements in training mode; otherwise return x.

        Args:
            x: replicated, or this rank's shard along shard_dim.
            full_size: the size of shard_dim on all ranks together. None: the ranks exchange theirs, and under
                torch.compile it is R times this rank's; uneven shards must have it given there.
        """
        if not self.training or self.p == 0.0:
            return x
        if self.shard_dim is None or self.group.world_size == 1 or self.p == 1.0:
            return F.dropout(x, self.p, training=True)
        mask = self._mask(x, self.shard_dim, full_size)
        # The same two roundings as in nn.Dropout: 1 / (1 - p) in the dtype of x, then the product.
        return x * mask.to(x.dtype).div_(1.0 - self.p)

    def _mask(self, x: Tensor, dim: int, full_size: int | None) -> Tensor:
        R, rank = self.group.world_size, self.group.rank
        if full_size is None:
            full_size = sum(sizes_of_ranks(x.size(dim), self.group))
        shape = list(x.shape)
        shape[dim] = full_size
        mask = torch.empty(shape, dtype=torch.bool, device=x.device)
        if mask.numel() > 0:  # nn.Dropout draws nothing for an empty tensor
            mask = mask.bernoulli_(1.0 - self.p)
        mine = part(mask, dim, R, rank, self.unit)
        if mine.shape != x.shape:
            raise ValueError(
                f"ParallelDropout: the part of rank {rank} of {R} of {full_size} along dim {dim} has shape "
                f"{list(mine.shape)}, got {list(x.shape)}"
            )
        return mine

    def extra_repr(self) -> str:
        """Return p and shard_dim."""
        return f"p={self.p}" + ("" if self.shard_dim is None else f", shard_dim={self.shard_dim}")


@contextmanager
def rank_rng(group: Group | None = None) -> Iterator[None]:
    """Give each rank random numbers of its own inside the block; after it the default generators agree again.

    Inside, torch's default generators (CPU and the current CUDA device) are seeded from a number drawn from the default
    CPU generator, the same on all ranks, and the rank. Behind it they go on as if one number had been drawn.

        with rank_rng(group):                            # each rank its own heads, so its own dropout
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)

    Args:
        group: whose rank decides the numbers; None means all ranks. Nothing is sent.
    """
    group = resolve(group)
    before = seed_for_rank(group)
    try:
        yield
    finally:
        set_rng_state(before)


def seed_for_rank(group: Group) -> dict[str, Tensor]:
    """Seed the default generators (CPU and the current CUDA device) for this rank, from a number drawn by all alike.

    Returns:
        the state to go back to by `set_rng_state`: that behind the number drawn.
    """
    seed = mix_seed(_draw(), group.rank)
    before = rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device there is
    if _cuda_is_in_use():
        torch.cuda.manual_seed(seed)
    return before


def rng_state() -> dict[str, Tensor]:
    """Return the state of all random numbers here, for a checkpoint; all ranks have the same."""
    state = {"cpu": torch.get_rng_state()}
    if _cuda_is_in_use():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Go on with the random numbers where `rng_state` was called.

    Args:
        state: what it returned; that of a CUDA device is left out where there is none.
    """
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def same_state(state: dict[str, Tensor]) -> bool:
    """Whether nothing was drawn since `rng_state` gave this."""
    now = rng_state()
    return now.keys() == state.keys() and all(torch.equal(now[device], state[device]) for device in now)


def next_state(state: dict[str, Tensor]) -> None:
    """Go on as if, since `rng_state` gave this state, one number had been drawn."""
    set_rng_state(state)
    _draw()


def _draw() -> int:
    return int(torch.randint(0, 2**62, (), device="cpu"))


def check_same_rng(group: Group | None = None) -> None:
    """Check that the default CPU generators of all ranks are in the same state. One small collective.

    Args:
        group: the ranks; None means all.

    Raises:
        RankMismatchError: they are not: another seed, or a rank that drew more often than the others.
    """
    group = resolve(group)
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).digest()
    value = int.from_bytes(digest[:7], "little")
    top = ops.all_reduce(torch.tensor([value, -value], device=group.device), group=group, op="max")
    if int(top[0]) != -int(top[1]):
        raise RankMismatchError(
            f"check_same_rng on group {group.label!r} (rank {group.rank} of {group.world_size}): the ranks' default "
            f"generators are in different states: call torch.manual_seed with the same number on all ranks, and draw "
            f"what only one rank needs inside `with rank_rng(group)`"
        )


def _cuda_is_in_use() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def mix_seed(seed: int, rank: int) -> int:
    """Return 63 bits in which neighbouring ranks have nothing in common: the finaliser of SplitMix64."""
    z = (seed + (rank + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1
