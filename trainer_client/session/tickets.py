"""Tickets: made at `submit()`; at `collect()` checked, and turned back into the slots that they stand for."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

from tasks.errors import TicketError
from tasks.rewards import RewardConfig, RewardSpec
from tasks.source.code import changed_files
from trainer_client.engine.engine import Engine
from trainer_client.engine.model import Slot
from trainer_client.session.client_process import ClientProcess
from trainer_client.steps.open_steps import OpenSteps
from trainer_client.steps.submission import Added, Submission
from trainer_client.ticket import Ticket


def ticket_of(
    submission: Submission,
    added: Added,
    process: ClientProcess,
    client_id: str,
    pickled: set[int],
) -> Ticket:
    """The ticket of samples that were added to a step; it notes in `pickled` when it is pickled."""
    rewards = submission.rewards
    return Ticket(
        run=process.run,
        launch=process.launch,
        split=submission.split,
        step=added.step,
        rank=process.rank,
        start=added.start,
        stop=added.start + len(added.slots),
        fingerprints=_fingerprints(rewards),
        codes=tuple((spec.name, spec.code) for spec in rewards if spec.code),
        slots=tuple(added.slots),
        client=client_id,
        number=submission.ticket_number,
        pickled=pickled,
    )


def check_ticket(ticket: Ticket, run: str, rewards: Sequence[RewardSpec]) -> None:
    """Check that a client of this run with these rewards can collect a ticket.

    Args:
        rewards: Of the ticket's split, as they stand in the ticket's launch.

    Raises:
        TicketError: The ticket is of another run, of other rewards, or of other code of a class of the user's.
    """
    if ticket.run != run:
        raise TicketError(
            f"this ticket is of run {ticket.run!r}, this client of {run!r}"
        )
    if ticket.fingerprints != _fingerprints(rewards):
        _check_code(ticket, rewards)  # the more telling error, where it applies
        raise TicketError(
            f"this ticket is for the rewards {dict(ticket.fingerprints)}, "
            f"this client has {dict(_fingerprints(rewards))}"
        )


def _fingerprints(rewards: Sequence[RewardSpec]) -> tuple[tuple[str, str], ...]:
    return tuple((spec.name, spec.fingerprint) for spec in rewards)


def _check_code(ticket: Ticket, rewards: Sequence[RewardSpec]) -> None:
    codes = dict(ticket.codes)
    for spec in rewards:
        files = changed_files(codes.get(spec.name, ()), spec.code)
        if files and spec.name in codes and spec.code:
            raise TicketError(
                f"{' and '.join(files)} changed since this ticket was made: what it asked for of reward {spec.name!r} "
                "are rewards by other code; submit its samples again, or collect it where the old files are"
            )


def live_slots(ticket: Ticket, client_id: str, steps: OpenSteps) -> list[Slot] | None:
    """The slots of a ticket that this client made in this process; None unless all of them are live.

    A ticket that was pickled and came back has records only: its slots are in the open step, unless that was collected.
    """
    if ticket.client != client_id:
        return None
    live = [slot for slot in ticket.slots if isinstance(slot, Slot)]
    if not live:
        live = steps.slots_of(ticket)
    return live if len(live) == len(ticket.slots) else None


class ResumedTickets:
    """The slots of tickets whose live slots are gone, mostly with their process. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Held while a ticket is resumed, which waits for the engine: threads that collect one ticket must not resume
        it twice. Therefore it is not the client's lock, which `submit()` needs."""
        self._slots: dict[tuple[Any, ...], list[Slot]] = {}
        """By `Ticket.place`."""

    def slots_of(
        self, ticket: Ticket, engine: Engine, config: RewardConfig
    ) -> Sequence[Slot]:
        """The slots of a ticket, which is resumed at the first call.

        Args:
            config: This client's rewards as they stand in the ticket's launch.
        """
        with self._lock:
            if ticket.place not in self._slots:
                # A copy is as if pickled: a forked child has slots that only its parent's threads look after.
                records = copy.copy(ticket)
                self._slots[ticket.place] = engine.resume(records, config)
            return self._slots[ticket.place]

    def forget(self, ticket: Ticket) -> None:
        """A ticket is collected. If it is collected again it is resumed again."""
        with self._lock:
            self._slots.pop(ticket.place, None)
