"""Memory that payloads are read into again and again: fresh memory costs a page fault for each 4 KiB."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

KEPT_BYTES = 128 * 2**20
"""Of buffers that each store of each process keeps for the next payload of their size: forty images of 1024x1024."""

LEAST_BYTES = 2**16
"""A smaller payload gets memory of its own, which the allocator has at hand."""


class Buffers:
    """Buffers by size. One is lent again as soon as nobody refers to it. Safe between threads.

    Nobody gives a buffer back, and none can be given back too early: an array or a view of it that somebody keeps, such
    as a reward model of the user's, is a reference, and its buffer stays theirs.
    """

    def __init__(self, most_bytes: int = KEPT_BYTES) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._kept: list[bytearray] = []
        """The least recently lent first."""
        self._num_bytes = 0
        """Of those that are kept."""

    def take(self, num_bytes: int) -> bytearray:
        """A buffer of exactly so many bytes, with anything in it."""
        if not LEAST_BYTES <= num_bytes <= self._most_bytes:
            return bytearray(num_bytes)
        with self._lock:
            found = self._unused(num_bytes)
            if found is not None:
                buffer = self._kept.pop(found)
                self._kept.append(buffer)
                return buffer
            buffer = bytearray(num_bytes)
            self._make_room(num_bytes)
            if self._num_bytes + num_bytes <= self._most_bytes:
                self._kept.append(buffer)
                self._num_bytes += num_bytes
            return buffer

    def _unused(self, num_bytes: int) -> int | None:
        """Where a buffer of this size is that nobody refers to."""
        for at in range(len(self._kept)):
            if len(self._kept[at]) == num_bytes and _is_unused(self._kept, at):
                return at
        return None

    def _make_room(self, num_bytes: int) -> None:
        """Let go of buffers that nobody refers to until another of this size may be kept."""
        at = 0
        while at < len(self._kept) and self._num_bytes + num_bytes > self._most_bytes:
            if _is_unused(self._kept, at):
                self._num_bytes -= len(self._kept.pop(at))
            else:
                at += 1


def _num_references(buffers: Sequence[bytearray], at: int) -> int:
    return sys.getrefcount(buffers[at])


_UNUSED = _num_references([bytearray(1)], 0)
"""What Python counts for a buffer that only a list refers to; versions of Python count differently."""


def _is_unused(buffers: Sequence[bytearray], at: int) -> bool:
    return _num_references(buffers, at) <= _UNUSED
