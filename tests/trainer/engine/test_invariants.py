"""What `EngineState.check()` sees: each test plants by hand what must not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tasks.messages import Outcome
from tests.trainer.engine.by_hand import (
    POINT,
)
from tests.trainer.engine.situations import (
    group_looking_up,
    in_flight,
    lingering,
    looking_up,
    storing,
    throttled,
    with_group,
)
from trainer_client.engine.model import Delivery
from trainer_client.engine.states import PayloadStage, SentBy, State

S = State


PLANTS: list[tuple[Callable, Callable]] = []


def planted(situation):
    def remember(plant):
        PLANTS.append((situation, plant))
        return plant

    return remember


@planted(lingering)
def an_outcome_is_kept_under_another_address(engine, slot):
    awaited = engine.state.core.awaited
    awaited["elsewhere"] = awaited.pop(engine.awaited(slot).address)


@planted(in_flight)
def an_outcome_has_no_state(engine, slot):
    engine.awaited(slot).state = None


@planted(in_flight)
def an_ended_outcome_is_kept(engine, slot):
    engine.awaited(slot).state = S.ANSWERED


@planted(in_flight)
def an_outcome_is_there_and_still_awaited(engine, slot):
    engine.awaited(slot).outcome = Outcome(reward=1.0)


@planted(lingering)
def an_outcome_is_awaited_by_no_slot(engine, slot):
    engine.awaited(slot).slots.clear()


@planted(lingering)
def a_slot_does_not_know_what_it_awaits(engine, slot):
    slot.awaited = {}


@planted(in_flight)
def what_is_in_flight_is_in_no_delivery(engine, slot):
    delivery = engine.delivery(slot)
    engine.awaited(slot).delivery = None
    del engine.state.core.deliveries[delivery.request]


@planted(in_flight)
def a_delivery_does_not_know_what_it_is_for(engine, slot):
    engine.delivery(slot).awaited = []


@planted(in_flight)
def a_delivery_is_forgotten(engine, slot):
    engine.state.core.deliveries.clear()


@planted(in_flight)
def a_delivery_is_kept_under_another_name(engine, slot):
    delivery = engine.delivery(slot)
    engine.state.core.deliveries["another"] = delivery


@planted(in_flight)
def a_delivery_is_kept_for_nothing(engine, slot):
    engine.state.core.deliveries["empty"] = Delivery("empty", "", POINT, SentBy.US, [], 1.0)


@planted(in_flight)
def two_deliveries_are_for_the_same_outcome(engine, slot):
    twin = Delivery("twin", "", POINT, SentBy.US, [engine.awaited(slot)], 1.0, state=S.IN_FLIGHT)
    engine.state.core.deliveries["twin"] = twin


@planted(in_flight)
def a_delivery_is_in_another_state_than_its_outcome(engine, slot):
    engine.delivery(slot).state = S.PUBLISHING


@planted(lingering)
def the_count_of_a_state_is_wrong(engine, slot):
    engine.state.core._num_in[S.STORING] += 1


@planted(lingering)
def a_payload_is_kept_under_another_name(engine, slot):
    by_name = engine.state.core.payloads._by_name
    (name,) = by_name
    by_name["another"] = by_name.pop(name)


@planted(lingering)
def a_payload_is_kept_for_nobody(engine, slot):
    (payload,) = engine.state.core.payloads
    payload.users.clear()


@planted(lingering)
def the_bytes_of_a_stored_payload_are_kept(engine, slot):
    (payload,) = engine.state.core.payloads
    payload.content = object()


@planted(storing)
def the_bytes_of_a_payload_are_gone_before_it_is_stored(engine, slot):
    (payload,) = engine.state.core.payloads
    payload.content = None


@planted(lingering)
def an_outcome_does_not_know_its_payloads(engine, slot):
    engine.awaited(slot).payloads = []


@planted(storing)
def a_payload_waits_for_room_in_no_queue(engine, slot):
    (payload,) = engine.state.core.payloads
    payload.stage = PayloadStage.WAITING


@planted(lingering)
def what_lingers_is_not_in_the_accumulator(engine, slot):
    engine.state.sending.accumulator.discard(engine.awaited(slot))


@planted(in_flight)
def what_is_sent_is_still_in_the_accumulator(engine, slot):
    engine.state.sending.accumulator.add(engine.awaited(slot), engine.now)


@planted(looking_up)
def what_is_looked_up_is_asked_for_by_nobody(engine, slot):
    engine.state.intake._looked_up.clear()


@planted(group_looking_up)
def a_group_is_looked_up_by_nobody(engine, slot):
    engine.state.core.num_group_calls = 0


@planted(storing)
def what_is_stored_has_forgotten_its_sample(engine, slot):
    engine.awaited(slot).source = None


@planted(storing)
def a_sample_has_forgotten_what_is_stored_of_it(engine, slot):
    slot.unsettled.clear()


@planted(storing)
def media_are_stored_and_nothing_has_followed(engine, slot):
    (payload,) = engine.state.core.payloads
    payload.stage, payload.content = PayloadStage.STORED, None


@planted(with_group)
def no_group_carries_what_waits_for_its_group(engine, slot):
    (group,) = engine.state.groups
    for member in group.members.values():
        member.carried = []


@planted(throttled)
def no_permit_is_waited_for(engine, slot):
    engine.state.throttle.discard(engine.delivery(slot))


@planted(in_flight)
def a_permit_is_waited_for_by_what_is_in_flight(engine, slot):
    delivery = engine.delivery(slot)
    engine.state.throttle.add(delivery, delivery.request, engine.now)


@pytest.mark.parametrize(("situation", "plant"), PLANTS, ids=[plant.__name__ for _, plant in PLANTS])
def test_check_sees_that(situation, plant):
    engine, slot = situation()
    engine.state.check()
    plant(engine, slot)
    with pytest.raises(AssertionError):
        engine.state.check()
