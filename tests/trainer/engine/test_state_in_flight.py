"""From a message to its answer: what is lost, throttled, polled. Scenarios through `EngineState.apply`."""

from __future__ import annotations

import itertools
from collections import Counter

from tasks.messages import WIRE_VERSION, Heartbeat, Note, Outcome
from tests.trainer.engine.by_hand import (
    IO,
    JUDGE,
    OTHER,
    OUR_STORE,
    POINT,
    RECONCILE_S,
    SINGLE,
    EngineByHand,
    in_flight,
    rewards_of,
)
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.chunk_accumulator import LINGER_S
from trainer_client.engine.losses import MAX_PAUSE_S
from trainer_client.engine.polling import NOTES_EVERY_S, SLOWEST_S
from trainer_client.engine.states import State

# --- in flight ------------------------------------------------------------------------------------


def test_a_lost_message_is_sent_again_only_after_it_was_missed_twice(single):
    slot = in_flight(single)
    single.wait(RECONCILE_S)
    assert len(single.published) == 1
    single.wait(RECONCILE_S)
    assert [delivery.awaited_when_sent for delivery in single.published] == [(single.awaited(slot),)] * 2
    single.answer(slot)
    single.assert_nothing_is_left()


def test_a_message_that_was_claimed_and_is_no_more_is_sent_again_at_once(single):
    slot = in_flight(single)
    single.claimed.add(single.awaited(slot).address)
    single.wait(RECONCILE_S)
    assert len(single.published) == 1
    single.claimed.clear()
    single.wait(RECONCILE_S)
    assert len(single.published) == 2


def test_what_is_not_claimed_is_not_lost_at_once_where_another_client_has_claimed_what_equals_the_rest():
    engine = EngineByHand((JUDGE.model_copy(update={"batch_size": 2}),))
    slots = [engine.submit(1), engine.submit(2)]
    engine.run()
    engine.claimed.add(engine.awaited(slots[0]).address)
    engine.wait(RECONCILE_S)
    assert len(engine.published) == 1, "its message may be between the queue and the claims"
    engine.wait(RECONCILE_S)
    engine.collect(0)
    engine.run()
    assert len(engine.published) == 2


def test_a_message_that_went_again_while_it_was_looked_after_is_not_lost(single):
    slot = in_flight(single)
    single.claimed.add(single.awaited(slot).address)
    single.wait(RECONCILE_S)
    single.claimed.clear()
    single.wait(RECONCILE_S, but=[do.InspectDeliveries])
    single.note(slot, "stale")
    single.run(but=[do.InspectDeliveries])
    single.run()
    assert single.state_of(slot) is State.IN_FLIGHT
    assert len(single.published) == 1


def test_a_message_in_its_queue_is_not_lost_however_long_it_waits(single):
    slot = in_flight(single)
    single.queued.add(single.delivery(slot).request)
    for _ in range(20):
        single.wait(RECONCILE_S)
    assert len(single.published) == 1


def test_a_message_is_not_lost_while_a_worker_loads_its_model(single):
    slot = in_flight(single)
    heartbeat = Heartbeat(
        wire=WIRE_VERSION, node="gpu@host", queues=("gpu",), host="host", pid=1, store="s", state="loading"
    )
    single.workers = [heartbeat.model_copy(update={"loading": (POINT.fingerprint,)})]
    for _ in range(5):
        single.wait(RECONCILE_S)
    assert len(single.published) == 1
    single.workers = []
    single.wait(RECONCILE_S)
    single.wait(RECONCILE_S)
    assert len(single.published) == 2
    assert single.state_of(slot) is State.IN_FLIGHT


def test_an_answer_that_is_found_while_a_message_is_looked_after_ends_the_wait(single):
    slot = in_flight(single)
    single.outcomes[single.awaited(slot).address] = Outcome(reward=1.0)
    single.queued.add("the numbers say that it is still queued")
    single.wait(RECONCILE_S)
    assert slot.is_done
    single.assert_nothing_is_left()


def test_the_pauses_of_a_message_that_is_lost_again_and_again_grow_up_to_a_bound(single):
    in_flight(single)
    sent_at = [0.0]
    for _ in range(300):
        single.wait(0.5)
        if len(single.published) > len(sent_at):
            sent_at.append(single.now)
    pauses = [round(after - before) for before, after in itertools.pairwise(sent_at)]
    assert pauses[:4] == [4, 4, 8, 16]
    assert set(pauses[4:]) == {MAX_PAUSE_S}


