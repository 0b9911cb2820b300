"""Messages that a judge's budget had no permit for: how many go again, and when."""

from __future__ import annotations

import pytest

from tests.trainer.engine.by_hand import rewards_of
from tests.trainer.engine.parts import new_delivery
from trainer_client.engine.judge_permits import EVERY_S, FEWEST, NEVER, Throttle


def deliveries_of(reward, num_deliveries):
    (spec,) = rewards_of(
        {"reward_model": "vllm_evaluate", "name": reward, "vlm_model": reward, "api_base_url": "http://judge/v1"}
    )
    return [new_delivery(f"{reward}{number}", spec) for number in range(num_deliveries)]


@pytest.fixture
def throttle():
    """Nothing waits."""
    return Throttle()


def add(throttle, deliveries, now=0.0):
    for delivery in deliveries:
        throttle.add(delivery, delivery.request, now)


def take(throttle, now=0.0):
    return [request for _, request in throttle.take(now)]


def test_one_goes_for_each_answer_of_its_reward_first_come_first_sent(throttle):
    some = deliveries_of("a", 5)
    (other,) = deliveries_of("b", 1)
    add(throttle, some)
    assert take(throttle) == []
    throttle.count_answer(other.spec.fingerprint)
    throttle.count_answer(some[0].spec.fingerprint)
    throttle.count_answer(some[0].spec.fingerprint)
    assert take(throttle) == ["a0", "a1"]
    assert take(throttle) == []


def test_an_answer_of_another_judge_frees_no_permit(throttle):
    add(throttle, deliveries_of("a", 1))
    add(throttle, deliveries_of("b", 1))
    throttle.count_answer(deliveries_of("b", 1)[0].spec.fingerprint)
    assert take(throttle) == ["b0"]


def test_more_go_while_none_comes_back_and_fewer_when_one_does(throttle):
    some = deliveries_of("a", 40)
    add(throttle, some)
    sent = []
    for turn, num_sent in enumerate((2, 6, 14), 1):
        sent += take(throttle, turn * EVERY_S)
        assert len(sent) == num_sent
    add(throttle, some[:1], 3 * EVERY_S)
    for turn, num_sent in enumerate((18, 26), 4):
        sent += take(throttle, turn * EVERY_S)
        assert len(sent) == num_sent
    assert sent == [delivery.request for delivery in some[:26]]


def test_their_number_does_not_grow_while_nothing_waits(throttle):
    add(throttle, deliveries_of("a", 1))
    for turn in range(1, 200):
        take(throttle, turn * EVERY_S)
    add(throttle, deliveries_of("a", 40), 200 * EVERY_S)
    assert len(take(throttle, 200 * EVERY_S)) == FEWEST


def test_none_goes_without_an_answer_before_its_time(throttle):
    add(throttle, deliveries_of("a", 1), now=10.0)
    assert throttle.wake_at() == 10.0 + EVERY_S
    assert take(throttle, 10.0 + EVERY_S / 2) == []
    assert take(throttle, 10.0 + EVERY_S) == ["a0"]
    assert throttle.wake_at() == NEVER


def test_the_time_of_the_next_comes_again_while_something_waits(throttle):
    add(throttle, deliveries_of("a", 2 * FEWEST))
    take(throttle, EVERY_S)
    assert throttle.wake_at() == 2 * EVERY_S


def test_the_parts_of_a_group_go_one_by_one_and_the_group_waits_until_all_are_sent(throttle):
    (delivery,) = deliveries_of("a", 1)
    delivery.part_requests = ("part 0", "part 1", "part 2")
    for request in delivery.part_requests:
        throttle.add(delivery, request, 0.0)
    assert take(throttle, EVERY_S) == ["part 0", "part 1"]
    assert throttle.holds(delivery)
    assert take(throttle, 2 * EVERY_S) == ["part 2"]
    assert not throttle.holds(delivery)


def test_one_that_is_noted_twice_is_not_sent_twice(throttle):
    first, second = deliveries_of("a", 2)
    add(throttle, [first, first, second, first])
    assert len(throttle) == 2
    assert take(throttle, EVERY_S) == ["a0", "a1"]
    assert not throttle.holds(first)


def test_one_of_which_nothing_is_awaited_any_more_is_not_sent(throttle):
    first, second = deliveries_of("a", 2)
    second.part_requests = ("part 0",)
    add(throttle, [first, second])
    throttle.add(second, "part 0", 0.0)
    throttle.discard(second)
    assert (throttle.holds(first), throttle.holds(second)) == (True, False)
    assert take(throttle, EVERY_S) == ["a0"]


def test_one_that_waits_for_nothing_may_be_discarded(throttle):
    (delivery,) = deliveries_of("a", 1)
    throttle.discard(delivery)
    add(throttle, deliveries_of("a", 1))
    throttle.discard(delivery)
    assert len(throttle) == 1


def test_answers_before_anything_waited_free_no_permit_later(throttle):
    (delivery,) = deliveries_of("a", 1)
    fingerprint = delivery.spec.fingerprint
    throttle.count_answer(fingerprint)
    add(throttle, [delivery])
    assert take(throttle) == []
    take(throttle, EVERY_S)
    throttle.count_answer(fingerprint)
    assert take(throttle, EVERY_S) == []
    add(throttle, [delivery], EVERY_S)
    assert take(throttle, EVERY_S) == []


def test_a_message_that_was_sent_is_forgotten(throttle):
    some = deliveries_of("a", 50)
    sent = []
    for _ in range(3):
        add(throttle, some)
        for delivery in some:
            throttle.count_answer(delivery.spec.fingerprint)
        sent += take(throttle)
    assert len(sent) == 150
    assert len(throttle) == 0
    assert not any(throttle.holds(delivery) for delivery in some)


def test_a_reward_waits_while_one_of_its_messages_does(throttle):
    (delivery,) = deliveries_of("a", 1)
    fingerprint = delivery.spec.fingerprint
    assert not throttle.waits_for(fingerprint)
    add(throttle, [delivery])
    assert throttle.waits_for(fingerprint)
    take(throttle, EVERY_S)
    assert not throttle.waits_for(fingerprint)
