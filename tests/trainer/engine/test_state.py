"""From `submit()` to a message: scenarios through `EngineState.apply`, on a fake clock."""

from __future__ import annotations

import pytest

from tasks.messages import Failure, Outcome
from tests.trainer.engine.by_hand import (
    BOTH,
    FAILURE,
    HELD,
    OTHER,
    POINT,
    RANKED,
    SINGLE,
    EngineByHand,
    in_flight,
    in_states,
)
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.chunk_accumulator import LINGER_S
from trainer_client.engine.groups import OVERDUE_S
from trainer_client.engine.intake import UNSTORED_SAMPLES
from trainer_client.engine.room import MEASURE_S, STUCK_S
from trainer_client.engine.states import SlotStage, State

# --- on the way in --------------------------------------------------------------------------------


def test_an_outcome_that_is_there_is_taken_and_nothing_is_stored_or_sent(engine):
    slot = engine.submit(1)
    engine.run(but=[do.LookUp])
    engine.outcomes[engine.awaited(slot).address] = Outcome(reward=0.25)
    engine.run()
    assert slot.outcome_for("PickScore").reward == 0.25
    assert engine.awaited(slot).is_hit
    assert not [action for action in engine.done if isinstance(action, (do.Store, do.Publish))]
    engine.assert_nothing_is_left()


def test_a_failure_that_is_there_is_no_answer_and_the_next_attempt_is_asked_for(single):
    slot = single.submit(1)
    single.run(but=[do.LookUp])
    single.outcomes[single.awaited(slot).address] = Outcome(failure=FAILURE, attempt=2)
    single.run()
    assert (single.state_of(slot), single.awaited(slot).attempt) == (State.IN_FLIGHT, 3)

    single.put_outcome(single.awaited(slot).address, Outcome(failure=FAILURE, attempt=2))
    assert not slot.is_done
    single.put_outcome(single.awaited(slot).address, Outcome(failure=FAILURE, attempt=3))
    assert slot.outcome_for("PickScore").failure == FAILURE


def test_a_failure_that_was_asked_for_by_an_earlier_step_is_no_answer_of_the_next(single):
    slot = single.submit(1)
    single.run(but=[do.LookUp])
    address = single.awaited(slot).address
    old = Outcome(failure=Failure(kind="failed", message="bad luck"), attempt=1)
    single.apply(ev.OutcomesFound({address: old}, do.Purpose.POLL))
    assert not slot.is_done
    single.outcomes[address] = old
    single.run()
    assert single.awaited(slot).attempt == 2


def test_equal_samples_await_one_outcome_and_are_sent_once(engine):
    slots = [engine.submit(1) for _ in range(3)]
    engine.run()
    engine.wait(LINGER_S)
    assert len({engine.awaited(slot) for slot in slots}) == 1
    assert [len(delivery.awaited_when_sent) for delivery in engine.published] == [1]
    engine.answer(slots[0], 0.75)
    assert [slot.outcome_for("PickScore").reward for slot in slots] == [0.75] * 3
    engine.assert_nothing_is_left()


def test_two_rewards_of_one_sample_share_its_payload():
    engine = EngineByHand((POINT, OTHER))
    engine.submit(1)
    engine.run()
    assert len([action for action in engine.done if isinstance(action, do.Store)]) == 1


def test_two_rewards_that_are_the_same_computation_await_one_outcome():
    engine = EngineByHand((*SINGLE, SINGLE[0].model_copy(update={"name": "again"})))
    slot = engine.submit(1)
    engine.run()
    first, second = slot.awaited.values()
    assert first is second
    assert first.slots == [slot]
    assert len(engine.published) == 1
    engine.give_up(slot)
    engine.assert_nothing_is_left()


def test_while_outcomes_are_looked_up_the_next_samples_wait_and_are_then_asked_for_together(engine):
    engine.submit(1)
    engine.run(but=[do.LookUp])
    engine.submit(2)
    engine.submit(3)
    engine.run(but=[do.LookUp])
    (first,) = engine.asked(do.LookUp)
    engine.perform(first)
    (second,) = engine.asked(do.LookUp)
    assert (len(first.addresses), len(second.addresses)) == (1, 2)


def test_a_sample_that_cannot_be_encoded_is_invalid_and_sends_nothing(engine):
    slot = engine.submit(1, invalid=True)
    engine.run()
    assert slot.outcome_for("PickScore").failure.kind == "invalid"
    assert slot.sample is None
    engine.assert_nothing_is_left()


def test_at_most_twice_as_many_samples_are_encoded_as_there_are_encoders(engine):
    for number in range(10):
        engine.submit(number)
    assert len(engine.asked(do.Encode)) == 4
    engine.perform(engine.asked(do.Encode)[0])
    assert len(engine.asked(do.Encode)) == 4


