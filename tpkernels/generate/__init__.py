"""Generation with a model that is cut over ranks: sampling, key-value caches, streams of text, the command."""

from .continuation import Completion, Piece
from .generator import Generator
from .sampling import Sampling

__all__ = ["Completion", "Generator", "Piece", "Sampling"]
