"""Accesses of a store with a deadline: one behind a cut link never answers, whatever its own time-out is."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Asking:
    """Accesses a store in threads, one after the other."""

    _last: threading.Thread | None = None

    @property
    def is_silent(self) -> bool:
        """Whether the last access is still without an answer."""
        return self._last is not None and self._last.is_alive()

    def __call__(self, access: Callable[[], T], seconds: float) -> T:
        """access(), with its result or its exception.

        Raises:
            TimeoutError: no answer within so many seconds, to this access or to an earlier one.
        """
        longest = None if math.isinf(seconds) else seconds
        found: dict[str, Any] = {}

        def work() -> None:
            try:
                found["value"] = access()
            except Exception as error:  # raised where it was asked for
                found["error"] = error

        if self._last is not None:
            self._last.join(longest)
        if not self.is_silent:
            self._last = threading.Thread(target=work, daemon=True)
            self._last.start()
            self._last.join(longest)
        if self.is_silent:
            raise TimeoutError(f"the store did not answer within {seconds:g} s")
        if "error" in found:
            raise found["error"]
        value: T = found["value"]
        return value
