"""What a process has one of."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """What a process has one of: made at the first call, by one of the threads that come then; the others wait.

    (`functools.cache` would have each of them make one.)
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: list[T] = []

    def __call__(self) -> T:
        """The one there is."""
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]

    def take(self) -> T | None:
        """The one there is, if there is one, which the next call does not give any more."""
        with self._lock:
            return self._made.pop() if self._made else None
