"""How fast the messages of a queue are taken, by what this client has seen of its consumed offset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WINDOW_S = 60.0
"""The pace is that of so many seconds, or of as many as were seen."""

SEE_EVERY_S = 1.0
"""How often an offset is remembered."""


@dataclass(frozen=True, slots=True)
class Pace:
    """So many messages of a queue were taken in so many seconds, by whoever takes them."""

    num_taken: int
    seconds: float

    def seconds_for(self, num_messages: int) -> float | None:
        """How long so many messages take at this pace; None if none was taken."""
        if not self.num_taken:
            return None
        return num_messages * self.seconds / self.num_taken


class QueuePaces:
    """The pace of each queue."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[tuple[float, int], ...]] = {}
        """By queue: when its offset was what, oldest first. A tuple, for `of` is asked in another thread."""

    def see(self, taken: Mapping[str, int], now: float) -> None:
        """The consumed offsets of some queues."""
        for queue, offset in taken.items():
            seen = self._seen.get(queue, ())
            if seen and offset < seen[-1][1]:  # Redis was emptied
                seen = ()
            if seen and now < seen[-1][0] + SEE_EVERY_S:
                continue
            seen = (*seen, (now, offset))
            while len(seen) > 2 and seen[1][0] <= now - WINDOW_S:
                seen = seen[1:]
            self._seen[queue] = seen

    def of(self, queue: str, offset: int, now: float) -> Pace | None:
        """The pace of a queue whose offset is now `offset`; None if it was not seen for a second."""
        seen = self._seen.get(queue)
        if not seen or now < seen[0][0] + SEE_EVERY_S:
            return None
        began_at, first = seen[0]
        return Pace(max(0, offset - first), now - began_at)
