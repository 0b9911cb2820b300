"""When Redis is asked: the pace of polling, and what comes every few seconds, on a fake clock."""

from __future__ import annotations

import pytest

from trainer_client.engine.polling import (
    EVERYTHING_EVERY,
    FASTEST_S,
    IDLE_PACE_S,
    LONGEST_PAUSE_S,
    NOTES_EVERY_S,
    POLL_SHARE,
    RENEW_EVERY_S,
    SLOWEST_S,
    Polling,
)

RECONCILE_S = 2.0


@pytest.fixture
def polling():
    """From 0 on."""
    return Polling(RECONCILE_S, payload_ttl_s=900.0, now=0.0)


def poll(polling, now, *, num_new=0, is_awaited=True, takes_s=0.0):
    """One poll; returns how much later the next is due."""
    assert polling.begin_poll(now)
    polling.polled(num_new, now + takes_s, is_awaited=is_awaited)
    return polling._numbers.due_at - (now + takes_s)


def test_outcomes_are_polled_at_once_and_not_while_the_last_poll_is_open(polling):
    assert polling.begin_poll(0.0)
    assert not polling.begin_poll(100.0)
    polling.polled(0, 100.0, is_awaited=False)
    assert not polling.begin_poll(100.0)
    assert polling.begin_poll(100.0 + IDLE_PACE_S)


def test_while_nobody_waits_the_pace_is_slow(polling):
    assert poll(polling, 0.0, num_new=5, is_awaited=False) == pytest.approx(IDLE_PACE_S)


def test_while_somebody_waits_the_pace_slows_down_to_a_bound_as_long_as_nothing_comes(polling):
    now, paces = 0.0, []
    for _ in range(12):
        pace_s = poll(polling, now)
        paces.append(pace_s)
        now += pace_s + 1e-6
    assert paces == sorted(paces)
    assert paces[0] == pytest.approx(1.5 * FASTEST_S)
    assert paces[-1] == pytest.approx(SLOWEST_S)


def test_an_outcome_makes_the_pace_fast_again(polling):
    now = 0.0
    for _ in range(12):
        now += poll(polling, now) + 1e-6
    assert poll(polling, now, num_new=1) == pytest.approx(FASTEST_S)


def test_a_slow_poll_is_followed_by_a_longer_pause_so_that_polling_is_no_load(polling):
    assert poll(polling, 0.0, num_new=1, takes_s=0.1) == pytest.approx(0.1 * POLL_SHARE)


def test_that_pause_is_bounded_since_a_poll_takes_long_also_where_redis_is_away(polling):
    assert poll(polling, 0.0, num_new=1, takes_s=60.0) == pytest.approx(LONGEST_PAUSE_S)


def test_whoever_begins_to_wait_is_polled_for_at_once(polling):
    poll(polling, 0.0, is_awaited=False)
    polling.hurry(0.1)
    assert polling.begin_poll(0.1)
    polling.polled(1, 0.1, is_awaited=True)
    assert polling._numbers.due_at == pytest.approx(0.1 + FASTEST_S)


@pytest.mark.parametrize("name", ["digests", "notes", "inspection", "everything", "renewal"])
def test_nothing_is_asked_for_while_the_last_question_of_its_kind_is_open(polling, name):
    question = getattr(polling, name)
    assert question.take(100.0)
    question.asked()
    assert not question.take(200.0)
    question.answered()
    assert question.take(200.0)


def times_of(polling, name, until_s, step_s=0.1):
    """When something was due."""
    found = []
    for number in range(round(until_s / step_s) + 1):
        now = number * step_s
        if getattr(polling, name).take(now):
            found.append(round(now, 3))
    return found


def test_notes_are_read_every_so_often(polling):
    times = times_of(polling, "notes", 4 * NOTES_EVERY_S)
    assert len(times) == pytest.approx(4, abs=1)
    assert times[0] >= NOTES_EVERY_S


def test_deliveries_are_looked_after_every_so_often_and_not_while_they_are_being_looked_after(polling):
    assert not polling.inspection.take(RECONCILE_S - 0.01)
    assert polling.inspection.take(RECONCILE_S)
    polling.inspection.asked()
    assert not polling.inspection.take(10.0)
    polling.inspection.answered()
    assert polling.inspection.take(10.0)


def test_everything_is_asked_for_once_in_some_inspections(polling):
    assert times_of(polling, "everything", 25.0, 0.5) == [EVERYTHING_EVERY * RECONCILE_S, 20.0]


@pytest.mark.parametrize(("ttl_s", "every_s"), [(900.0, RENEW_EVERY_S), (40.0, 10.0)])
def test_payloads_are_renewed_well_before_they_expire(ttl_s, every_s):
    polling = Polling(RECONCILE_S, ttl_s, 0.0)
    assert times_of(polling, "renewal", 2.5 * every_s, 0.5) == [every_s, 2 * every_s]


def test_after_what_is_due_is_taken_nothing_is_due_at_once(polling):
    now = 0.0
    for _ in range(200):
        if polling.begin_poll(now):
            polling.polled(0, now, is_awaited=True)
        for question in (polling.notes, polling.inspection, polling.everything, polling.renewal):
            question.take(now)
        assert polling.wake_at() > now
        now = polling.wake_at()


def test_a_message_has_left_its_queue_once_its_number_is_taken(polling):
    polling.numbers_read({"gpu": 10}, {"gpu": 4})
    assert polling.has_left_queue("gpu", 4)
    assert not polling.has_left_queue("gpu", 5)
    assert not polling.has_left_queue("gpu", 10)


def test_a_number_that_was_never_given_out_is_of_a_redis_that_was_emptied_since(polling):
    polling.numbers_read({"gpu": 3}, {"gpu": 0})
    assert polling.has_left_queue("gpu", 7)


def test_of_a_queue_that_nobody_has_asked_for_everything_may_have_left(polling):
    assert polling.has_left_queue("gpu", 1)


def test_each_queue_has_numbers_of_its_own(polling):
    polling.numbers_read({"gpu": 5}, {"gpu": 0})
    polling.numbers_read({"vlm": 5}, {"vlm": 5})
    assert not polling.has_left_queue("gpu", 5)
    assert polling.has_left_queue("vlm", 5)
