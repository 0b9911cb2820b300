"""Messages that a judge's budget had no place for: sent again as places come free, and hardly faster.

A place comes free when an answer arrives, so one message goes for each answer. Some more go every half second, since
the parts of groups and other clients' answers free places too: twice as many as the last time while none of them comes
back, half as many when one does. However many wait, workers are offered about as many as can be asked.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from trainer_client.board import Chunk, Entry

FEWEST, EVERY_S = 2, 0.5
"""So many messages of a reward go again so often at least."""

Request = tuple[Chunk, str]
"""A chunk's request, or that of a part of it."""


@dataclass(slots=True)
class _Queue:
    """What waits for one judge, first come, first sent."""

    more_at: float
    waiting: dict[Request, None] = field(default_factory=dict)
    num_of: Counter[Chunk] = field(default_factory=Counter)
    """How many messages of each chunk wait."""
    num_more: int = FEWEST
    came_back: bool = True

    def put(self, request: Request) -> None:
        if request not in self.waiting:
            self.waiting[request] = None
            self.num_of[request[0]] += 1
        self.came_back = True

    def drop(self, request: Request) -> None:
        del self.waiting[request]
        self.num_of[request[0]] -= 1
        if not self.num_of[request[0]]:
            del self.num_of[request[0]]

    def more_now(self, now: float) -> int:
        """How many go without an answer."""
        if now < self.more_at:
            return 0
        self.more_at = now + EVERY_S
        self.num_more = (
            max(FEWEST, self.num_more // 2) if self.came_back else 2 * self.num_more
        )
        self.came_back = False
        return self.num_more


class BusyMessages:
    """Waiting messages by the fingerprint of their reward. Used by one thread.

    Args:
        send: Sends the message of a request again, with a new number.
    """

    def __init__(self, send: Callable[[Chunk, str], None]) -> None:
        self._send = send
        self._queues: dict[str, _Queue] = {}
        self._num_answered: Counter[str] = Counter()

    def add(self, chunk: Chunk, request: str) -> None:
        """A worker could not ask the judge; nobody else looks after the chunk until the message is sent again."""
        chunk.look_at = float("inf")
        if chunk.spec.fingerprint not in self._queues:
            self._queues[chunk.spec.fingerprint] = _Queue(
                more_at=time.monotonic() + EVERY_S
            )
        self._queues[chunk.spec.fingerprint].put((chunk, request))

    def count_answers(self, entries: Iterable[Entry]) -> None:
        """These have been answered."""
        self._num_answered.update(e.spec.fingerprint for e in entries)

    def send_some(self, look_after_s: float) -> None:
        """Send what may have a place now; a chunk of which all is sent is looked after again `look_after_s` later."""
        now = time.monotonic()
        for fingerprint, queue in self._queues.items():
            num = self._num_answered.pop(fingerprint, 0) + queue.more_now(now)
            for chunk, request in list(itertools.islice(queue.waiting, num)):
                is_wanted = bool(chunk.entries)  # neither answered nor given up
                if is_wanted:
                    self._send(
                        chunk, request
                    )  # what it raises leaves the message waiting
                queue.drop((chunk, request))
                if is_wanted and not queue.num_of[chunk]:
                    chunk.look_at = now + look_after_s
                    chunk.is_missed = bool(
                        chunk.more_requests
                    )  # a group is put together once its parts are there
        self._num_answered.clear()
