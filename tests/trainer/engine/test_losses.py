"""Loss detection: what a look at a delivery means, on a fake clock."""

from __future__ import annotations

import pytest

from tasks.messages import WIRE_VERSION, Heartbeat
from tests.trainer.engine.by_hand import POINT, RANKED
from tests.trainer.engine.parts import new_awaited, new_delivery
from trainer_client.engine.losses import MAX_PAUSE_S, LossPolicy, loaders_of

LOOK_EVERY_S = 2.0


@pytest.fixture
def losses():
    """Looks every two seconds."""
    return LossPolicy(LOOK_EVERY_S)


@pytest.fixture
def delivery(losses):
    """Was sent at 0."""
    delivery = new_delivery("request", pause_s=LOOK_EVERY_S)
    losses.sent(delivery, 0.0)
    return delivery


def test_a_message_is_looked_at_some_time_after_it_was_sent(delivery):
    assert (delivery.sent_at, delivery.look_at) == (0.0, LOOK_EVERY_S)


def test_what_is_missed_once_may_be_between_its_queue_and_its_claim(losses, delivery):
    assert not losses.is_lost(delivery, 1, 2.0)
    assert delivery.look_at == 4.0
    assert losses.is_lost(delivery, 1, 4.0)


def test_what_is_found_between_two_looks_must_be_missed_twice_again(losses, delivery):
    assert not losses.is_lost(delivery, 1, 2.0)
    assert not losses.is_lost(delivery, 0, 4.0)
    assert not losses.is_lost(delivery, 1, 6.0)
    assert losses.is_lost(delivery, 1, 8.0)


def test_what_was_claimed_and_is_no_more_is_lost_at_once(losses, delivery):
    losses.seen_in_hand(delivery)
    assert not losses.is_lost(delivery, 0, 2.0)
    assert losses.is_lost(delivery, 1, 4.0)


def test_what_is_missed_is_not_lost_before_its_pause_is_over(losses, delivery):
    delivery.pause_s = 7.0
    assert [losses.is_lost(delivery, 1, now) for now in (2.0, 4.0, 6.0, 8.0)] == [False, False, False, True]


def test_the_claims_of_a_groups_parts_say_nothing_of_the_group(losses):
    group = new_delivery("group", RANKED)
    losses.seen_in_hand(group)
    assert not group.was_claimed


def test_pauses_double_where_messages_lead_nowhere_up_to_a_bound(losses, delivery):
    pauses = []
    for _ in range(6):
        losses.grow_pause(delivery, 0.0)
        pauses.append(delivery.pause_s)
    assert pauses == [4.0, 8.0, 16.0, MAX_PAUSE_S, MAX_PAUSE_S, MAX_PAUSE_S]


def test_what_was_sent_again_must_be_missed_twice_again(losses, delivery):
    losses.is_lost(delivery, 1, 2.0)
    assert losses.is_lost(delivery, 1, 4.0)
    losses.grow_pause(delivery, 4.0)
    assert not losses.is_lost(delivery, 1, 100.0)
    assert losses.is_lost(delivery, 1, 102.0)


def test_after_a_worker_that_died_the_next_message_is_looked_after_as_soon(losses, delivery):
    delivery.pause_s = 16.0
    losses.seen_in_hand(delivery)
    losses.grow_pause(delivery, 10.0)
    assert (delivery.pause_s, delivery.was_claimed, delivery.is_missed) == (LOOK_EVERY_S, False, False)
    assert (delivery.sent_at, delivery.look_at) == (10.0, 10.0 + LOOK_EVERY_S)


def test_a_new_message_keeps_the_grown_pause_of_what_was_lost_before(losses, delivery):
    delivery.pause_s = 16.0
    again = delivery.awaited[0]
    again.delivery = delivery
    assert losses.first_pause_s([new_awaited("new"), again]) == 16.0
    assert losses.first_pause_s([new_awaited("new")]) == LOOK_EVERY_S


def test_what_a_worker_could_not_read_counts_as_missed_and_is_looked_after_after_its_pause(losses, delivery):
    delivery.pause_s = 8.0
    losses.not_read(delivery, 1.0)
    assert delivery.look_at == 9.0
    assert losses.is_lost(delivery, 1, 9.0)


def heartbeat(node, *, queue="gpu", loading=(), loaded=()):
    return Heartbeat(
        wire=WIRE_VERSION,
        node=node,
        queues=(queue,),
        host="host",
        pid=1,
        store="store",
        state="loading",
        loading=loading,
        loaded=loaded,
    )


@pytest.mark.parametrize("spec", [POINT, RANKED], ids=lambda spec: spec.name)
def test_a_reward_waits_for_the_worker_of_its_queue_that_loads_the_model_of_its_parts(spec):
    loads = heartbeat("loads", loading=(POINT.fingerprint,))
    elsewhere = heartbeat("elsewhere", queue="other", loading=(POINT.fingerprint,))
    idle = heartbeat("idle", loading=("another model",))
    assert loaders_of(spec, [loads, elsewhere, idle]) == ["loads"]


def test_no_load_is_waited_for_where_another_worker_has_the_model():
    loads = heartbeat("loads", loading=(POINT.fingerprint,))
    has_it = heartbeat("has it", loaded=(POINT.fingerprint,))
    has_it_elsewhere = heartbeat("elsewhere", queue="other", loaded=(POINT.fingerprint,))
    assert loaders_of(POINT, [loads, has_it]) == []
    assert loaders_of(POINT, [loads, has_it_elsewhere]) == ["loads"]