def test_no_more_is_encoded_than_may_wait_for_the_store_while_outcomes_are_looked_up(engine):
    for number in range(3 * UNSTORED_SAMPLES):
        engine.submit(number)
    engine.run(but=[do.LookUp])
    encoded = [action for action in engine.done if isinstance(action, do.Encode)]
    assert UNSTORED_SAMPLES <= len(encoded) <= UNSTORED_SAMPLES + 2 * engine.num_encoders
    engine.run()
    assert engine.state.intake.num_submitted == 3 * UNSTORED_SAMPLES
    assert not engine.state.num_unsent - len(engine.state.sending.accumulator)


def test_a_sample_lets_go_of_its_media_once_everything_of_it_is_answered(single):
    slot = in_flight(single)
    assert slot.sample is not None
    single.answer(slot)
    assert slot.sample is None


def test_a_sample_counts_as_unsent_until_its_message_is_in_its_queue(single):
    single.submit(1)
    for kind in (do.Encode, do.LookUp, do.Store, do.Publish):
        single.run(but=[kind])
        assert single.state.num_unsent == 1
    single.run()
    assert single.state.num_unsent == 0


# --- room in the payload store --------------------------------------------------------------------


def test_nothing_is_stored_before_the_store_is_measured(engine):
    engine.submit(1)
    engine.run(but=[do.MeasureStore])
    assert engine.asked(do.MeasureStore)
    assert not engine.stored
    engine.run()
    assert engine.stored


def test_what_has_no_room_waits_and_is_stored_when_something_has_left():
    engine = EngineByHand(SINGLE, max_store_bytes=15)
    engine.store_bytes = 10
    slot = engine.submit(1)
    engine.run()
    assert engine.state_of(slot) is State.STORING
    engine.wait(MEASURE_S)
    assert engine.state_of(slot) is State.STORING
    engine.store_bytes = 0
    engine.wait(MEASURE_S)
    assert engine.state_of(slot) is State.IN_FLIGHT


def test_what_waits_for_room_and_is_given_up_is_never_stored():
    engine = EngineByHand(SINGLE, max_store_bytes=15)
    engine.store_bytes = 10
    slot = engine.submit(1)
    engine.run()
    engine.give_up(slot)
    engine.store_bytes = 0
    engine.wait(MEASURE_S)
    assert not [action for action in engine.done if isinstance(action, do.Store)]
    engine.assert_nothing_is_left()


def test_a_member_that_waits_for_room_and_is_given_up_is_never_stored():
    engine = EngineByHand((RANKED,), max_store_bytes=15)
    engine.store_bytes = 10
    slot = engine.submit(1, "g", size=2)
    engine.run()
    engine.give_up(slot)
    assert engine.state.num_unsent == 0
    engine.store_bytes = 0
    engine.wait(MEASURE_S)
    assert not [action for action in engine.done if isinstance(action, do.Store)]


def test_a_full_store_that_nothing_leaves_takes_the_members_that_it_waits_for():
    engine = EngineByHand((RANKED,), max_store_bytes=15)
    engine.store_bytes = 10
    slot = engine.submit(1, "g", size=1)
    engine.run()
    for _ in range(int(STUCK_S / MEASURE_S) + 2):
        engine.wait(MEASURE_S)
    assert engine.state_of(slot) is State.IN_FLIGHT


def test_a_full_store_takes_no_more_while_a_message_is_queued_that_makes_room():
    engine = EngineByHand((RANKED,), max_store_bytes=15)
    engine.store_bytes = 10
    engine.queued.add("somebody's")
    slot = engine.submit(1, "g", size=1)
    engine.run()
    for _ in range(2 * int(STUCK_S / MEASURE_S)):
        engine.wait(MEASURE_S)
    assert slot.stage is SlotStage.STORING


# --- chunks ---------------------------------------------------------------------------------------


def test_a_full_chunk_goes_at_once_and_the_rest_lingers(engine):
    slots = [engine.submit(number) for number in range(3)]
    engine.run()
    assert in_states(slots) == [State.IN_FLIGHT, State.IN_FLIGHT, State.LINGERING]
    engine.wait(LINGER_S)
    assert in_states(slots) == [State.IN_FLIGHT] * 3


def test_a_chunk_that_is_not_full_goes_at_once_if_somebody_waits_and_nothing_is_on_its_way(engine):
    first = engine.submit(1)
    engine.run()
    second_is_on_its_way = engine.submit(2)
    engine.collect(0)
    assert engine.state_of(first) is State.LINGERING
    engine.give_up(second_is_on_its_way)
    engine.run()
    assert engine.state_of(first) is State.IN_FLIGHT


