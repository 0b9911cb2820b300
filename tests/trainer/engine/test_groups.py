"""The life of a group, from its first member to its plan."""

from __future__ import annotations

import pytest

from tasks.groups import Registered, digest
from tasks.messages import Failure, MediaRef, SampleRequest
from tasks.outcomes import address
from tests.trainer.engine.by_hand import RANKED, RUN, rewards_of
from tests.trainer.engine.parts import new_awaited, new_member, new_slot
from trainer_client.engine.groups import NEVER, OVERDUE_S, Groups

(PAIRWISE,) = rewards_of(
    {"reward_model": "pairwise_judge", "name": "pairs", "vlm_model": "m", "api_base_url": "http://judge/v1"}
)


def shared_key(split, step, fingerprint, name):
    return f"{split}:{step}:{fingerprint}:{name}"


@pytest.fixture
def groups():
    """Of one rank."""
    return Groups(RUN, 0, None)


@pytest.fixture
def shared():
    """Of rank 0 of several."""
    return Groups(RUN, 0, shared_key)


def add(groups, *indices, size=None, step=0, group="g", now=0.0, spec=RANKED, failure=None):
    """Members in slots of these indices."""
    members = []
    for index in indices:
        member = new_member(spec, new_slot(index, step=step, group=group, size=size))
        member.failure = failure
        ref = MediaRef(name=f"payload{index}", digest="d", shape=(1, 1, 3), format="raw")
        member.media = {"image": ref}
        member.request = SampleRequest(
            address=member.address, prompt="prompt", media=member.media, failure=member.failure
        )
        groups.add(member, now)
        members.append(member)
    return members


def group_of(groups):
    (group,) = groups
    return group


# --- filled ---------------------------------------------------------------------------------------


def test_members_of_one_id_reward_and_step_are_a_group(groups):
    add(groups, 0, 1)
    add(groups, 2, group="another")
    add(groups, 3, step=1)
    add(groups, 4, spec=PAIRWISE)
    assert sorted(len(group.members) for group in groups) == [1, 1, 1, 2]


def test_a_group_is_full_when_it_has_its_members(groups):
    add(groups, 0, size=2)
    assert not group_of(groups).is_full
    add(groups, 1, size=2)
    assert group_of(groups).is_full


def test_a_group_of_unknown_size_is_never_full_and_found_by_its_step(groups):
    add(groups, 0, 1, 2)
    add(groups, 0, step=1)
    assert not any(group.is_full for group in groups)
    assert [len(group.members) for group in groups.of_unknown_size({("train", 0)})] == [3]


def test_over_ranks_no_group_has_an_unknown_size(shared):
    add(shared, 0)
    assert shared.of_unknown_size({("train", 0)}) == []


def test_the_parts_wait_for_their_group_on_one_rank_only(groups, shared):
    assert groups.may_carry
    assert not shared.may_carry


# --- sealed ---------------------------------------------------------------------------------------


def test_a_group_is_sealed_in_the_order_of_its_slots_whichever_came_first(groups):
    add(groups, 2, 0, 1, size=3)
    group = group_of(groups)
    awaited = groups.seal(group)
    assert group.digest == digest(["key0", "key1", "key2"])
    assert awaited.address == address(RUN, RANKED.fingerprint, group.digest)
    assert [member.address for member in awaited.group.members] == [f"address of key{i}" for i in range(3)]
    assert awaited.group.index_of == {(0, 0): 0, (0, 1): 1, (0, 2): 2}


def test_equal_members_in_the_same_order_are_the_same_group_for_its_digest(groups):
    add(groups, 0, 1, size=2, group="g")
    first = groups.seal(group_of(groups))
    add(groups, 0, 1, size=2, group="h")
    assert groups.seal(group_of(groups)).address == first.address


def test_a_group_of_one_rank_is_forgotten_once_it_is_sealed(groups):
    add(groups, 0, 1, size=2)
    groups.seal(group_of(groups))
    assert len(groups) == 0


def test_a_group_over_ranks_is_remembered_and_sealed_with_the_members_of_all(shared):
    (mine,) = add(shared, 5, size=2)
    group = group_of(shared)
    other = SampleRequest(address="another rank's", prompt="prompt", media={})
    awaited = shared.seal_shared(group, {(0, 5): (mine.key, mine.request), (1, 0): ("key of another", other)})
    assert group.digest == digest(["key5", "key of another"])
    assert awaited.group.members == (mine.request, other)
    assert awaited.group.shared_key == group.shared_key
    assert shared.of_shared_key(group.shared_key) is group


def test_a_group_has_one_key_over_ranks_whatever_kind_of_integer_or_text_its_id_is(shared):
    numpy = pytest.importorskip("numpy")
    keys = {shared.shared_key_of(add(shared, index, group=group)[0].slot, RANKED.name) for index, group in [
        (0, 7),
        (1, numpy.int64(7)),
    ]}  # fmt: skip
    assert len(keys) == 1
    (text,) = add(shared, 2, group="7")
    assert shared.shared_key_of(text.slot, RANKED.name) not in keys


def test_of_pairs_each_member_meets_another_and_only_those_that_can_be_scored(groups):
    add(groups, 0, 1, 2, size=4, spec=PAIRWISE)
    add(groups, 3, size=4, spec=PAIRWISE, failure=Failure(kind="invalid", message="unreadable"))
    plan = groups.seal(group_of(groups)).group
    assert len(plan.pairs) == len(plan.comparisons)
    assert {index for pair in plan.pairs for index in pair} == {0, 1, 2}
    assert len({comparison.address for comparison in plan.comparisons}) == len(plan.pairs)
    assert plan.parts == plan.comparisons


