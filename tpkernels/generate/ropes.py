"""Rotary embeddings that scale by the length of a sequence, for batches whose sequences have different lengths.

transformers takes the longest sequence of a call for all (`dynamic_rope_update`): the frequencies of rope types
"longrope" (Phi-3, Phi-4) and "dynamic" change once a sequence is longer than those of training, and would change for
the sequences beside it, too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Ropes:
    """Those rotary embeddings of a model.

    Args:
        model: a decoder of transformers.

    Attributes:
        scale_by_length: whether there are any.
        switch: with "longrope", up to so many tokens the frequencies are the short ones, and from then on all tokens
            need the long ones, those in a cache, too; None: a cache stays as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if _scales_by_length(module)]
        self.scale_by_length = bool(self._modules)
        long = [module for module in self._modules if "longrope" in _kinds(module).values()]
        self.switch = min(map(_trained_length, long), default=None)

    @contextlib.contextmanager
    def by_row(self) -> Iterator[None]:
        """Inside, each row of the positions has the frequencies that it would have alone."""
        for module in self._modules:
            vars(module)["forward"] = functools.partial(_by_row, module)
        try:
            yield
        finally:
            for module in self._modules:
                del vars(module)["forward"]


def _kinds(module: Any) -> dict[str, str]:
    """The rope type for each prefix of the module's attributes: one, or one for each type of layer."""
    kinds = getattr(module, "rope_type", None)
    return {f"{layer}_": kind for layer, kind in kinds.items()} if isinstance(kinds, dict) else {"": str(kinds)}


def _scales_by_length(module: nn.Module) -> bool:
    return any(kind == "longrope" or "dynamic" in kind for kind in _kinds(module).values())


def _by_row(module: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The embeddings [..., rows, tokens, size] of position_ids [..., rows, tokens].

    Rows that need the same frequencies, as all do that are short, are computed together.
    """
    lengths = position_ids.amax(-1).reshape(-1, position_ids.shape[-2]).amax(0) + 1
    short = _trained_length(module)
    rows_of = dict[int, list[int]]()
    for row, length in enumerate(lengths.tolist()):
        rows_of.setdefault(max(length, short), []).append(row)
    found = []
    for rows in rows_of.values():
        _forget_longest(module)
        found.append(type(module).forward(module, x[:1], position_ids[..., rows, :], *args, **kwargs))
    order = torch.tensor([row for rows in rows_of.values() for row in rows]).argsort()
    if isinstance(found[0], Tensor):
        return torch.cat(found, dim=-3).index_select(-3, order)
    return tuple(torch.cat(parts, dim=-3).index_select(-3, order) for parts in zip(*found, strict=True))


def _trained_length(module: Any) -> int:
    """Up to so many tokens the frequencies are those of training."""
    given = getattr(module.config, "rope_parameters", None) or {}
    several = [given, *(one for one in given.values() if isinstance(one, dict))]
    lengths = [one.get("original_max_position_embeddings") for one in several]
    return min(int(length) for length in (module.original_max_seq_len, *lengths) if length)


def _forget_longest(module: Any) -> None:
    """Undo what a longer sequence has left: "dynamic" keeps the frequencies of the longest."""
    for prefix, kind in _kinds(module).items():
        if "dynamic" in kind:
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
