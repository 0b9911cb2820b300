"""Tickets of earlier processes that are resumed: scenarios through `EngineState.apply`."""

from __future__ import annotations

from tests.trainer.engine.by_hand import (
    RANKED,
    RECONCILE_S,
    EngineByHand,
    another_rank_joins,
    in_flight,
    in_states,
    seal,
)
from trainer_client.engine import actions as do
from trainer_client.engine.chunk_accumulator import LINGER_S
from trainer_client.engine.model import Payload, Slot
from trainer_client.engine.states import SentBy, State


def successor(engine: EngineByHand) -> EngineByHand:
    """A process that is started after this one is gone; it has the same servers."""
    return EngineByHand(
        engine.rewards,
        is_shared=engine.is_shared,
        client_id="successor",
        stored=engine.stored,
        outcomes=engine.outcomes,
        now=engine.now,
    )


def test_a_resumed_sample_is_awaited_by_the_message_that_the_earlier_process_sent(single):
    ticket = single.ticket(in_flight(single))
    after = successor(single)
    (slot,) = after.resume(ticket)
    after.run()
    assert after.delivery(slot).sent_by is SentBy.EARLIER_PROCESS
    assert not after.published
    after.answer(slot, 0.75)
    assert slot.outcome_for("PickScore").reward == 0.75
    after.run()
    assert not [name for name in after.stored if "request" in name]


def test_a_sample_that_was_not_sent_when_its_ticket_was_pickled_is_failed(single):
    slot = single.submit(1)
    single.run(but=[do.Publish, do.Store])
    (resumed,) = successor(single).resume(single.ticket(slot))
    assert "ended before it was sent" in resumed.outcome_for("PickScore").failure.message


def test_what_was_answered_when_its_ticket_was_pickled_is_asked_for_once_more(single):
    slot = in_flight(single)
    single.answer(slot, 0.75)
    after = successor(single)
    (resumed,) = after.resume(single.ticket(slot))
    after.wait(RECONCILE_S)
    assert resumed.outcome_for("PickScore").reward == 0.75


def test_a_lost_message_of_an_earlier_process_goes_again_as_it_was_while_its_request_is_there(single):
    slot = in_flight(single)
    ticket = single.ticket(slot)
    after = successor(single)
    (resumed,) = after.resume(ticket)
    after.run()
    after.wait(RECONCILE_S)
    after.wait(RECONCILE_S)
    assert after.published_again == [single.delivery(slot).request]
    assert after.state_of(resumed) is State.IN_FLIGHT


def test_a_lost_message_of_an_earlier_process_is_sent_once_after_the_payload_store_was_away_for_long(single):
    after = successor(single)
    after.resume(single.ticket(in_flight(single)))
    after.run()
    for _ in range(1000):
        after.wait(RECONCILE_S, but=[do.CheckRequest])
    assert len(after.asked(do.CheckRequest)) == 1
    after.run()
    assert len(after.published_again) == 1
    for _ in range(50):
        after.wait(RECONCILE_S)
    assert len(after.published_again) > 1, "it may be lost once more"


def test_a_lost_message_of_an_earlier_process_whose_request_is_gone_fails_its_samples(single):
    ticket = single.ticket(in_flight(single))
    single.stored.clear()
    after = successor(single)
    (slot,) = after.resume(ticket)
    after.run()
    after.wait(RECONCILE_S)
    after.wait(RECONCILE_S)
    assert "left the payload store" in slot.outcome_for("PickScore").failure.message


def resumed_with_media(engine: EngineByHand) -> tuple[EngineByHand, Slot, Payload]:
    """A successor that has resumed a sample in flight, the sample, and the media of it that the request names."""
    before = in_flight(engine)
    (payload,) = engine.awaited(before).payloads
    after = successor(engine)
    (slot,) = after.resume(engine.ticket(before))
    after.named = [(after.awaited(slot).address, payload.name, payload.digest)]
    return after, slot, payload


def test_the_payloads_of_an_earlier_process_live_on_until_the_client_is_closed(single):
    after, slot, payload = resumed_with_media(single)
    after.run()
    assert payload.name in after.state.core.payloads.names_in_use()
    after.answer(slot)
    after.run()
    assert payload.name in after.stored
    assert payload.name not in after.state.core.payloads.names_in_use(), "it is not renewed any more"
    after.assert_nothing_is_left()


def test_what_two_tickets_have_is_there_for_the_second_after_the_first_is_answered(engine):
    slots = [engine.submit(1, step=0), engine.submit(1, step=1)]
    engine.run()
    engine.wait(LINGER_S)
    (payload,) = engine.awaited(slots[0]).payloads
    tickets = [engine.ticket(slot) for slot in slots]
    after = successor(engine)
    for ticket in tickets:
        (slot,) = after.resume(ticket)
        after.named = [(after.awaited(slot).address, payload.name, payload.digest)]
        after.run()
        assert payload.name in after.stored
        after.answer(slot)
        after.run()
    after.assert_nothing_is_left()


def test_the_payloads_of_an_earlier_process_make_room_for_new_ones(single):
    after, slot, payload = resumed_with_media(single)
    after.answer(slot)
    after.run()
    after.state.intake._room._max_bytes = after.store_bytes = 15
    after.submit(2)
    after.wait(1.0)
    assert payload.name not in after.stored


