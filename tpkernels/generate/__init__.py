"""Generation with a model that is cut over ranks: sampling, key-value caches, streams of text, the command."""

from .generator import Completion, Generator, Piece
from .sampling import Sampling

__all__ = ["Completion", "Generator", "Piece", "Sampling"]
