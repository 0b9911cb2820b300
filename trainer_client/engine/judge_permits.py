"""Messages that a judge's budget had no permit for: sent again as permits come free, and hardly faster.

A permit comes free when an answer arrives, so one message goes for each answer. Some more go every half second, since
the parts of groups and other clients' answers free permits too: twice as many as the last time while none of them comes
back, half as many when one does. However many wait, workers are offered about as many as can be asked.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

from trainer_client.engine.model import NEVER, Delivery

FEWEST, EVERY_S = 2, 0.5
"""So many messages of a reward go again so often at least."""

Message = tuple[Delivery, str]
"""A delivery's request, or that of a part of it."""


@dataclass(slots=True)
class _Queue:
    """What waits for one judge, first come, first sent."""

    more_at: float
    waiting: dict[Message, None] = field(default_factory=dict)
    num_of: Counter[Delivery] = field(default_factory=Counter)
    """How many messages of each delivery wait."""
    num_more: int = FEWEST
    came_back: bool = True

    def put(self, message: Message) -> None:
        if message not in self.waiting:
            self.waiting[message] = None
            self.num_of[message[0]] += 1
        self.came_back = True

    def drop(self, message: Message) -> None:
        delivery = message[0]
        del self.waiting[message]
        self.num_of[delivery] -= 1
        if not self.num_of[delivery]:
            del self.num_of[delivery]

    def num_without_answer(self, now: float) -> int:
        """How many go now although no answer has come."""
        if now < self.more_at:
            return 0
        self.more_at = now + EVERY_S
        if self.came_back:
            self.num_more = max(FEWEST, self.num_more // 2)
        else:
            # No more than wait: unbounded it would pass every integer within half a minute.
            self.num_more = min(2 * self.num_more, max(FEWEST, len(self.waiting)))
        self.came_back = False
        return self.num_more


class Throttle:
    """Waiting messages by the fingerprint of their reward."""

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}
        self._num_answered: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(len(queue.waiting) for queue in self._queues.values())

    def holds(self, delivery: Delivery) -> bool:
        """Whether a message of it waits."""
        queue = self._queues.get(delivery.spec.fingerprint)
        return queue is not None and delivery in queue.num_of

    def add(self, delivery: Delivery, request: str, now: float) -> None:
        """A worker had no permit for this request."""
        fingerprint = delivery.spec.fingerprint
        if fingerprint not in self._queues:
            self._queues[fingerprint] = _Queue(more_at=now + EVERY_S)
        self._queues[fingerprint].put((delivery, request))

    def count_answer(self, fingerprint: str) -> None:
        """An outcome of this reward has come: a permit is free."""
        if fingerprint in self._queues:
            self._num_answered[fingerprint] += 1

    def discard(self, delivery: Delivery) -> None:
        """Nothing of it is awaited any more."""
        queue = self._queues.get(delivery.spec.fingerprint)
        if queue is None or delivery not in queue.num_of:
            return
        for request in delivery.requests:
            if (delivery, request) in queue.waiting:
                queue.drop((delivery, request))

    def take(self, now: float) -> list[Message]:
        """The messages that may get a permit now; they wait no more."""
        taken: list[Message] = []
        for fingerprint, queue in list(self._queues.items()):
            num_answered = self._num_answered.pop(fingerprint, 0)
            num = num_answered + queue.num_without_answer(now)
            for message in list(itertools.islice(queue.waiting, num)):
                queue.drop(message)
                taken.append(message)
        return taken

    def waits_for(self, fingerprint: str) -> bool:
        """Whether messages of this reward wait."""
        queue = self._queues.get(fingerprint)
        return queue is not None and bool(queue.waiting)

    def wake_at(self) -> float:
        """When more go although no answer has come."""
        times = [queue.more_at for queue in self._queues.values() if queue.waiting]
        return min(times, default=NEVER)
