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


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be asked now."""

    numbers: bool
    digests: bool
    notes: bool
    inspect: bool
    everything: bool
    renew: bool


class Polling:
    """Counts the time to the next question of each kind; none is asked while the last of its kind is open."""

    def __init__(self, reconcile_s: float, payload_ttl_s: float, now: float) -> None:
        self._reconcile_s = reconcile_s
        self._renew_every_s = min(RENEW_EVERY_S, payload_ttl_s / 4)
        self._pace_s = FASTEST_S
        self._poll_at = self._poll_began = now
        self._notes_at = now + NOTES_EVERY_S
        self._inspect_at = now + reconcile_s
        self._everything_at = now + EVERYTHING_EVERY * reconcile_s
        self._renew_at = now + self._renew_every_s
        self._is_polling = self._is_reading_digests = False
        self._is_reading_notes = self._is_inspecting = False
        self._is_reading_everything = self._is_renewing = False
        self._sent: dict[str, int] = {}
        self._taken: dict[str, int] = {}

    def take_due(self, now: float) -> Due:
        """What is due; counts as asked."""
        is_poll_due = not self._is_polling and now >= self._poll_at
        due = Due(
            numbers=is_poll_due,
            digests=is_poll_due and not self._is_reading_digests,
            notes=not self._is_reading_notes and now >= self._notes_at,
            inspect=not self._is_inspecting and now >= self._inspect_at,
            everything=not self._is_reading_everything and now >= self._everything_at,
            renew=not self._is_renewing and now >= self._renew_at,
        )
        self._count_as_asked(due, now)
        return due

    def _count_as_asked(self, due: Due, now: float) -> None:
        if due.numbers:
            self._is_polling, self._poll_began = True, now
        if due.digests:
            self._is_reading_digests = True
        if due.notes:
            self._notes_at = now + NOTES_EVERY_S
        if due.inspect:
            self._inspect_at = now + self._reconcile_s
        if due.everything:
            self._everything_at = now + EVERYTHING_EVERY * self._reconcile_s
        if due.renew:
            self._renew_at = now + self._renew_every_s

    def wake_at(self) -> float:
        """When something is due next."""
        times = []
        if not self._is_reading_everything:
            times.append(self._everything_at)
        if not self._is_renewing:
            times.append(self._renew_at)
        if not self._is_polling:
            times.append(self._poll_at)
        if not self._is_reading_notes:
            times.append(self._notes_at)
        if not self._is_inspecting:
            times.append(self._inspect_at)
        return min(times, default=NEVER)

    def hurry(self, now: float) -> None:
        """Somebody waits from now on."""
        self._pace_s = FASTEST_S
        self._poll_at = now

    def polled(self, num_new: int, now: float, *, is_awaited: bool) -> None:
        """A poll is over, with so many new outcomes; `is_awaited` says whether somebody waits for them."""
        self._is_polling = False
        if not is_awaited:
            self._poll_at = now + IDLE_PACE_S
            return
        self._pace_s = FASTEST_S if num_new else min(1.5 * self._pace_s, SLOWEST_S)
        pause_s = min(LONGEST_PAUSE_S, POLL_SHARE * (now - self._poll_began))
        self._poll_at = now + max(self._pace_s, pause_s)

    def numbers_read(self, sent: Mapping[str, int], taken: Mapping[str, int]) -> None:
        """How far the messages of some queues have come."""
        self._sent.update(sent)
        self._taken.update(taken)

    def has_left_queue(self, queue: str, number: int) -> bool:
        """Whether the message of this number was taken, as far as the numbers say; or Redis was emptied since."""
        taken, sent = self._taken.get(queue, 0), self._sent.get(queue, 0)
        return not taken < number <= sent

    def digests_read(self) -> None:
        """It is known which groups are sealed."""
        self._is_reading_digests = False

    def reading_notes(self) -> None:
        """Notes are being read."""
        self._is_reading_notes = True

    def notes_read(self) -> None:
        """Notes are read."""
        self._is_reading_notes = False

    def inspecting(self) -> None:
        """Deliveries are being looked after."""
        self._is_inspecting = True

    def inspected(self) -> None:
        """They are looked after."""
        self._is_inspecting = False

    def reading_everything(self) -> None:
        """Everything in flight is being asked for."""
        self._is_reading_everything = True

    def everything_read(self) -> None:
        """Everything in flight was asked for."""
        self._is_reading_everything = False

    def renewing(self) -> None:
        """Payloads are being renewed."""
        self._is_renewing = True

    def renewed(self) -> None:
        """Payloads are renewed."""
        self._is_renewing = False
