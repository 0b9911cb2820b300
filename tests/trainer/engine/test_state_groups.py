"""Groups of one rank and of several: scenarios through `EngineState.apply`."""

from __future__ import annotations

from collections import Counter

import pytest

from tasks.groups import Registered
from tasks.messages import Outcome
from tests.trainer.engine.by_hand import (
    BOTH,
    FAILURE,
    HELD,
    HELD_RANKED,
    IO,
    OPEN,
    POINT,
    RANKED,
    RECONCILE_S,
    EngineByHand,
    another_rank_joins,
    in_states,
    rewards_of,
    seal,
)
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.chunk_accumulator import LINGER_S
from trainer_client.engine.groups import OVERDUE_S
from trainer_client.engine.states import SentBy, State

# --- groups of one rank ---------------------------------------------------------------------------


def test_a_group_is_sealed_when_it_is_full_and_carries_the_outcomes_of_its_members(ranked):
    first = ranked.submit(1, "g", size=2)
    ranked.run()
    assert RANKED.name not in first.awaited
    second = ranked.submit(2, "g", size=2)
    ranked.wait(LINGER_S)
    (delivery,) = ranked.published
    group = ranked.awaited(first, RANKED)
    assert delivery.awaited_when_sent == (group, ranked.awaited(first), ranked.awaited(second))
    assert [first.member_index, second.member_index] == [{RANKED.name: 0}, {RANKED.name: 1}]


def test_each_member_of_a_group_is_told_its_own_outcome(ranked):
    slots = [ranked.submit(number, "g", size=2) for number in (1, 2)]
    ranked.wait(LINGER_S)
    members = (Outcome(reward=0.0), Outcome(failure=FAILURE))
    ranked.put_outcome(ranked.awaited(slots[0], RANKED).address, Outcome(members=members))
    assert [slot.outcome_for(RANKED.name) for slot in slots] == list(members)
    assert not slots[0].has_failed_for(RANKED.name)
    assert slots[1].has_failed_for(RANKED.name)


def test_a_group_of_unknown_size_is_as_large_as_it_is_when_its_step_is_collected(ranked):
    slots = [ranked.submit(number, "g") for number in range(3)]
    other_step = ranked.submit(9, "g", step=1)
    ranked.wait(LINGER_S)
    assert not ranked.published
    ranked.collect(0)
    ranked.run()
    assert len(ranked.awaited(slots[0], RANKED).group.members) == 3
    assert RANKED.name not in other_step.awaited


def test_a_group_of_unknown_size_waits_for_what_is_still_encoded(ranked):
    ranked.submit(1, "g")
    ranked.run()
    ranked.submit(2, "g")
    ranked.collect(0)
    assert len(ranked.state.groups) == 1
    ranked.run()
    assert len(ranked.state.groups) == 0


def test_outcomes_that_wait_for_a_group_go_alone_once_it_is_overdue_and_somebody_waits(ranked):
    slot = ranked.submit(1, "g", size=2)
    ranked.run()
    ranked.wait(5 * OVERDUE_S)
    assert ranked.state_of(slot) is State.WITH_GROUP
    ranked.collect(0)
    ranked.run()
    assert ranked.state_of(slot) is State.IN_FLIGHT
    (delivery,) = ranked.published
    assert delivery.spec is POINT


def test_a_member_that_cannot_be_encoded_is_in_its_group_and_the_others_are_ranked_without_it(ranked):
    fit = ranked.submit(1, "g", size=2)
    unfit = ranked.submit(2, "g", size=2, invalid=True)
    ranked.wait(LINGER_S)
    members = ranked.awaited(fit, RANKED).group.members
    assert [member.failure is None for member in members] == [True, False]
    assert unfit.is_done
    assert unfit.outcome_for(RANKED.name).failure.kind == "invalid"


def test_a_group_of_which_no_member_can_be_encoded_is_not_sent(ranked):
    slots = [ranked.submit(number, "g", size=2, invalid=True) for number in (1, 2)]
    ranked.wait(LINGER_S)
    assert all(slot.is_done for slot in slots)
    assert not ranked.published
    ranked.give_up(*slots)
    ranked.assert_nothing_is_left()


def test_the_outcome_of_a_group_that_is_there_is_taken(ranked):
    slots = [ranked.submit(number, "g", size=2) for number in (1, 2)]
    ranked.run(but=[do.LookUpGroup])
    members = Outcome(members=(Outcome(reward=0.0), Outcome(reward=1.0)))
    ranked.outcomes[ranked.awaited(slots[0], RANKED).address] = members
    ranked.run()
    ranked.wait(LINGER_S)
    assert [slot.outcome_for(RANKED.name).reward for slot in slots] == [0.0, 1.0]
    assert in_states(slots) == [State.IN_FLIGHT] * 2, "what it would have carried goes by itself"


