"""The shapes of the sharded GEMMs that tests run over."""

from __future__ import annotations

from tpkernels.testing.case import Sizes

SHAPES = {  # M, N, K, batch, dim
    "even": (12, 8, 24, (), 0),
    "uneven": (7, 5, 11, (), 0),
    "batch, cut tokens": (5, 6, 8, (2,), 1),
    "batch, cut sequence": (3, 6, 9, (5, 2), 0),
    "fewer than ranks": (2, 3, 2, (), 0),
    "one": (1, 1, 1, (), 0),
    "no tokens": (0, 5, 8, (), 0),
    "no inputs": (4, 3, 0, (), 0),
    "no outputs": (4, 0, 6, (), 0),
    "large": (130, 260, 65, (), 0),
}


def sizes(R: int, shape: str) -> Sizes:
    """Sizes of that name in SHAPES."""
    M, N, K, batch, dim = SHAPES[shape]
    return Sizes(R=R, M=M, N=N, K=K, batch=batch, dim=dim)
