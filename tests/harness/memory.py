"""What malloc has given to this process."""

from __future__ import annotations

import ctypes
import threading

import pytest

needs_mallinfo2 = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or later")


class MallInfo(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def bytes_in_use() -> int:
    """What malloc has given to this process and not got back, of all its threads; no files, no shared memory."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


class PeakMemory:
    """How many bytes more than at its beginning this process had in use at most; a thread looks every 0.5 ms."""

    def __enter__(self) -> PeakMemory:
        self._start, self.bytes, self._over = bytes_in_use(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.0005):
            self.bytes = max(self.bytes, bytes_in_use() - self._start)
