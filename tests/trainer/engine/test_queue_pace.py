"""How fast the messages of a queue are taken."""

from __future__ import annotations

import pytest

from trainer_client.engine.queue_pace import Pace, QueuePaces


@pytest.fixture
def paces():
    return QueuePaces()


def see(paces, offsets, queue="gpu"):
    for now, offset in offsets:
        paces.see({queue: offset}, now)


def test_a_queue_that_was_not_seen_for_a_second_has_no_pace(paces):
    assert paces.of("gpu", 5, 10.0) is None
    see(paces, [(10.0, 5), (10.5, 8)])
    assert paces.of("gpu", 8, 10.9) is None


def test_the_pace_is_what_was_taken_since_the_queue_was_first_seen(paces):
    see(paces, [(10.0, 100), (12.0, 130)])
    assert paces.of("gpu", 180, 14.0) == Pace(80, 4.0)
    assert paces.of("vlm", 180, 14.0) is None


def test_what_was_taken_more_than_a_minute_ago_counts_no_more(paces):
    see(paces, [(float(t), 1000 if t >= 100 else 10 * t) for t in range(201)])
    assert paces.of("gpu", 1000, 200.0) == Pace(0, 60.0)
    assert Pace(0, 60.0).seconds_for(5) is None


def test_a_queue_that_is_seen_a_hundred_times_a_second_is_remembered_once_a_second(paces):
    see(paces, [(t / 100, t) for t in range(20_000)])
    assert len(paces._seen["gpu"]) < 65
    pace = paces.of("gpu", 20_000, 200.0)
    assert pace.num_taken == pytest.approx(6_000, abs=100)
    assert pace.seconds == pytest.approx(60, abs=1)


def test_after_redis_was_emptied_the_pace_begins_anew(paces):
    see(paces, [(0.0, 5_000), (30.0, 6_000), (31.0, 0), (33.0, 10)])
    assert paces.of("gpu", 20, 35.0) == Pace(20, 4.0)


def test_the_time_for_messages_is_that_of_the_pace():
    assert Pace(30, 60.0).seconds_for(6) == 12.0
