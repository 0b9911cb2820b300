"""When Redis is asked: the pace of polling, and what comes every few seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainer_client.engine.model import NEVER

FASTEST_S, SLOWEST_S = 0.005, 0.1
"""Pace of polling while someone waits in `collect()`: fast while outcomes come, slower while none do."""

IDLE_PACE_S = 0.5
"""Pace while nobody waits: enough to free payloads and to notice losses."""

POLL_SHARE = 5
"""Between two polls at least so many times the time that one takes, so that polling is no load for Redis."""

LONGEST_PAUSE_S = 1.0
"""But no longer: a poll may also have taken long since Redis could not be reached."""

NOTES_EVERY_S = 0.5
"""How often workers' notes are read."""

EVERYTHING_EVERY = 5
"""Once in so many inspections outcomes are asked for whose message is still queued: another client may have had the
same scored."""

RENEW_EVERY_S = 60.0
"""How often payloads are renewed, at most: they live `REWARDQ_PAYLOAD_TTL_S`."""


@dataclass(slots=True)
class Question:
    """What is asked every so often, but not while the last answer is still to come."""

    every_s: float
    due_at: float
    is_open: bool = False
    """It is asked, and not answered."""

    def is_due(self, now: float) -> bool:
        """Whether it is to be asked now."""
        return not self.is_open and now >= self.due_at

    def take(self, now: float) -> bool:
        """Whether it is to be asked now; if so, it is not due before its time is over again."""
        is_due = self.is_due(now)
        if is_due:
            self.due_at = now + self.every_s
        return is_due

    def asked(self) -> None:
        """There was something to ask."""
        self.is_open = True

    def answered(self) -> None:
        """The answer is there."""
        self.is_open = False

    @property
    def wake_at(self) -> float:
        """When it is due next, as far as that is known."""
        return NEVER if self.is_open else self.due_at


class Polling:
    """Counts the time to the next question of each kind.

    Args:
        reconcile_s: REWARDQ_RECONCILE_S.
        payload_ttl_s: REWARDQ_PAYLOAD_TTL_S.
    """

    def __init__(self, reconcile_s: float, payload_ttl_s: float, now: float) -> None:
        def every(seconds: float) -> Question:
            return Question(seconds, due_at=now + seconds)

        self._pace_s = FASTEST_S
        self._began_at = now
        self._numbers = Question(0.0, due_at=now)
        self.digests = Question(0.0, due_at=now)
        """With each poll."""
        self.notes = every(NOTES_EVERY_S)
        self.inspection = every(reconcile_s)
        self.everything = every(EVERYTHING_EVERY * reconcile_s)
        self.renewal = every(min(RENEW_EVERY_S, payload_ttl_s / 4))
        self._sent: dict[str, int] = {}
        self._taken: dict[str, int] = {}

    def begin_poll(self, now: float) -> bool:
        """Whether a poll is due; it counts as asked until it is `polled`."""
        is_due = self._numbers.take(now)
        if is_due:
            self._numbers.asked()
            self._began_at = now
        return is_due

    def wake_at(self) -> float:
        """When something is due next. (Digests are asked for with the numbers.)"""
        return min(
            self._numbers.wake_at,
            self.notes.wake_at,
            self.inspection.wake_at,
            self.everything.wake_at,
            self.renewal.wake_at,
        )

    def hurry(self, now: float) -> None:
        """Somebody waits from now on."""
        self._pace_s = FASTEST_S
        self._numbers.due_at = now

    def polled(self, num_new: int, now: float, *, is_awaited: bool) -> None:
        """A poll is over, with so many new outcomes; `is_awaited` says whether somebody waits for them."""
        self._numbers.answered()
        if not is_awaited:
            self._numbers.due_at = now + IDLE_PACE_S
            return
        self._pace_s = FASTEST_S if num_new else min(1.5 * self._pace_s, SLOWEST_S)
        pause_s = min(LONGEST_PAUSE_S, POLL_SHARE * (now - self._began_at))
        self._numbers.due_at = now + max(self._pace_s, pause_s)

    def numbers_read(self, sent: Mapping[str, int], taken: Mapping[str, int]) -> None:
        """How far the messages of some queues have come."""
        self._sent.update(sent)
        self._taken.update(taken)

    def has_left_queue(self, queue: str, number: int) -> bool:
        """Whether the message of this number was taken, as far as the numbers say; or Redis was emptied since."""
        taken, sent = self._taken.get(queue, 0), self._sent.get(queue, 0)
        return not taken < number <= sent
