"""Tickets are pickled in any thread, whatever the loop's thread does to their samples meanwhile."""

from __future__ import annotations

import pickle
import sys
import threading
import time

import pytest

from tasks.messages import Outcome
from tests.trainer.engine.by_hand import BOTH, POINT, RANKED, EngineByHand
from trainer_client.engine.model import Slot
from trainer_client.engine.states import State
from trainer_client.ticket import Ticket


@pytest.fixture
def hasty():
    """Threads take turns as often as they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


class Life:
    """A thread that takes one group of two samples after another from `submit()` to their outcomes."""

    def __init__(self) -> None:
        self.slots: tuple[Slot, ...] = ()
        self.num_groups = 0
        self.error: BaseException | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Life:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        assert self.error is None

    def _run(self) -> None:
        try:
            while not self._is_over.is_set():
                self._one_group()
                self.num_groups += 1
        except BaseException as error:  # `__exit__` tells
            self.error = error

    def _one_group(self) -> None:
        engine = EngineByHand(BOTH)
        slots = [engine.new_slot(number, "g", size=2) for number in (1, 2)]
        self.slots = tuple(slots)
        engine.submit_all(slots)
        engine.run()
        engine.answer(slots[0], of=POINT)
        engine.answer(slots[1], of=RANKED)
        engine.answer(slots[1], of=POINT)
        engine.give_up(*slots)


def ticket_of(slots) -> Ticket:
    return Ticket("run", "launch", "train", 0, 0, 0, len(slots), (), slots)


def test_a_ticket_is_pickled_whatever_the_loop_does_to_its_samples(hasty):
    seen = set()
    with Life() as life:
        until = time.monotonic() + 1.5
        while time.monotonic() < until and life.error is None:
            records = pickle.loads(pickle.dumps(ticket_of(life.slots))).slots
            for index, record in enumerate(records):
                seen.add(record.is_sent)
                if record.addresses is not None:
                    assert set(record.addresses) == {POINT.name, RANKED.name}
                    assert record.addresses[RANKED.name][2] == index
    assert life.num_groups > 1
    assert seen == {False, True}


def test_a_ticket_of_samples_that_no_engine_has_seen_counts_them_as_not_sent():
    engine = EngineByHand()
    ticket = engine.ticket(engine.new_slot(1))
    assert ticket.num_sent == 0


def test_a_ticket_says_what_was_sent_when_it_was_pickled_and_by_which_message():
    engine = EngineByHand((POINT,))
    slots = [engine.submit(number) for number in range(3)]
    engine.run()
    assert engine.state_of(slots[2]) is State.LINGERING
    ticket = engine.ticket(*slots)
    assert [record.is_sent for record in ticket.slots] == [True, True, False]
    (delivery,) = ticket.deliveries
    assert (delivery.request, delivery.number) == (engine.delivery(slots[0]).request, 1)
    assert delivery.addresses == tuple(engine.awaited(slot).address for slot in slots[:2])


def test_a_ticket_does_not_list_messages_of_which_it_awaits_nothing_any_more():
    engine = EngineByHand((POINT,))
    slots = [engine.submit(number) for number in range(2)]
    engine.run()
    engine.put_outcome(engine.awaited(slots[0]).address, Outcome(reward=1.0))
    ticket = engine.ticket(slots[0])
    assert ticket.deliveries == ()
    assert ticket.slots[0].is_sent
    (left,) = engine.ticket(slots[1]).deliveries
    assert left.request == engine.delivery(slots[1]).request


def test_a_pickled_ticket_does_not_change_with_its_samples():
    engine = EngineByHand((POINT,))
    slot = engine.submit(1)
    before = pickle.dumps(ticket_of([slot]))
    engine.submit(2)
    engine.run()
    assert pickle.loads(before).num_sent == 0
    assert ticket_of([slot]).num_sent == 1