def test_the_payloads_of_an_earlier_process_are_freed_also_if_the_answer_comes_before_they_are_known(single):
    after, slot, _ = resumed_with_media(single)
    after.answer(slot)
    after.assert_nothing_is_left()


def test_what_is_awaited_here_already_is_shared_with_a_resumed_sample(single):
    ticket = single.ticket(in_flight(single))
    after = successor(single)
    own = in_flight(after)
    (resumed,) = after.resume(ticket)
    assert after.awaited(own) is after.awaited(resumed)
    assert after.delivery(own).sent_by is SentBy.US
    after.answer(own)
    assert resumed.is_done


def test_media_that_are_gone_with_their_process_fail_an_equal_sample_of_this_one_until_it_is_submitted_again(single):
    before = in_flight(single)
    single.stored.clear()
    after = successor(single)
    after.resume(single.ticket(before))
    own = after.submit(1)
    after.run()
    after.wait(RECONCILE_S)
    after.wait(RECONCILE_S)
    assert "its media left the payload store" in own.outcome_for(own.rewards[0].name).failure.message
    again = after.submit(1)
    after.run()
    assert after.state_of(again) in (State.LINGERING, State.IN_FLIGHT)


def test_two_tickets_of_one_message_are_awaited_by_one_delivery(engine):
    slots = [engine.submit(1), engine.submit(2)]
    engine.run()
    tickets = [engine.ticket(slot) for slot in slots]
    after = successor(engine)
    resumed = [after.resume(ticket)[0] for ticket in tickets]
    assert len(after.state.core.deliveries) == 1
    assert after.delivery(resumed[0]) is after.delivery(resumed[1])


def test_a_second_ticket_of_a_message_that_waits_for_a_permit_waits_with_it(engine):
    slots = [engine.submit(1), engine.submit(2)]
    engine.run()
    tickets = [engine.ticket(slot) for slot in slots]
    after = successor(engine)
    (first,) = after.resume(tickets[0])
    after.run()
    after.note(first, "busy")
    (second,) = after.resume(tickets[1])
    assert in_states([first, second]) == [State.THROTTLED] * 2


def test_a_group_that_another_rank_sent_for_an_earlier_process_is_only_watched(shared):
    before = another_rank_joins(shared)
    seal(shared)
    shared.other_ranks_number = 7
    shared.wait(1.0)
    after = successor(shared)
    (slot,) = after.resume(shared.ticket(before))
    for _ in range(5):
        after.wait(RECONCILE_S)
    assert after.delivery(slot).sent_by is SentBy.OTHER_RANK_EARLIER
    assert not after.published
    assert not after.published_again


def resumed_group_that_was_not_sent(shared: EngineByHand) -> tuple[EngineByHand, Slot]:
    """A group over ranks whose message this rank's earlier process listed in its ticket, and did not send."""
    before = another_rank_joins(shared)
    seal(shared)
    shared.wait(1.0)
    shared.wait(LINGER_S)
    ticket = shared.ticket(before)
    shared.stored.clear()
    after = successor(shared)
    (slot,) = after.resume(ticket)
    after.run()
    return after, slot


def wait_for_looks(engine: EngineByHand, num: int) -> None:
    """Let it look so often whether the request of the earlier process is there."""
    for _ in range(1000):
        if sum(isinstance(action, do.CheckRequest) for action in engine.done) >= num:
            return
        engine.wait(RECONCILE_S)
    raise AssertionError(f"it has not looked {num} times")


def test_a_group_that_an_earlier_process_may_not_have_sent_is_left_to_another_rank_with_members_in_it(shared):
    after, slot = resumed_group_that_was_not_sent(shared)
    after.is_shared_with_others = True
    wait_for_looks(after, 1)
    assert after.delivery(slot).sent_by is SentBy.OTHER_RANK_EARLIER
    after.answer(slot)
    assert slot.is_done


def test_a_group_that_an_earlier_process_may_not_have_sent_fails_if_all_its_members_were_of_that_process(shared):
    after, slot = resumed_group_that_was_not_sent(shared)
    after.is_shared_with_others = False
    wait_for_looks(after, 1)
    assert "left the payload store" in slot.outcome_for(RANKED.name).failure.message


def test_a_group_of_which_an_emptied_redis_says_nothing_fails_if_nobody_has_put_members_back_by_the_next_look(shared):
    after, slot = resumed_group_that_was_not_sent(shared)
    after.is_shared_with_others = None
    wait_for_looks(after, 1)
    assert not slot.is_done
    assert after.delivery(slot).sent_by is SentBy.EARLIER_PROCESS
    wait_for_looks(after, 2)
    assert "left the payload store" in slot.outcome_for(RANKED.name).failure.message


def test_a_group_whose_other_ranks_have_put_their_members_back_into_an_emptied_redis_is_left_to_them(shared):
    after, slot = resumed_group_that_was_not_sent(shared)
    after.is_shared_with_others = None
    wait_for_looks(after, 1)
    after.is_shared_with_others = True
    wait_for_looks(after, 2)
    assert after.delivery(slot).sent_by is SentBy.OTHER_RANK_EARLIER
