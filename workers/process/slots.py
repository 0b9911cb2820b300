"""Looks whether the worker still takes messages, and has it started anew if not. It trusts none of Celery's accounts.

A worker whose slots are gone looks well: its heartbeat says `ready`, and it answers pings.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from celery.worker import state as worker_state

from tasks import keys

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0

LOOKS_SAID, LOOKS_ENDED = 3, 8
"""After so many looks at which nothing moved, the heartbeat says so; after so many the worker ends. That is longer than
a call of a Redis that hangs holds the main thread up (`SOCKET_TIMEOUT_S`)."""


@dataclass(frozen=True, slots=True)
class SlotState:
    """The slots of a worker at one moment."""

    num_slots: int
    reserved: frozenset[Any]
    """Requests that Celery counts as taking a slot."""
    running: frozenset[Any] | None
    """Requests that a thread is working on; None with a pool that does not say so."""
    num_taken: int
    """How many messages were taken out of queues so far."""
    num_waiting: int
    """Messages in the worker's queues."""


class SlotJudgement:
    """Decides from looks at the slots whether the worker is stuck. Pure: no clock, no call of a server."""

    def __init__(self) -> None:
        self._before: SlotState | None = None
        self._lost: frozenset[Any] = frozenset()
        self.num_lost_looks = self.num_idle_looks = 0
        """For how many looks in a row slots were lost, or nothing was taken though it could be."""

    def forget(self) -> None:
        """Begin anew: what was seen so far has an explanation."""
        self._before, self._lost = None, frozenset()
        self.num_lost_looks = self.num_idle_looks = 0

    def look(self, now: SlotState) -> None:
        """Take one more look into account."""
        self._look_for_lost(now)
        is_idle = now.num_waiting > 0 and len(now.reserved) < now.num_slots
        before = self._before
        took_nothing = before is not None and before.num_taken == now.num_taken
        self.num_idle_looks = self.num_idle_looks + 1 if is_idle and took_nothing else 0
        self._before = now

    def _look_for_lost(self, now: SlotState) -> None:
        """Which reserved requests no thread runs, at this look and at those before it."""
        lost = frozenset() if now.running is None else now.reserved - now.running
        still_lost = lost & self._lost
        self.num_lost_looks = self.num_lost_looks + 1 if still_lost else 0
        self._lost = still_lost or lost

    def why_stuck(self, num_looks: int) -> str:
        """Why the worker is stuck, if it was so for at least `num_looks`; else empty."""
        now = self._before
        if now is None:
            return ""
        if self.num_lost_looks >= num_looks:
            return f"{len(self._lost)} of its {now.num_slots} slots are held by tasks that no thread runs"
        if self.num_idle_looks >= num_looks:
            num_free = now.num_slots - len(now.reserved)
            return (
                f"it takes no message, though {now.num_waiting} wait in its queues and {num_free} of its "
                f"{now.num_slots} slots are free"
            )
        return ""


class SlotWatch(threading.Thread):
    """Looks at the slots of this worker for as long as the process lives.

    Args:
        look: The slots now; it asks the broker. None while there is a reason to take nothing: the worker stops, or
            waits for a Redis.
        say: Called with why the worker is stuck, for its heartbeat; with an empty text once it is not any more.
        end: Called once the worker is stuck for good.
    """

    def __init__(
        self,
        look: Callable[[], SlotState | None],
        say: Callable[[str], None],
        end: Callable[[str], None],
        every_s: float = LOOK_EVERY_S,
    ) -> None:
        super().__init__(name="rewardq-slots", daemon=True)
        self._look, self._say, self._end, self._every_s = look, say, end, every_s
        self._judgement = SlotJudgement()
        self._ended = threading.Event()

    def run(self) -> None:
        """Look until the worker is stuck for good."""
        while not self._ended.wait(self._every_s):
            why = self._look_once()
            if why:
                self._end(why)
                return

    def _look_once(self) -> str:
        """Why the worker is to end now; else empty."""
        try:
            now = self._look()
        except (redis.RedisError, OSError, RuntimeError):
            # The broker is away, or a set changed while it was read: nothing is known of this moment.
            now = None
        if now is None:
            self._judgement.forget()
        else:
            self._judgement.look(now)
        self._say(self._judgement.why_stuck(LOOKS_SAID))
        return self._judgement.why_stuck(LOOKS_ENDED)


def slots_of(consumer: Any, broker: redis.Redis) -> SlotState | None:
    """The slots of this process's worker, as Celery, its pool and the broker have them; see `SlotWatch`."""
    app, pool = consumer.app, consumer.pool
    is_asked_to_stop = worker_state.should_stop not in (None, False)
    if is_asked_to_stop or app.redis_log.is_gone:
        return None
    running = getattr(pool, "running", None)
    return SlotState(
        num_slots=pool.num_processes,
        reserved=frozenset(worker_state.reserved_requests),
        running=None if running is None else frozenset(running),
        num_taken=app.envelopes.num_taken,
        # Not those of the start: remote control may add a queue, and cancel one.
        num_waiting=_num_waiting(broker, tuple(app.amqp.queues.consume_from)),
    )


def _num_waiting(client: Any, queues: Collection[str]) -> int:
    """How many messages wait in these queues."""
    with client.pipeline(transaction=False) as pipe:
        for queue in queues:
            for name in keys.queue_lists(queue):
                pipe.llen(name)
        lengths: Sequence[Any] = pipe.execute(raise_on_error=False)
    for length in lengths:
        if isinstance(length, Exception):
            raise length
    return sum(int(length) for length in lengths)
