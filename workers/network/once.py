"""What a process has one of."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """An object that a process has one of. The first call makes it, and other threads that call meanwhile wait.

    With `functools.cache` each of these threads would make one.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: list[T] = []

    def __call__(self) -> T:
        """The object."""
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]

    def take(self) -> T | None:
        """The object, if there is one. The next call makes a new one."""
        with self._lock:
            return self._made.pop() if self._made else None
