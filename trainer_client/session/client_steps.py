"""The steps of one client: what it has submitted in this process and not collected, by step and by ticket."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence

from tasks.rewards import RewardConfig, Split
from trainer_client.engine.engine import Engine
from trainer_client.engine.model import Slot
from trainer_client.session.client_process import ClientProcess
from trainer_client.session.collection import Wanted
from trainer_client.session.tickets import (
    ResumedTickets,
    check_ticket,
    live_slots,
    ticket_of,
)
from trainer_client.steps.open_steps import OpenSteps
from trainer_client.steps.submission import Added, Submission
from trainer_client.ticket import Ticket


class ClientSteps:
    """The open steps of one client, and its tickets. Safe between threads.

    One lock guards the open steps and everything in them. It is never held over a wait or a call of a server, so that
    `submit()` does not wait for a thread that collects.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._lock = threading.Lock()
        self._open_steps = OpenSteps(world_size)
        self._resumed = ResumedTickets()
        self._ticket_numbers = itertools.count(1)
        self._held: weakref.WeakValueDictionary[int, Ticket]
        """By number, the tickets that somebody in this process holds."""
        self._held = weakref.WeakValueDictionary()
        self._pickled: set[int] = set()
        """Numbers of the tickets that were pickled."""

    def new_ticket_number(self) -> int:
        """A number that no other ticket of this client in this process has."""
        return next(self._ticket_numbers)

    def issue(
        self,
        submission: Submission,
        added: Added,
        process: ClientProcess,
        client_id: str,
    ) -> Ticket:
        """The ticket of samples that were added."""
        ticket = ticket_of(submission, added, process, client_id, self._pickled)
        self._held[ticket.number] = ticket
        return ticket

    def abandoned(self) -> list[Slot]:
        """The samples of open steps that nobody can collect without this client.

        With several ranks, a sample of a group is another rank's too.
        """
        with self._lock:
            steps = list(self._open_steps)
        can_be_collected = self._pickled | set(self._held)
        found = []
        for step in steps:
            for slot in step.slots:
                is_shared = self._world_size > 1 and _is_of_a_group(slot)
                if slot.ticket not in can_be_collected and not is_shared:
                    found.append(slot)
        return found

    def num_submitted(self, split: Split) -> int:
        """How many samples were submitted to the open step of a split."""
        with self._lock:
            step = self._open_steps.get(split)
            return step.num_submitted if step is not None else 0

    def add(self, submission: Submission, number: int | None) -> Added:
        """Add checked samples to the open step of their split, which is opened if there is none.

        Args:
            number: Of the step; None for the open or the next step.

        Raises:
            InvalidSampleError: Another step is open, or a group would have too many members. Nothing is added then.
        """
        with self._lock:
            return submission.add_to(self._open_steps.open(submission.split, number))

    def num_pending(self, split: Split) -> int:
        """How many samples of the open step still miss an outcome."""
        with self._lock:
            step = self._open_steps.get(split)
            if step is None:
                return 0
            return sum(not slot.is_done for slot in step.slots)

    def give_up(self, split: Split) -> Sequence[Slot]:
        """Close the open step whatever is in it; returns its slots."""
        with self._lock:
            step = self._open_steps.give_up(split)
        return step.slots if step is not None else ()

    def wanted_of_step(
        self, engine: Engine, config: RewardConfig, split: Split, number: int | None
    ) -> Wanted:
        """Everything in the open step of a split; the step gets the number `number` if that is given.

        Raises:
            InvalidSampleError: Another step is open.
        """
        rewards = config.of(split)
        with self._lock:
            step = self._open_steps.get(split)
            if number is not None:
                step = self._open_steps.open(split, number)
            wanted = Wanted(engine, split, self._open_steps.number(split), rewards)
            if step is not None:
                wanted.take_all_of(step, self._world_size)
        return wanted

    def wanted_of_ticket(
        self, engine: Engine, config: RewardConfig, run: str, ticket: Ticket
    ) -> Wanted:
        """The samples of a ticket, which another process may have submitted, under another launch.

        Raises:
            TicketError: A client of this run with these rewards cannot collect it.
        """
        config = config.for_launch(ticket.launch)
        rewards = config.of(ticket.split)
        check_ticket(ticket, run, rewards)
        slots: Sequence[Slot] | None
        with self._lock:
            step = self._open_steps.get(ticket.split)
            slots = live_slots(ticket, engine.client_id, self._open_steps)
        if slots is None:
            slots = self._resumed.slots_of(ticket, engine, config)
        return Wanted(engine, ticket.split, ticket.step, rewards, slots, step, ticket)

    def close(self, wanted: Wanted) -> None:
        """End what is collected: nobody waits for its samples any more."""
        wanted.engine.give_up(wanted.slots)
        with self._lock:
            if wanted.ticket is None:
                self._open_steps.close(wanted.split, wanted.slots)
            else:
                self._open_steps.take_out(wanted.split, wanted.slots)
        if wanted.ticket is not None:
            self._resumed.forget(wanted.ticket)


def _is_of_a_group(slot: Slot) -> bool:
    return any(spec.is_groupwise for spec in slot.rewards)