def test_only_what_is_lost_of_a_chunk_is_sent_again(engine):
    lost, kept = engine.submit(1), engine.submit(2)
    engine.run()
    engine.claimed.add(engine.awaited(kept).address)
    engine.wait(RECONCILE_S)
    engine.wait(RECONCILE_S)
    engine.wait(LINGER_S)
    assert engine.published[-1].awaited_when_sent == (engine.awaited(lost),)
    assert engine.delivery(kept) is not engine.delivery(lost)


def test_media_that_are_gone_are_stored_again_and_the_message_is_sent_again(single):
    slot = in_flight(single)
    (payload,) = single.awaited(slot).payloads
    single.stored.discard(payload.name)
    single.note(slot, "gone")
    (restore,) = single.asked(do.Restore)
    assert [lost.digest_of for lost in restore.lost] == [{payload.name: payload.digest}]
    single.run()
    assert single.state_of(slot) is State.IN_FLIGHT
    assert payload.name in single.stored
    assert len(single.published) == 2


def test_media_that_cannot_be_stored_again_end_the_sample_with_the_reason(single):
    slot = in_flight(single)
    single.fail_to_restore(slot, "its media were changed")
    single.note(slot, "gone")
    single.run()
    assert slot.outcome_for("PickScore").failure.message == "its media were changed"
    single.assert_nothing_is_left()


def test_a_worker_that_uses_another_store_is_only_said(single):
    slot = in_flight(single)
    single.note(slot, "store", store="another store")
    assert not single.asked(do.Restore)
    assert single.state_of(slot) is State.IN_FLIGHT
    assert single.warned == ["worker worker on queue gpu: detail"]


def test_media_are_gone_where_a_worker_has_our_store_but_not_the_identity_that_the_message_named(single):
    slot = in_flight(single)
    single.note(slot, "store", store=OUR_STORE)
    assert single.asked(do.Restore)
    assert single.warned == []


def test_what_a_worker_could_not_read_counts_as_missed_and_is_looked_after_after_its_pause(single):
    slot = in_flight(single)
    single.note(slot, "wire")
    delivery = single.delivery(slot)
    assert delivery.is_missed
    assert delivery.look_at == single.now + delivery.pause_s
    single.wait(RECONCILE_S)
    assert len(single.published) == 2


def test_the_message_of_a_worker_that_ended_for_new_code_goes_again_as_it_was(single):
    slot = in_flight(single)
    single.note(slot, "stale", detail="its code is old")
    single.run()
    assert single.published_again == [single.delivery(slot).request]
    assert single.state.core.ended_workers["gpu"].detail == "its code is old"
    assert single.warned == ["worker ended: its code is old; its samples are sent again"]


def test_what_a_judge_has_no_permit_for_goes_again_and_is_looked_after_from_then_on():
    engine = EngineByHand((JUDGE.model_copy(update={"batch_size": 1}),))
    slot = in_flight(engine)
    engine.note(slot, "busy")
    assert engine.state_of(slot) is State.THROTTLED
    engine.wait(0.5)
    assert engine.published_again == [engine.delivery(slot).request]
    assert engine.state_of(slot) is State.IN_FLIGHT
    assert engine.delivery(slot).look_at == engine.now + RECONCILE_S


def test_what_waits_for_a_permit_is_not_looked_after():
    engine = EngineByHand((JUDGE.model_copy(update={"batch_size": 1}),))
    sent, *waiting = [in_flight(engine, number) for number in range(8)]
    for slot in waiting:
        engine.note(slot, "busy")
    engine.now += RECONCILE_S
    engine.apply(ev.Tick())
    (inspect,) = engine.asked(do.InspectDeliveries)
    assert [suspicion.delivery for suspicion in inspect.suspicions] == [engine.delivery(sent)]


def test_a_group_whose_parts_wait_for_permits_is_looked_after_when_all_are_sent():
    (spec,) = rewards_of({"reward_model": "PickScore_Rank", "batch_size": 2})
    engine = EngineByHand((spec,))
    slots = [engine.submit(number, "g", size=6) for number in range(6)]
    engine.run()
    delivery = engine.delivery(slots[0])
    notes = [(delivery, part, Note(reason="busy", worker="w", detail="d")) for part in delivery.part_requests]
    engine.apply(ev.NotesRead(notes, OUR_STORE))
    engine.wait(0.5)
    assert engine.published_again == list(delivery.part_requests[:2])
    assert delivery.state is State.THROTTLED
    engine.wait(0.5)
    assert engine.published_again == list(delivery.part_requests)
    assert delivery.state is State.IN_FLIGHT
    assert delivery.is_missed, "the answers of its parts are not awaited one by one"


