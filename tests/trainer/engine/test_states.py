"""The table of transitions: each is made by a scenario, and no other is allowed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tasks.groups import Registered
from tasks.messages import Note, Outcome
from tests.trainer.engine.by_hand import (
    HELD_RANKED,
    OUR_STORE,
    RANKED,
    RECONCILE_S,
    SINGLE,
    EngineByHand,
    seal,
)
from tests.trainer.engine.situations import (
    Recorded,
    Transition,
    group_in_flight,
    group_looking_up,
    held,
    in_flight,
    lingering,
    looking_up,
    publishing,
    restoring,
    storing,
    throttled,
    with_group,
)
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.groups import OVERDUE_S
from trainer_client.engine.states import ENDED, IN_DELIVERY, TRANSITIONS, State

S = State


# --- the scenarios --------------------------------------------------------------------------------

SCENARIOS: dict[Transition, Callable[[], EngineByHand]] = {}


def makes(*transition):
    def remember(scenario):
        assert transition not in SCENARIOS
        SCENARIOS[transition] = scenario
        return scenario

    return remember


@makes(None, S.LOOKING_UP)
def a_sample_is_encoded():
    return looking_up()[0]


@makes(None, S.IN_FLIGHT)
def a_ticket_is_resumed():
    before, slot = in_flight()
    after = Recorded(*SINGLE)
    after.resume(before.ticket(slot))
    return after


@makes(None, S.ANSWERED)
def a_member_is_refused_by_its_group():
    engine = Recorded(RANKED, is_shared=True)
    engine.registered = Registered("full", "", 2, False)
    engine.submit(1, "g", size=2)
    engine.run()
    return engine


@makes(S.LOOKING_UP, S.STORING)
def no_outcome_is_there():
    return storing()[0]


@makes(S.LOOKING_UP, S.HELD)
def no_outcome_of_a_group_is_there_that_waits_for_collect():
    engine, _ = group_looking_up(HELD_RANKED)
    engine.run()
    return engine


@makes(S.LOOKING_UP, S.LINGERING)
def no_outcome_of_a_group_is_there():
    engine, _ = group_looking_up()
    engine.run(but=[do.Publish])
    return engine


@makes(S.LOOKING_UP, S.IN_FLIGHT)
def another_rank_has_sent_the_group():
    return group_of_two_ranks()[0]


def group_of_two_ranks():
    """The other rank has sent it."""
    engine = Recorded(RANKED, is_shared=True)
    slot = engine.submit(1, "g", size=2)
    engine.run()
    seal(engine)
    engine.other_ranks_number = 7
    engine.wait(1.0)
    return engine, slot


@makes(S.LOOKING_UP, S.ANSWERED)
def the_outcome_is_there():
    engine, slot = looking_up()
    engine.outcomes[engine.awaited(slot).address] = Outcome(reward=1.0)
    engine.run()
    return engine


@makes(S.LOOKING_UP, S.GIVEN_UP)
def a_sample_is_given_up_while_it_is_looked_up():
    engine, slot = looking_up()
    engine.give_up(slot)
    return engine


@makes(S.STORING, S.WITH_GROUP)
def the_media_of_a_member_are_stored():
    return with_group()[0]


@makes(S.STORING, S.HELD)
def the_media_are_stored_of_what_waits_for_collect():
    return held()[0]


@makes(S.STORING, S.LINGERING)
def the_media_are_stored():
    return lingering()[0]


@makes(S.STORING, S.ANSWERED)
def an_answer_comes_while_media_are_stored():
    engine, slot = storing()
    engine.answer(slot)
    return engine


@makes(S.STORING, S.GIVEN_UP)
def a_sample_is_given_up_while_its_media_are_stored():
    engine, slot = storing()
    engine.give_up(slot)
    return engine


@makes(S.WITH_GROUP, S.PUBLISHING)
def the_group_is_sent():
    return group_in_flight()[0]


@makes(S.WITH_GROUP, S.LINGERING)
def the_group_does_not_get_full_while_somebody_waits():
    engine, _ = with_group()
    engine.collect(0)
    engine.wait(OVERDUE_S, but=[do.Publish])
    return engine


@makes(S.WITH_GROUP, S.ANSWERED)
def an_answer_comes_while_the_group_fills():
    engine, slot = with_group()
    engine.answer(slot)
    return engine


@makes(S.WITH_GROUP, S.GIVEN_UP)
def a_member_is_given_up():
    engine, slot = with_group()
    engine.give_up(slot)
    return engine


@makes(S.HELD, S.PUBLISHING)
def somebody_collects():
    engine, _ = held()
    engine.collect(0)
    return engine


@makes(S.HELD, S.ANSWERED)
def an_answer_comes_before_somebody_collects():
    engine, slot = held()
    engine.answer(slot)
    return engine


@makes(S.HELD, S.GIVEN_UP)
def what_is_held_is_given_up():
    engine, slot = held()
    engine.give_up(slot)
    return engine


@makes(S.LINGERING, S.PUBLISHING)
def the_chunk_is_full():
    engine, _ = lingering()
    engine.submit(2)
    engine.run(but=[do.Publish])
    return engine


@makes(S.LINGERING, S.ANSWERED)
def an_answer_comes_before_the_chunk_is_full():
    engine, slot = lingering()
    engine.answer(slot)
    return engine


@makes(S.LINGERING, S.GIVEN_UP)
def what_lingers_is_given_up():
    engine, slot = lingering()
    engine.give_up(slot)
    return engine


@makes(S.PUBLISHING, S.IN_FLIGHT)
def the_message_is_in_its_queue():
    return in_flight()[0]


@makes(S.PUBLISHING, S.ANSWERED)
def an_answer_comes_before_the_publisher_has_heard():
    engine, slot = publishing()
    engine.answer(slot)
    return engine


@makes(S.PUBLISHING, S.GIVEN_UP)
def a_sample_is_given_up_while_its_message_goes():
    engine, slot = publishing()
    engine.give_up(slot)
    return engine


@makes(S.IN_FLIGHT, S.THROTTLED)
def a_judge_has_no_permit():
    return throttled()[0]


@makes(S.IN_FLIGHT, S.RESTORING)
def a_message_is_lost():
    return restoring()[0]


@makes(S.IN_FLIGHT, S.WITH_GROUP)
def a_group_is_lost_with_what_it_carries():
    engine, slot = group_in_flight()
    engine.note(slot, "gone", of=RANKED)
    return engine


@makes(S.IN_FLIGHT, S.ANSWERED)
def a_worker_answers():
    engine, slot = in_flight()
    engine.answer(slot)
    return engine


@makes(S.IN_FLIGHT, S.GIVEN_UP)
def what_is_in_flight_is_given_up():
    engine, slot = in_flight()
    engine.give_up(slot)
    return engine


@makes(S.THROTTLED, S.IN_FLIGHT)
def a_permit_may_be_free():
    engine, _ = throttled()
    engine.wait(0.5)
    return engine


@makes(S.THROTTLED, S.RESTORING)
def media_are_gone_of_what_waits_for_a_permit():
    engine, slot = throttled()
    engine.note(slot, "gone")
    return engine


@makes(S.THROTTLED, S.WITH_GROUP)
def media_are_gone_of_a_group_that_waits_for_a_permit():
    engine, slot = group_in_flight()
    engine.note(slot, "busy", of=RANKED)
    engine.note(slot, "gone", of=RANKED)
    return engine


@makes(S.THROTTLED, S.ANSWERED)
def an_answer_comes_of_what_waits_for_a_permit():
    engine, slot = throttled()
    engine.answer(slot)
    return engine


@makes(S.THROTTLED, S.GIVEN_UP)
def what_waits_for_a_permit_is_given_up():
    engine, slot = throttled()
    engine.give_up(slot)
    return engine


@makes(S.RESTORING, S.HELD)
def media_are_restored_of_what_waits_for_collect():
    engine, slot = held()
    engine.collect(0)
    engine.run()
    engine.note(slot, "gone")
    engine.run()
    return engine


@makes(S.RESTORING, S.LINGERING)
def media_are_restored():
    engine, _ = restoring()
    engine.run()
    return engine


@makes(S.RESTORING, S.ANSWERED)
def an_answer_comes_while_media_are_restored():
    engine, slot = restoring()
    engine.answer(slot)
    return engine


@makes(S.RESTORING, S.GIVEN_UP)
def a_sample_is_given_up_while_its_media_are_restored():
    engine, slot = restoring()
    engine.give_up(slot)
    return engine


# --- the table ------------------------------------------------------------------------------------

IN_TABLE = [(before, after) for before, some in TRANSITIONS.items() for after in State if after in some]
NOT_IN_TABLE = [pair for pair in itertools.product(TRANSITIONS, State) if pair not in IN_TABLE]


def name_of(transition: Transition) -> str:
    before, after = transition
    return f"{before.value if before else 'new'} -> {after.value}"


def test_the_table_has_every_state():
    assert set(TRANSITIONS) == {None, *State}
    assert all(not TRANSITIONS[state] for state in ENDED)


@pytest.mark.parametrize("transition", IN_TABLE, ids=name_of)
def test_each_transition_of_the_table_is_made_by_a_scenario(transition):
    engine = SCENARIOS[transition]()
    assert transition in engine.all_transitions()


@pytest.mark.parametrize("transition", IN_TABLE, ids=name_of)
def test_after_each_transition_a_sample_still_ends_with_an_answer_or_leaves_nothing(transition):
    engine = SCENARIOS[transition]()
    core = engine.state.core
    for _ in range(4):
        engine.collect(0)
        engine.wait(RECONCILE_S)
        for awaited in list(core.awaited.values()):
            num_members = len(awaited.group.members) if awaited.group is not None else 0
            members = (Outcome(reward=0.5),) * num_members
            engine.put_outcome(awaited.address, Outcome(members=members) if members else Outcome(reward=0.5))
    assert not core.awaited
    engine.give_up(*engine.slots)
    engine.assert_nothing_is_left()


@pytest.mark.parametrize("transition", NOT_IN_TABLE, ids=name_of)
def test_no_other_transition_is_allowed(transition):
    before, after = transition
    engine, slot = in_flight()
    awaited = engine.awaited(slot)
    awaited.state = before
    with pytest.raises(AssertionError):
        engine.state.core.move(awaited, after)


def test_the_states_of_a_delivery_are_those_in_which_it_has_its_outcomes():
    assert {S.PUBLISHING, S.IN_FLIGHT, S.THROTTLED} == IN_DELIVERY


def test_a_note_of_a_message_that_is_answered_meanwhile_changes_nothing():
    engine, slot = in_flight()
    delivery = engine.delivery(slot)
    engine.answer(slot)
    note = Note(reason="busy", worker="worker", detail="no permit")
    engine.apply(ev.NotesRead([(delivery, delivery.request, note)], OUR_STORE))
    assert engine.state_of(slot) is S.ANSWERED
    assert len(engine.state.throttle) == 0
