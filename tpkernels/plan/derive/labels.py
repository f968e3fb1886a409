"""Labels of features, and the edges between those that must stay on one rank. Pure functions on integer tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

NONE = -1  # no feature: the same on all ranks
WHOLE = 0  # the label of what every rank needs as it is


@dataclass
class Edges:
    """Pairs of labels that must stay on one rank, each batch with the reason."""

    pairs: list[tuple[Tensor, str]] = field(default_factory=list)

    def add(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Join a[i] with b[i] for all i; equal ones and places without a feature say nothing."""
        differ = (a != b) & (a >= 0) & (b >= 0)
        if bool(differ.any()):
            both = torch.unique((a[differ] << 32) | b[differ])  # as one number, which sorts much faster than pairs
            self.pairs.append((torch.stack((both >> 32, both & 0xFFFFFFFF)), reason))

    def classes(self, count: int) -> np.ndarray:
        """Return for each of `count` labels the smallest label that it is connected with."""
        root = np.arange(count)
        if not self.pairs:
            return root
        a, b = torch.cat([pair for pair, _ in self.pairs], dim=1).numpy()
        while True:  # hook the larger root onto the smaller one, then shorten all paths; ends after O(log count) rounds
            low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
            if np.array_equal(low, high):
                return root
            np.minimum.at(root, high, low)
            while not np.array_equal(root, root[root]):
                root = root[root]

    def reason(self, root: np.ndarray, inside: np.ndarray) -> str | None:
        """Return why two of the labels `inside` (a mask over all labels) are connected: the first reason noted."""
        for pair, why in self.pairs:
            if bool((inside[pair[0].numpy()] & inside[pair[1].numpy()]).any()):
                return why
        return None


def meet(edges: Edges, a: Tensor, b: Tensor, reason: str) -> None:
    """Add edges between two tensors of labels of one shape, element by element.

    Args:
        edges: to which they are added.
        a, b: the labels.
        reason: for messages.
    """
    if a is not b:
        edges.add(a.reshape(-1), b.reshape(-1), reason)


def meet_along(edges: Edges, labels: Tensor, dim: int, reason: str) -> None:
    """Add edges between all elements along one dimension.

    Args:
        edges: to which they are added.
        labels: of a tensor.
        dim: the dimension.
        reason: for messages.
    """
    if labels.numel() and labels.size(dim) > 1:
        found = labels if not bool((labels == NONE).any()) else torch.where(labels == NONE, labels.max(), labels)
        meet(edges, found, found.narrow(dim, 0, 1).expand_as(found), reason)


def meet_all(edges: Edges, labels: Tensor, reason: str, *, also: int | None = None) -> None:
    """Add edges between all of these labels.

    Args:
        edges: to which they are added.
        labels: of any shape.
        also: one more label.
        reason: for messages.
    """
    found = torch.unique(labels)
    found = found[found >= 0]
    if len(found):
        edges.add(found, torch.full_like(found, int(found[0]) if also is None else also), reason)


def varies_along(labels: Tensor, dim: int) -> bool:
    """Whether the labels differ along a dimension."""
    return bool((labels != labels.narrow(dim, 0, 1)).any())


def broadcast(
    edges: Edges,
    tensors: Sequence[Tensor],
    given: Sequence[Tensor | None],
    even: Sequence[frozenset[int]],
    shape: torch.Size,
    reason: str,
) -> Tensor:
    """Return the labels of an elementwise result: those of the first labelled input; all others' meet them.

    An input without labels is the same on all ranks. Where it has more than one element along a dimension, along which
    the labels differ, a rank's part would not fit it: so they meet along that dimension. Not so if all that it holds
    along this dimension is the same by construction (zeros made for so many heads): `even` names such dimensions,
    counted from the back. The code that makes it for fewer heads makes the right one, or one of a wrong size.

    Args:
        edges: to which they are added.
        tensors: the inputs.
        given: their labels, None where there are none.
        even: for each input the dimensions along which it is the same by construction, negative.
        shape: of the result.
        reason: for messages.
    """
    labelled = [g.expand(shape) for g in given if g is not None]
    result = labelled[0]
    for other in labelled[1:]:
        meet(edges, result, other, reason)
    for tensor, labels, same in zip(tensors, given, even, strict=True):
        if labels is None:
            for back in range(1, tensor.dim() + 1):
                if tensor.shape[-back] > 1 and -back not in same and varies_along(result, -back):
                    meet_along(edges, result, -back, reason)
    return result
