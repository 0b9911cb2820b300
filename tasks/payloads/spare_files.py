"""Files of payloads that were freed, kept for a while: a payload of the same size is written over one of them.

The pages of a file in memory are there already; those of a new file are zeroed first, which takes four times as long
as to write them.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

LEAST_BYTES = 2**16
"""A smaller file is not worth it."""

MOST_BYTES = 256 * 2**20
"""Of the spare files of one process: eighty images of 1024x1024. REWARDQ_MAX_STORE_BYTES does not count them."""

KEPT_S = 30.0
"""How long a spare file waits for its use."""


@dataclass(frozen=True, slots=True)
class SpareFile:
    """A file that nobody reads any more."""

    name: str
    num_bytes: int
    until: float
    """On the clock of `time.monotonic`."""


class SpareFiles:
    """The spare files of this process, which alone writes over them. Safe between threads."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._files: list[SpareFile] = []
        """The oldest first."""
        self._pid = os.getpid()

    def wants(self, num_bytes: int) -> bool:
        """Whether there is a place for a file of this size."""
        with self._lock:
            in_all = num_bytes + sum(one.num_bytes for one in self._own())
            return num_bytes >= LEAST_BYTES and in_all <= self._most_bytes

    def keep(self, name: str, num_bytes: int) -> None:
        """Take up a file that was freed."""
        with self._lock:
            until = time.monotonic() + KEPT_S
            self._own().append(SpareFile(name, num_bytes, until))

    def take(self, num_bytes: int) -> str | None:
        """The name of a file of this size, which is the caller's from now on."""
        with self._lock:
            files = self._own()
            for at in range(len(files) - 1, -1, -1):
                if files[at].num_bytes == num_bytes:
                    return files.pop(at).name
            return None

    def take_expired(self, *, and_all: bool = False) -> list[str]:
        """The names of files that are to be dropped: those that have waited too long, or all."""
        now = time.monotonic()
        with self._lock:
            files = self._own()
            dropped = [one.name for one in files if and_all or one.until <= now]
            files[:] = [one for one in files if not and_all and one.until > now]
            return dropped

    def _own(self) -> list[SpareFile]:
        """A child that was forked has none: its parent writes over these."""
        if self._pid != os.getpid():
            self._pid, self._files = os.getpid(), []
        return self._files
