"""A 64-bit digest of a tensor's values, computed where the tensor is."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

RUN = 1 << 16  # words of 8 bytes that are mixed at a time: they fit the caches of a core
ROWS = {"cpu": 1, "cuda": 64}  # runs that are mixed in one call, by device


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """Return 64 bits that depend on every bit of the values and on its place, as an int64 scalar on their device.

    Words of 8 bytes w are mixed with random numbers that belong to their places i, the same in every process, and
    summed; the sums of all runs of words are mixed likewise:

        t = (w ^ a_i) b_i;  t = (t ^ (t >> 32)) c_i;  digest = sum of t mod 2^64          # b_i, c_i odd

    For a random choice of a, b and c two different tensors have the same digest with probability of about 2^-64; it
    does not resist a search for a pair.
    """
    words = _words(tensor)
    while words.numel() > 1:
        words = _mix(words)
    return words.reshape(()) if words.numel() else torch.zeros((), dtype=torch.int64, device=tensor.device)


def _words(tensor: Tensor) -> Tensor:
    """The bytes of the values as int64, the last word padded with zeros."""
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    values = values.detach().resolve_neg().contiguous().reshape(-1)
    size = values.numel() * values.element_size()
    if values.storage_offset() * values.element_size() % 8:
        values = values.clone()
    data = values.view(torch.uint8)
    whole = data[: size // 8 * 8].view(torch.int64)
    if size == whole.numel() * 8:
        return whole if size != 8 else torch.cat([whole, whole.new_zeros(1)])  # one word is mixed, too
    rest = data.new_zeros(8)
    rest[: size % 8] = data[size // 8 * 8 :]
    last = rest.view(torch.int64)
    return torch.cat([whole, last, last.new_zeros(0 if whole.numel() else 1)])


def _mix(words: Tensor) -> Tensor:
    """The sums of all runs, the last one shorter."""
    rows = ROWS.get(words.device.type, 1)
    whole = words[: words.numel() // RUN * RUN]
    sums = [_mix_rows(block) for block in torch.split(whole, rows * RUN) if block.numel()]
    rest = words[whole.numel() :]
    return torch.cat([*sums, _mix_rows(rest)] if rest.numel() else sums)


def _mix_rows(words: Tensor) -> Tensor:
    a, b, c = (numbers[: words.numel()] for numbers in _numbers(words.device))
    rows = words.view(-1, a.numel())
    mixed = torch.bitwise_xor(rows, a).mul_(b)
    mixed ^= torch.bitwise_right_shift(mixed, 32)
    return mixed.mul_(c).sum(-1)


@cache
def _numbers(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The random numbers of RUN places: a, and the odd ones b and c."""
    generator = torch.Generator("cpu").manual_seed(0x7470)
    a, b, c = torch.randint(-(2**63), 2**63 - 1, (3, RUN), generator=generator, device="cpu").to(device)
    return a, b | 1, c | 1