def test_groups_of_equal_members_await_one_outcome_that_is_asked_for_once(ranked):
    slots = [ranked.submit(number, group, size=2) for group in ("g", "h") for number in (1, 2)]
    ranked.run()
    assert len({ranked.awaited(slot, RANKED) for slot in slots}) == 1
    assert len([action for action in ranked.done if isinstance(action, do.LookUpGroup)]) == 1
    ranked.wait(LINGER_S)
    assert in_states(slots) == [State.IN_FLIGHT] * 4


def test_a_group_carries_no_outcome_that_came_before_it_was_sent(ranked):
    answered, waits = (ranked.submit(number, "g", size=2) for number in (1, 2))
    ranked.run(but=[do.LookUpGroup])
    ranked.answer(answered, of=POINT)
    ranked.run()
    (delivery,) = ranked.published
    assert delivery.awaited_when_sent == (ranked.awaited(waits, RANKED), ranked.awaited(waits, POINT))


def test_a_group_that_is_given_up_leaves_what_it_carries_to_those_who_still_want_it():
    engine = EngineByHand(BOTH)
    members = [engine.submit(number, "g", size=2) for number in (1, 2)]
    engine.run(but=[do.LookUpGroup])
    engine.rewards = (POINT,)
    also_wanted = engine.submit(1, step=1)
    engine.run(but=[do.LookUpGroup])
    assert engine.state_of(also_wanted) is State.WITH_GROUP
    engine.give_up(*members)
    engine.wait(LINGER_S)
    assert engine.state_of(also_wanted) is State.IN_FLIGHT
    assert [delivery.spec for delivery in engine.published] == [POINT]


def test_parts_that_failed_before_are_tried_again_with_their_group(ranked):
    slots = [ranked.submit(number, "g", size=2) for number in (1, 2)]
    ranked.run(but=[do.LookUpGroup])
    ranked.outcomes[ranked.awaited(slots[1]).address] = Outcome(failure=FAILURE, attempt=4)
    ranked.run()
    assert [m.attempt for m in ranked.awaited(slots[0], RANKED).group.members] == [1, 5]


def test_a_group_larger_than_a_chunk_goes_in_parts_one_of_which_may_be_throttled():
    (spec,) = rewards_of({"reward_model": "PickScore_Rank", "batch_size": 2})
    engine = EngineByHand((spec,))
    slots = [engine.submit(number, "g", size=5) for number in range(5)]
    engine.wait(LINGER_S)
    (delivery,) = engine.published
    assert delivery.part_requests == tuple(f"{delivery.request}.{at}" for at in (0, 2, 4))
    engine.answer(slots[0])
    engine.assert_nothing_is_left()


def test_a_group_that_waits_for_collect_is_sent_with_its_step():
    engine = EngineByHand((HELD_RANKED,))
    slots = [engine.submit(number, "g", size=2) for number in (1, 2)]
    engine.wait(LINGER_S)
    assert in_states(slots) == [State.HELD] * 2
    engine.collect(0)
    engine.run()
    assert in_states(slots) == [State.IN_FLIGHT] * 2


def test_a_group_carries_no_outcome_that_waits_for_collect():
    engine = EngineByHand((HELD, RANKED))
    slots = [engine.submit(number, "g", size=2) for number in (1, 2)]
    engine.run()
    engine.wait(LINGER_S)
    assert in_states(slots, HELD) == [State.HELD] * 2
    assert in_states(slots, RANKED) == [State.IN_FLIGHT] * 2


def test_a_group_that_gets_no_further_member_ends_its_members_with_the_words(ranked):
    slot, late = ranked.submit(1, "g", size=3), ranked.submit(2, "g", size=3)
    ranked.run(but=[do.Encode])
    ranked.perform(ranked.asked(do.Encode)[0])
    ranked.run(but=[do.Encode])
    ranked.apply(ev.GroupsIncomplete("train", 0, {"g": "a member is missing"}))
    assert slot.outcome_for(RANKED.name).failure.message == "a member is missing"
    ranked.run()
    assert late.outcome_for(RANKED.name).failure.message == "a member is missing"
    assert slot.outcome_for(POINT.name) is None, "its own reward is still awaited"


# --- groups over ranks ----------------------------------------------------------------------------


def test_a_group_that_another_rank_completes_is_found_by_polling(shared):
    slot = another_rank_joins(shared)
    seal(shared)
    assert RANKED.name not in slot.awaited
    shared.wait(1.0)
    assert len(shared.awaited(slot).group.members) == 2
    assert slot.member_index == {RANKED.name: 0}


def test_a_group_that_another_rank_has_sent_is_watched_and_not_sent(shared):
    slot = another_rank_joins(shared)
    seal(shared)
    shared.other_ranks_number = 7
    shared.wait(1.0)
    delivery = shared.delivery(slot)
    assert (delivery.sent_by, delivery.number) == (SentBy.OTHER_RANK, 7)
    assert not shared.published
    shared.answer(slot)
    shared.wait(1.0)
    shared.give_up(slot)
    shared.assert_nothing_is_left()