def test_a_permit_that_an_answer_gives_back_lets_the_next_message_go_at_once():
    engine = EngineByHand((JUDGE.model_copy(update={"batch_size": 1}),))
    waits, is_answered = in_flight(engine, 1), in_flight(engine, 2)
    engine.note(waits, "busy")
    engine.answer(is_answered)
    engine.run()
    assert engine.published_again == [engine.delivery(waits).request]


def test_a_message_of_which_nothing_is_awaited_any_more_waits_for_no_permit():
    engine = EngineByHand((JUDGE.model_copy(update={"batch_size": 2}),))
    lost, waits = engine.submit(1), engine.submit(2)
    engine.run()
    engine.claimed.add(engine.awaited(waits).address)
    engine.wait(RECONCILE_S)
    engine.wait(RECONCILE_S, but=[do.Restore])
    assert engine.state_of(lost) is State.RESTORING
    engine.note(waits, "busy")
    engine.give_up(waits)
    engine.run()
    engine.collect(0)
    engine.run()
    assert engine.state_of(lost) is State.IN_FLIGHT
    assert len(engine.state.throttle) == 0


def test_payloads_and_requests_that_are_needed_are_renewed(single):
    slot = in_flight(single)
    single.queued.add("keep it")
    single.now += 60.0
    single.apply(ev.Tick())
    (renew,) = single.asked(do.Renew)
    (payload,) = single.awaited(slot).payloads
    assert sorted(renew.names) == sorted([payload.name, single.delivery(slot).request])


def test_the_payload_of_one_sample_is_freed_when_its_last_reward_is_answered():
    engine = EngineByHand((*SINGLE, OTHER.model_copy(update={"batch_size": 1})))
    slot = engine.submit(1)
    engine.run()
    engine.answer(slot, of=SINGLE[0])
    engine.run()
    (payload,) = engine.state.core.payloads
    assert payload.name in engine.stored
    engine.answer(slot, of=OTHER)
    engine.assert_nothing_is_left()


def test_what_is_stored_again_for_an_outcome_that_is_answered_meanwhile_is_freed(single):
    slot = in_flight(single)
    single.note(slot, "gone")
    single.answer(slot)
    single.run(but=[do.Restore])
    single.assert_nothing_is_left()


# --- polling --------------------------------------------------------------------------------------


def test_outcomes_are_asked_for_once_their_message_has_left_its_queue(single):
    slot = in_flight(single)
    request = single.delivery(slot).request
    single.queued.add(request)
    single.collect(0)
    single.run()
    num_before = sum(isinstance(action, do.LookUp) for action in single.done)
    single.wait(0.2)
    assert sum(isinstance(action, do.LookUp) for action in single.done) == num_before
    single.queued.clear()
    single.outcomes[single.awaited(slot).address] = Outcome(reward=1.0)
    single.wait(0.2)
    assert slot.is_done


def test_what_is_still_queued_is_asked_for_now_and_then_for_another_client_may_have_had_it_scored(single):
    slot = in_flight(single)
    single.queued.add(single.delivery(slot).request)
    single.outcomes[single.awaited(slot).address] = Outcome(reward=1.0)
    for _ in range(4):
        single.wait(RECONCILE_S)
        assert not slot.is_done
    single.wait(RECONCILE_S)
    assert slot.is_done


def test_notes_are_read_of_what_has_left_its_queue(single):
    slot = in_flight(single)
    single.queued.add(single.delivery(slot).request)
    single.collect(0)
    single.run()
    single.wait(NOTES_EVERY_S)
    assert not [action for action in single.done if isinstance(action, do.ReadNotes)]
    single.queued.clear()
    single.wait(SLOWEST_S)
    single.wait(NOTES_EVERY_S, but=[do.ReadNotes])
    (read,) = single.asked(do.ReadNotes)
    assert read.requests == [(single.delivery(slot), single.delivery(slot).request)]


def test_every_outcome_that_arrives_is_announced(single):
    slot = in_flight(single)
    single.answer(slot, 0.75)
    single.run()
    announced = [action for action in single.done if isinstance(action, do.Announce)]
    assert [(one.spec, one.outcome.reward) for one in announced] == [(SINGLE[0], 0.75)]


def test_calls_do_not_pile_up_while_redis_is_away_for_long(single):
    slot = in_flight(single)
    for _ in range(1000):
        single.wait(RECONCILE_S, but=IO)
    kinds = Counter(type(action) for action in single.pending)
    assert kinds[do.LookUp] == kinds[do.Renew] == 1
    assert set(kinds.values()) == {1}, kinds
    single.outcomes[single.awaited(slot).address] = Outcome(reward=1.0)
    single.run()
    assert slot.is_done
