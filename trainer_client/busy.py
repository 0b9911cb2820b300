"""Chunks that a judge's budget had no place for: sent again as places come free, and not faster.

A place comes free when an answer arrives, so one chunk goes for each answer; and a few go now and then, since other
clients' answers free places too. However many wait, workers are offered about as many as can be asked.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

from trainer_client.board import Chunk, Entry

TRICKLE = 2
"""Chunks of a reward that go again every `TRICKLE_EVERY_S` although no answer has come."""

TRICKLE_EVERY_S = 0.5


class BusyChunks:
    """Waiting chunks by the fingerprint of their reward, first come, first sent. Used by one thread.

    Args:
        send: Sends the message of a chunk again as it was, with a new number.
    """

    def __init__(self, send: Callable[[Chunk], None]) -> None:
        self._send = send
        self._waiting: dict[str, dict[Chunk, None]] = {}
        self._num_answered: Counter[str] = Counter()
        self._trickle_at = 0.0

    def add(self, chunk: Chunk) -> None:
        """A worker could not ask the judge; nobody else looks after the chunk until it is sent again."""
        chunk.look_at = float("inf")
        if not self._waiting:
            self._trickle_at = time.monotonic() + TRICKLE_EVERY_S
        self._waiting.setdefault(chunk.spec.fingerprint, {})[chunk] = None

    def count_answers(self, entries: Iterable[Entry]) -> None:
        """These have been answered."""
        self._num_answered.update(e.spec.fingerprint for e in entries)

    def send_some(self, look_after_s: float) -> None:
        """Send what may have a place now; each is looked after again `look_after_s` later."""
        now = time.monotonic()
        trickle = TRICKLE if now >= self._trickle_at else 0
        if trickle:
            self._trickle_at = now + TRICKLE_EVERY_S
        for fingerprint, chunks in list(self._waiting.items()):
            for chunk in list(chunks)[: self._num_answered[fingerprint] + trickle]:
                del chunks[chunk]
                if chunk.entries:  # else answered, or given up
                    chunk.look_at = now + look_after_s
                    self._send(chunk)
            if not chunks:
                del self._waiting[fingerprint]
        self._num_answered.clear()