def test_one_publish_is_under_way_and_what_comes_meanwhile_goes_after_it(single):
    slots = [single.submit(1)]
    single.run(but=[do.Publish])
    slots += [single.submit(2), single.submit(3)]
    single.run(but=[do.Publish])
    (first,) = single.asked(do.Publish)
    single.perform(first)
    (second,) = single.asked(do.Publish)
    assert [len(action.deliveries) for action in (first, second)] == [1, 2]


@pytest.mark.parametrize("ends", ["answered", "given up"])
def test_the_request_of_a_message_that_is_on_its_way_is_freed_once_it_has_arrived(ends, single):
    slot = single.submit(1)
    single.run(but=[do.Publish])
    (publish,) = single.asked(do.Publish)
    (delivery,) = publish.deliveries
    if ends == "answered":
        single.answer(slot)
    else:
        single.give_up(slot)
    single.run(but=[do.Publish])
    single.run()
    freed = [name for action in single.done if isinstance(action, do.Free) for name in action.names]
    assert freed.count(delivery.request) == 1
    single.assert_nothing_is_left()


def test_what_waits_for_the_publish_under_way_and_is_given_up_is_not_sent(single):
    single.submit(1)
    single.run(but=[do.Publish])
    slots = [single.submit(number) for number in (2, 3)]
    single.run(but=[do.Publish])
    single.give_up(slots[0])
    single.run()
    assert len(single.published) == 2
    assert in_states(slots) == [State.GIVEN_UP, State.IN_FLIGHT]


def test_what_async_reward_false_holds_goes_with_its_own_step_only():
    engine = EngineByHand((HELD,))
    this, next_ = engine.submit(1, step=0), engine.submit(2, step=1)
    engine.run()
    engine.wait(10 * LINGER_S)
    assert in_states([this, next_]) == [State.HELD, State.HELD]
    engine.collect(0)
    engine.run()
    assert in_states([this, next_]) == [State.IN_FLIGHT, State.HELD]


def test_what_two_steps_await_is_released_by_either():
    engine = EngineByHand((HELD,))
    engine.submit(1, step=0)
    slot = engine.submit(1, step=1)
    engine.run()
    engine.collect(1)
    engine.run()
    assert engine.state_of(slot) is State.IN_FLIGHT


# --- given up -------------------------------------------------------------------------------------


GIVEN_UP_WHILE = {
    "queued": [do.Encode],
    "encoding": [do.Encode],
    "looked up": [do.LookUp],
    "waiting for room": [do.MeasureStore],
    "stored": [do.Store],
    "published": [do.Publish],
    "in flight": [],
}


@pytest.mark.parametrize("rewards", [SINGLE, (HELD,), (RANKED,), BOTH], ids=lambda some: "+".join(s.name for s in some))
@pytest.mark.parametrize("stage", GIVEN_UP_WHILE)
def test_a_sample_that_is_given_up_leaves_nothing(stage, rewards):
    engine = EngineByHand(rewards, num_encoders=0 if stage == "queued" else 2)
    slots = [engine.submit(1, "g", size=2), engine.submit(2, "g", size=2)]
    if stage == "in flight":
        engine.collect(0)
    engine.run(but=GIVEN_UP_WHILE[stage])
    engine.give_up(*slots)
    engine.assert_nothing_is_left()


@pytest.mark.parametrize("stage", [stage for stage in GIVEN_UP_WHILE if stage != "queued"])
def test_what_another_sample_shares_stays_when_one_is_given_up(stage, single):
    first, second = single.submit(1), single.submit(1)
    single.run(but=GIVEN_UP_WHILE[stage])
    single.give_up(first)
    single.run()
    assert single.state_of(second) is State.IN_FLIGHT
    single.answer(second, 0.75)
    assert second.outcome_for("PickScore").reward == 0.75
    single.assert_nothing_is_left()


@pytest.mark.parametrize("stage", [stage for stage in GIVEN_UP_WHILE if stage != "queued"])
def test_what_a_sample_of_another_group_shares_stays_when_a_member_is_given_up(stage, ranked):
    given_up = ranked.submit(1, "first", size=2)
    stays = [ranked.submit(1, "second", size=2), ranked.submit(2, "second", size=2)]
    ranked.run(but=GIVEN_UP_WHILE[stage])
    ranked.give_up(given_up)
    ranked.run()
    ranked.collect(0)
    ranked.wait(OVERDUE_S)
    ranked.wait(LINGER_S)
    for slot in stays:
        assert in_states([slot, slot], RANKED)[0] is State.IN_FLIGHT
        assert ranked.state_of(slot, POINT) is State.IN_FLIGHT
