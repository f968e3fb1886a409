"""Training data: many files read as one long sequence of bytes, window by window, never all at once.

The windows of a step are a pure function of the files, the seed and the step: every rank computes them for itself, and
a resumed run has those of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from tpkernels.errors import UserError

VALIDATION_SHARE = 0.05
# Installed packages are not the library, and its tests are missing from some systems' Python.
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Corpus:
    """Files in a row. Bytes [0, train_size) are for training, [train_size, size) for validation.

    Attributes:
        name: what to call it in messages.
        root, files, ends: the files (relative to root), and where each ends in the row.
        fingerprint: changes when a file is added, removed, renamed or changes its size.
    """

    name: str
    root: Path
    files: tuple[str, ...]
    ends: tuple[int, ...]
    fingerprint: str

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return self.ends[-1]

    @property
    def train_size(self) -> int:
        """Bytes for training."""
        return self.size - max(1, int(self.size * VALIDATION_SHARE))

    def read(self, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of all files.

        Raises:
            UserError: a file has become unreadable or shorter since it was listed.
        """
        found = []
        index = bisect_right(self.ends, start)
        while length > 0:
            begin = self.ends[index - 1] if index else 0
            want = min(length, self.ends[index] - start)
            path = self.root / self.files[index]
            try:
                with path.open("rb") as file:
                    file.seek(start - begin)
                    piece = file.read(want)
            except OSError as error:
                raise UserError(
                    f"cannot read {path} any more ({error.strerror}): do not move the data of a run."
                ) from None
            if len(piece) < want:
                raise UserError(f"{path} became shorter during the run: give --data a folder that nobody writes to.")
            found.append(piece)
            start, length, index = start + want, length - want, index + 1
        return b"".join(found)


def open_corpus(path: str | None) -> Corpus:
    """List the files of a folder, or one file; None: the sources of Python's own standard library.

    Files are put in the order of the hash of their name, so that validation (the last bytes) is like the rest.

    Raises:
        UserError: there is nothing at `path`, or nothing in it.
    """
    root = Path(sysconfig.get_path("stdlib") if path is None else path)
    if root.is_dir():
        listed = _walk(root, stdlib=path is None)
    elif root.is_file():
        listed, root = iter([root.name]), root.parent
    else:
        raise UserError(f"there is no file or folder {path}: give --data a folder of text, or leave it out.")
    names = sorted(listed, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    sizes = [(name, (root / name).stat().st_size) for name in names]
    sizes = [(name, size) for name, size in sizes if size]
    if not sizes:
        raise UserError(f"{root} holds no file with anything in it: give --data a folder of text, or leave it out.")
    fingerprint = hashlib.sha256(repr(sizes).encode()).hexdigest()
    label = "Python's standard library" if path is None else path
    return Corpus(label, root, tuple(n for n, _ in sizes), tuple(accumulate(s for _, s in sizes)), fingerprint)


def _walk(root: Path, *, stdlib: bool) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith((".", "__pycache__")) and not (stdlib and f in NOT_STDLIB)]
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and (name.endswith(".py") or not stdlib) and path.is_file():
                yield path.relative_to(root).as_posix()


def check_size(corpus: Corpus, context: int) -> None:
    """Raise a UserError when training or validation has no window of `context` bytes and the byte after it."""
    least = min(corpus.train_size, corpus.size - corpus.train_size)
    if least <= context:
        need = int((context + 2) / VALIDATION_SHARE)
        raise UserError(
            f"{corpus.name} has {corpus.size:,} bytes and --context {context} needs {need:,} or more "
            f"(5 % are for validation): give --data more text or take a smaller --context."
        )


def train_batch(
    corpus: Corpus, *, seed: int, step: int, batch: int, context: int, rows: range | None = None
) -> tuple[Tensor, Tensor]:
    """Sequences of bytes and their successors; windows begin anywhere in the training part.

    Args:
        corpus: has more than `context` bytes for training.
        seed, step: together with the row, they determine the start of a sequence.
        batch: sequences of a step.
        context: bytes of a sequence.
        rows: the sequences of the batch to read, for ranks that share it; None for all.

    Returns:
        ids and targets, int64 [len(rows), context] each.

    Raises:
        UserError: a file cannot be read any more.
    """
    rows = range(batch) if rows is None else rows
    starts = [_draw(f"{seed}:{step}:{row}", corpus.train_size - context) for row in rows]
    return _windows(corpus, starts, context)


def validation_batches(
    corpus: Corpus, *, batch: int, context: int, batches: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same windows every time, spread evenly over the validation part.

    Args:
        corpus: has more than `context` bytes for validation.
        batch, context: sequences of a batch, bytes of a sequence.
        batches: their number.

    Yields:
        ids and targets, int64 [batch, context] each.

    Raises:
        UserError: a file cannot be read any more.
    """
    room = corpus.size - corpus.train_size - context
    count = batch * batches
    starts = [corpus.train_size + i * room // count for i in range(count)]
    for first in range(0, count, batch):
        yield _windows(corpus, starts[first : first + batch], context)


def _draw(key: str, below: int) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") % below


def _windows(corpus: Corpus, starts: list[int], context: int) -> tuple[Tensor, Tensor]:
    rows = [torch.frombuffer(bytearray(corpus.read(start, context + 1)), dtype=torch.uint8) for start in starts]
    table = torch.stack(rows).long()
    return table[:, :-1], table[:, 1:]