def test_a_comparison_has_the_media_of_both(groups):
    add(groups, 0, 1, size=2, spec=PAIRWISE)
    plan = groups.seal(group_of(groups)).group
    for (first, second), comparison in zip(plan.pairs, plan.comparisons, strict=True):
        assert [ref.name for ref in comparison.media["image"]] == [f"payload{first}", f"payload{second}"]


def test_how_many_parts_are_scored_by_themselves(groups):
    add(groups, 0, 1, size=3)
    add(groups, 2, size=3, failure=Failure(kind="invalid", message="unreadable"))
    assert groups.seal(group_of(groups)).group.num_scored("rank") == 2


# --- members that it does not keep ----------------------------------------------------------------


def test_a_member_of_a_group_is_known_until_it_is_forgotten(groups):
    first, second = add(groups, 0, 1, size=3)
    assert groups.of_member(first) is group_of(groups)
    assert groups.forget([first.slot]) == [first]
    assert groups.of_member(first) is None
    assert groups.of_member(second) is not None


def test_a_group_without_members_is_forgotten(shared):
    members = add(shared, 0, 1, size=3)
    key = group_of(shared).shared_key
    assert shared.forget([member.slot for member in members]) == members
    assert len(shared) == 0
    assert shared.of_shared_key(key) is None


def test_a_member_that_takes_the_slot_of_another_is_the_only_one_there(groups):
    (before,) = add(groups, 0)
    (after,) = add(groups, 0)
    assert groups.of_member(before) is None
    assert groups.of_member(after) is group_of(groups)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("full", "it has its 2 members already"),
        ("size", "group_size=2 here, another rank said group_size=3"),
        ("scored", r"another sample in this slot (rank 0, sample 4)"),
    ],
)
def test_a_member_that_is_refused_is_out_of_the_group_and_told_why(shared, state, words):
    (member,) = add(shared, 4, size=2, step=7)
    failure = shared.refuse(group_of(shared), member, Registered(state, "", 3, False))
    assert failure.kind == "invalid"
    assert words in failure.message
    assert "run 'run', step 7, group 'g'" in failure.message
    assert shared.of_member(member) is None


def test_groups_that_stay_incomplete_end_with_words_for_each_member_of_them(groups):
    members = add(groups, 0, 1, size=3)
    add(groups, 2, size=3, group="complete")
    add(groups, 0, size=3, step=1)
    told = groups.give_up_incomplete("train", 0, {"g": "one is missing"})
    assert [(member, failure.message) for _, member, failure in told] == [(m, "one is missing") for m in members]


def test_members_that_come_after_their_group_was_given_up_are_told_too_until_the_step_is_over(groups):
    groups.give_up_incomplete("train", 0, {"g": "one is missing"})
    late, other = new_slot(5), new_slot(6, group="another")
    assert groups.why_given_up(late).message == "one is missing"
    assert groups.why_given_up(other) is None
    groups.forget([late])
    assert groups.why_given_up(late) is None


def test_a_group_that_was_sealed_is_not_incomplete(shared):
    (member,) = add(shared, 0, size=1)
    group = group_of(shared)
    group.awaited = shared.seal_shared(group, {(0, 0): (member.key, member.request)})
    assert shared.give_up_incomplete("train", 0, {"g": "one is missing"}) == []


# --- what waits for a group -----------------------------------------------------------------------


def test_what_a_group_carries_is_overdue_some_time_after_its_first_member(groups):
    first, second = add(groups, 0, size=3, now=1.0) + add(groups, 1, size=3, now=1.9)
    first.carried, second.carried = [new_awaited("first")], [new_awaited("second")]
    assert groups.overdue_at() == 1.0 + OVERDUE_S
    assert groups.take_overdue(1.0 + OVERDUE_S - 0.01) == []
    assert [one.address for one in groups.take_overdue(1.0 + OVERDUE_S)] == ["first", "second"]
    assert groups.take_overdue(100.0) == []
    assert groups.overdue_at() == NEVER


def test_a_group_that_carries_nothing_is_never_overdue(groups):
    add(groups, 0, size=3)
    assert groups.overdue_at() == NEVER


# --- over ranks -----------------------------------------------------------------------------------


def test_a_group_over_ranks_is_asked_for_until_its_outcome_is_known(shared):
    (member,) = add(shared, 0, size=2)
    group = group_of(shared)
    assert shared.unanswered() == [group]
    group.awaited = shared.seal_shared(group, {(0, 0): (member.key, member.request)})
    assert shared.unanswered() == [group]
    group.awaited.outcome = object()
    assert shared.unanswered() == [group], "its member has not joined"
    member.slot.awaited = {group.spec.name: group.awaited}
    assert shared.unanswered() == []
    assert shared.answered() == [group]


def test_which_members_are_missing_is_told_by_rank(shared):
    (member, _) = add(shared, 3, 4, size=5)
    words = shared.why_open(member.slot, RANKED.name, others=[(1, 0), (0, 3)])
    assert words == (
        "group 'g' of step 0 has 3 of 5 members, 2 missing (rank 0: samples 3, 4; rank 1: samples 0 are there)"
    )


def test_nothing_is_told_of_a_group_that_waits_for_no_member(groups, shared):
    (unknown_size,) = add(groups, 0)
    assert groups.why_open(unknown_size.slot, RANKED.name) is None
    (member,) = add(shared, 0, size=2)
    assert shared.why_open(member.slot, RANKED.name, others=[(1, 0)]) is None
    assert shared.why_open(new_slot(9, group="unknown"), RANKED.name) is None
