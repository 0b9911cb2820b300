"""Room in the payload store: what may be stored now."""

from __future__ import annotations

import pytest

from trainer_client.engine.room import MEASURE_S, STUCK_S, Room


@pytest.fixture
def room():
    """Of a store of 100 bytes."""
    return Room(100)


def test_nothing_is_admitted_before_the_store_is_measured_which_is_due_at_once(room):
    assert room.is_due(0.0)
    assert not room.is_known
    assert not room.admit(1)


def test_what_was_stored_since_the_measurement_counts(room):
    room.measured(50, 0.0)
    assert room.admit(30)
    assert not room.admit(30)
    assert room.admit(20)
    room.measured(10, 1.0)
    assert room.admit(90)


def test_what_is_not_admitted_does_not_count(room):
    room.measured(50, 0.0)
    assert not room.admit(60)
    assert room.admit(50)


def test_a_single_payload_always_fits_into_an_empty_store(room):
    room.measured(0, 0.0)
    assert room.admit(1000)
    assert not room.admit(1)


def test_the_store_is_measured_again_after_a_while_and_not_twice_at_a_time(room):
    room.measured(0, 5.0)
    assert room.measure_at == 5.0 + MEASURE_S
    assert not room.is_due(5.0 + MEASURE_S / 2)
    assert room.is_due(5.0 + MEASURE_S)
    room.is_measuring = True
    assert not room.is_due(5.0 + MEASURE_S)
    room.measured(0, 6.0)
    assert not room.is_measuring


def test_a_store_is_stuck_when_nothing_has_left_it_for_long(room):
    assert not room.is_stuck(100.0), "it was never measured"
    room.measured(90, 0.0)
    assert not room.is_stuck(STUCK_S / 2)
    assert room.is_stuck(STUCK_S)


def test_a_store_that_something_has_left_is_not_stuck(room):
    room.measured(90, 0.0)
    room.measured(80, STUCK_S - 1)
    assert not room.is_stuck(STUCK_S)
    room.measured(80, STUCK_S + 1)
    room.measured(85, STUCK_S + 2)
    assert room.is_stuck(2 * STUCK_S - 1)


def test_what_this_client_stores_itself_is_not_taken_for_bytes_that_have_left(room):
    room.measured(50, 0.0)
    room.admit(40)
    room.measured(60, STUCK_S)
    assert room.is_stuck(STUCK_S)


def test_bytes_that_are_stored_although_there_is_no_room_count(room):
    room.measured(90, 0.0)
    room.admit_anyway(50)
    assert not room.admit(1)
    assert "holds 140 bytes of all clients, REWARDQ_MAX_STORE_BYTES is 100" in room.words
