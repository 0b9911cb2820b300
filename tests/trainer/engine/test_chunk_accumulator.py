"""Batching: which chunks go, and when."""

from __future__ import annotations

import pytest

from tests.trainer.engine.by_hand import HELD, OTHER, POINT, RANKED
from tests.trainer.engine.parts import new_awaited
from trainer_client.engine.chunk_accumulator import LINGER_S, NEVER, Accumulator
from trainer_client.engine.states import State

NOTHING = frozenset()


@pytest.fixture
def accumulator():
    """Without anything in it."""
    return Accumulator()


def take(accumulator, now=0.0, released=NOTHING, *, is_flushing=False):
    chunks = accumulator.take(now, released, is_flushing=is_flushing)
    return [[awaited.address for awaited in chunk] for chunk in chunks]


def add(accumulator, *addresses, spec=POINT, now=0.0, **options):
    awaited = [new_awaited(address, spec, **options) for address in addresses]
    for one in awaited:
        accumulator.add(one, now)
    return awaited


def test_a_full_chunk_goes_at_once_in_the_order_in_which_its_samples_came(accumulator):
    add(accumulator, "a", "b", "c")
    assert take(accumulator) == [["a", "b"]]
    assert len(accumulator) == 1


def test_several_full_chunks_go_together(accumulator):
    add(accumulator, "a", "b", "c", "d")
    assert take(accumulator) == [["a", "b"], ["c", "d"]]


def test_a_chunk_that_is_not_full_lingers_from_its_last_sample_on(accumulator):
    add(accumulator, "a", spec=OTHER.model_copy(update={"batch_size": 3}), now=0.0)
    add(accumulator, "b", spec=OTHER.model_copy(update={"batch_size": 3}), now=0.15)
    assert take(accumulator, LINGER_S) == []
    assert accumulator.wake_at(NOTHING) == 0.15 + LINGER_S
    assert take(accumulator, 0.15 + LINGER_S) == [["a", "b"]]


def test_a_chunk_goes_at_once_when_it_is_flushed(accumulator):
    add(accumulator, "a")
    assert take(accumulator, is_flushing=True) == [["a"]]


def test_what_was_taken_is_not_taken_twice(accumulator):
    (awaited,) = add(accumulator, "a")
    assert awaited in accumulator
    take(accumulator, is_flushing=True)
    assert awaited not in accumulator
    assert take(accumulator, is_flushing=True) == []
    assert accumulator.wake_at(NOTHING) == NEVER


def test_each_reward_and_each_step_has_a_chunk_of_its_own(accumulator):
    add(accumulator, "point")
    add(accumulator, "other", spec=OTHER)
    add(accumulator, "next step", steps=[1])
    assert take(accumulator) == []
    assert take(accumulator, is_flushing=True) == [["point"], ["other"], ["next step"]]


def test_a_group_is_a_chunk_by_itself_and_lingers_for_nobody(accumulator):
    add(accumulator, "first group", "second group", spec=RANKED, is_group=True)
    assert take(accumulator) == [["first group"], ["second group"]]


def test_what_is_held_goes_when_its_step_is_collected_and_not_before(accumulator):
    add(accumulator, "a", "b", "c", spec=HELD)
    assert take(accumulator, 100.0, is_flushing=True) == []
    assert take(accumulator, 100.0, {("train", 1)}, is_flushing=True) == []
    assert take(accumulator, 0.0, {("train", 0)}) == [["a", "b"]]
    assert take(accumulator, LINGER_S, {("train", 0)}) == [["c"]]


def test_what_two_steps_wait_for_goes_with_the_first_that_is_collected(accumulator):
    add(accumulator, "a", spec=HELD, steps=[0, 1])
    assert take(accumulator, released={("train", 1)}, is_flushing=True) == [["a"]]


def test_what_is_held_and_what_is_not_are_told_by_their_state(accumulator):
    assert accumulator.add(new_awaited("a"), 0.0) is State.LINGERING
    assert accumulator.add(new_awaited("b", HELD), 0.0) is State.HELD


def test_of_one_reward_what_is_held_does_not_travel_with_what_is_not(accumulator):
    assert HELD.fingerprint == POINT.fingerprint
    add(accumulator, "held", spec=HELD)
    add(accumulator, "not held")
    assert take(accumulator) == []
    assert take(accumulator, LINGER_S) == [["not held"]]


def test_what_is_held_wakes_nobody_until_it_is_released(accumulator):
    add(accumulator, "a", spec=HELD, now=5.0)
    assert accumulator.wake_at(NOTHING) == NEVER
    assert accumulator.wake_at({("train", 1)}) == NEVER
    assert accumulator.wake_at({("train", 0)}) == 5.0 + LINGER_S


def test_what_is_discarded_is_in_no_chunk(accumulator):
    first, _ = add(accumulator, "a", "b")
    accumulator.discard(first)
    accumulator.discard(first)
    assert take(accumulator) == []
    assert take(accumulator, is_flushing=True) == [["b"]]


def test_after_the_time_of_the_next_chunk_has_come_and_it_is_taken_nothing_is_due(accumulator):
    add(accumulator, "a", now=1.0)
    add(accumulator, "b", spec=OTHER, now=1.1)
    while (at := accumulator.wake_at(NOTHING)) < NEVER:
        assert take(accumulator, at)
    assert len(accumulator) == 0