def test_a_group_whose_other_rank_has_lost_its_message_is_sent_by_this_rank(shared):
    slot = another_rank_joins(shared)
    seal(shared)
    shared.other_ranks_number = 7
    shared.wait(1.0)
    shared.wait(RECONCILE_S)
    shared.wait(RECONCILE_S)
    shared.wait(LINGER_S)
    assert shared.delivery(slot).sent_by is SentBy.US
    assert len(shared.published) == 1


@pytest.mark.parametrize(
    ("state", "words"), [("full", "one more"), ("size", "another rank said group_size=3"), ("scored", "another sample")]
)
def test_a_member_that_its_group_does_not_take_is_told_why(shared, state, words):
    shared.registered = Registered(state, "", 3, False)
    slot = shared.submit(1, "g", size=2)
    shared.run()
    failure = slot.outcome_for(RANKED.name).failure
    assert failure.kind == "invalid"
    assert words in failure.message
    shared.give_up(slot)
    shared.assert_nothing_is_left()


def test_a_group_that_was_sealed_anew_with_another_member_is_awaited_under_its_new_digest(shared):
    slot = another_rank_joins(shared)
    seal(shared)
    shared.wait(1.0)
    before = shared.awaited(slot)
    shared.members[1, 0] = "key of a replacement", shared.members[1, 0][1]
    seal(shared)
    shared.wait(1.0)
    after = shared.awaited(slot)
    assert (before.state, after.state) == (State.GIVEN_UP, State.IN_FLIGHT)
    assert {payload.digest for payload in after.payloads} == {"digest1"}


def test_members_read_after_the_group_has_changed_again_are_not_taken(shared):
    slot = another_rank_joins(shared)
    seal(shared)
    shared.wait(1.0, but=[do.ReadMembers])
    shared.members[1, 0] = "key of a replacement", shared.members[1, 0][1]
    shared.run()
    assert RANKED.name not in slot.awaited


def test_members_are_put_into_their_slots_again_regularly_for_redis_may_have_been_emptied(shared):
    slot = another_rank_joins(shared)
    before = [action for action in shared.done if isinstance(action, do.RegisterMember)]
    shared.wait(RECONCILE_S)
    after = [action for action in shared.done if isinstance(action, do.RegisterMember)]
    assert [len(before), len(after)] == [1, 2]
    assert after[-1].member.slot is slot


def test_a_group_that_is_answered_is_put_back_into_a_redis_that_was_emptied(shared):
    slot = another_rank_joins(shared)
    seal(shared)
    shared.wait(1.0)
    awaited = shared.awaited(slot)
    shared.put_outcome(awaited.address, Outcome(members=(Outcome(reward=0.0), Outcome(reward=1.0))))
    (group,) = shared.state.groups
    shared.lost_groups = frozenset({group.shared_key})
    num_before = sum(isinstance(action, do.RegisterMember) for action in shared.done)
    shared.wait(RECONCILE_S)
    (put_back,) = [action for action in shared.done if isinstance(action, do.PutGroupsBack)]
    assert [one.address for one in put_back.groups] == [awaited.address]
    assert sum(isinstance(action, do.RegisterMember) for action in shared.done) == num_before + 1
    assert slot.outcome_for(RANKED.name).reward == 0.0


def test_calls_do_not_pile_up_while_redis_is_away_for_long(shared):
    """All of them would be made once it is back, and each is tried again every second until then."""
    slot = another_rank_joins(shared)
    seal(shared)
    shared.wait(1.0)
    shared.answer(slot)
    shared.submit(3, "incomplete", size=2)
    shared.run()
    for _ in range(1000):
        shared.wait(RECONCILE_S, but=IO)
    kinds = Counter(type(action) for action in shared.pending)
    assert kinds[do.RegisterMember] == kinds[do.PutGroupsBack] == 1
    assert set(kinds.values()) == {1}, kinds
    shared.run()
    shared.wait(RECONCILE_S, but=IO)
    assert shared.asked(do.RegisterMember), "Redis may be emptied again"
    assert shared.asked(do.PutGroupsBack)


def test_a_member_that_comes_after_its_groups_answer_into_an_emptied_redis_gets_that_answer(shared):
    first = shared.submit(1, "g", size=3)
    shared.run()
    ((_, request),) = shared.members.values()
    shared.members[0, 1] = "key2", request  # an earlier process of this rank had put it there
    shared.members[1, 0] = "key of another rank", request
    seal(shared)
    shared.wait(1.0)
    members = tuple(Outcome(reward=number / 3) for number in range(3))
    shared.put_outcome(shared.awaited(first).address, Outcome(members=members))
    shared.run()
    assert first.is_done

    sealed, shared.registered = shared.registered, OPEN  # Redis was emptied
    digests, shared.digests = shared.digests, {}
    late = shared.submit(2, "g", size=3)
    shared.wait(1.0)
    assert not late.is_done
    shared.registered, shared.digests = sealed, digests
    shared.wait(1.0)
    assert late.outcome_for(RANKED.name).reward == 1 / 3
