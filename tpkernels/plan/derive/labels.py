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
        """Join a[i] with b[i] for all i (of one shape); equal ones and places without a feature say nothing."""
        a, b = (x.reshape(-1) for x in core(a, b))
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
        edges.add(a, b, reason)


def meet_along(edges: Edges, labels: Tensor, dim: int, reason: str) -> None:
    """Add edges between all elements along one dimension.

    Args:
        edges: to which they are added.
        labels: of a tensor.
        dim: the dimension.
        reason: for messages.
    """
    if varies_along(labels, dim):
        (labels,) = core(labels)
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
    found = torch.unique(core(labels)[0])
    found = found[found >= 0]
    if len(found):
        edges.add(found, torch.full_like(found, int(found[0]) if also is None else also), reason)


def varies_along(labels: Tensor, dim: int) -> bool:
    """Whether the labels differ along a dimension."""
    if not labels.numel() or labels.size(dim) < 2 or labels.stride(dim) == 0:
        return False
    (labels,) = core(labels)
    return bool((labels != labels.narrow(dim, 0, 1)).any())


def core(*labels: Tensor) -> list[Tensor]:
    """Return the labels without the repetitions of dimensions along which none of them varies.

    Args:
        labels: tensors of one shape. Scores of attention, for example, have one label for each head, repeated for all
            pairs of tokens by strides of 0.
    """
    if not labels[0].numel():
        return list(labels)
    found = list(labels)
    for dim in range(labels[0].dim()):
        if labels[0].size(dim) > 1 and all(x.stride(dim) == 0 for x in labels):
            found = [x.narrow(dim, 0, 1) for x in found]
    return found


def compact(labels: Tensor) -> Tensor:
    """Return equal labels that repeat by strides of 0 what does not vary along a dimension."""
    found = labels
    for dim in range(labels.dim()):
        if found.size(dim) > 1 and (found.stride(dim) == 0 or not varies_along(found, dim)):
            found = found.narrow(dim, 0, 1)
    return found.clone().expand(labels.shape) if found.numel() < labels.numel() else labels


def reshaped(labels: Tensor, shape: torch.Size) -> Tensor:
    """Return `labels.reshape(shape)`; repetitions along first and last dimensions that stay are not written out."""
    if not labels.numel():
        return labels.reshape(shape)
    first, last = 0, 0
    least = min(labels.dim(), len(shape))
    while first < least and labels.shape[first] == shape[first]:
        first += 1
    while last < least - first and labels.shape[-1 - last] == shape[-1 - last]:
        last += 1
    found = labels
    for dim in [*range(first), *range(labels.dim() - last, labels.dim())]:
        if labels.stride(dim) == 0:
            found = found.narrow(dim, 0, 1)
    middle = shape[first : len(shape) - last]
    found = found.reshape(*found.shape[:first], *middle, *found.shape[found.dim() - last :])
    return found.expand(shape)


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


def all_of(label: int, shape: torch.Size) -> Tensor:
    """Return labels that are all the same."""
    return torch.full((), label, device="cpu").expand(shape)


def flat(labels: Sequence[Tensor | None]) -> Tensor:
    """Return every label of the tensors that have any, in one dimension."""
    return torch.cat([core(x)[0].reshape(-1) for x in labels if x is not None])


def joined(labels: Sequence[Tensor], dim: int, *, new: bool) -> Tensor:
    """Return `torch.cat(labels, dim)`, or with `new` `torch.stack`; repetitions along other dimensions stay such."""
    if new:
        labels = [x.unsqueeze(dim) for x in labels]
    dims = labels[0].dim()
    if any(x.dim() != dims for x in labels):  # cat also takes the empty tensor of one dimension, as of a new cache
        return torch.cat(tuple(labels), dim)
    repeats = [-1] * dims
    for other in set(range(dims)) - {dim % dims}:
        if labels[0].size(other) > 1 and all(x.stride(other) == 0 for x in labels):
            repeats[other] = labels[0].size(other)
            labels = [x.narrow(other, 0, 1) for x in labels]
    return torch.cat(tuple(labels), dim).expand(repeats)
