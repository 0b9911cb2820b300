"""Digests, ranks, pairs and win shares by themselves; expected numbers are counted by hand or by brute force."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.groups import GroupSlots, combine, digest, draw_pairs, ranks
from tasks.messages import Failure, GroupRequest, Outcome, RewardCall, SampleRequest

CALL = RewardCall(
    name="x", model="x", fingerprint="f", version="1", dtype="float32", batch_size=4, timeout_s=1, image_format="raw",
    options={},
)  # fmt: skip


def request(members, how="rank", **fields):
    return GroupRequest(
        id="r",
        run="r",
        label="x",
        sent_ms=0,
        deadline_ms=1,
        reward=CALL,
        how=how,
        address="g",
        members=members,
        **fields,
    )


def sample(address, failure=None):
    return SampleRequest(address=address, prompt="", media={}, failure=failure)


@given(st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=20))
def test_ranks_count_the_members_below_and_half_of_the_equal_ones(scores):
    n = len(scores)
    expected = [(sum(s < mine for s in scores) + (scores.count(mine) - 1) / 2) / n for mine in scores]
    assert ranks(scores) == pytest.approx(expected)
    assert sorted(ranks(scores, "ordinal")) == [i / n for i in range(n)]
    assert sum(ranks(scores)) == pytest.approx((n - 1) / 2)


@given(st.integers(2, 17), st.integers(1, 20), st.text("0123456789abcdef", min_size=40, max_size=40))
def test_pairs_are_drawn_once_and_give_each_member_its_opponents(num_members, opponents, group_digest):
    pairs = draw_pairs(group_digest, num_members, opponents)
    assert pairs == draw_pairs(group_digest, num_members, opponents)
    assert len(set(pairs)) == len(pairs)
    assert all(0 <= i < j < num_members for i, j in pairs)
    met = Counter(member for pair in pairs for member in pair)
    wanted = min(opponents, num_members - 1)
    assert set(met.values()) <= {wanted, wanted + 1}
    assert sum(count > wanted for count in met.values()) <= 1


def test_all_opponents_are_all_pairs():
    assert draw_pairs("0" * 40, 4, "all") == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_another_group_draws_other_pairs():
    assert draw_pairs(digest(["a"]), 12, 2) != draw_pairs(digest(["b"]), 12, 2)


def test_wins_are_shares_of_answered_comparisons_and_a_tie_is_half():
    parts = tuple(sample(f"c{i}") for i in range(6))
    group = request(
        tuple(sample(f"m{i}") for i in range(4)),
        how="wins",
        comparisons=parts,
        pairs=((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)),
    )
    silent = Outcome(failure=Failure(kind="unparsable", message="no verdict"))
    points = [1.0, 0.5, None, 0.0, None, None]  # member 3 meets only silence
    found = {p.address: silent if v is None else Outcome(reward=v) for p, v in zip(parts, points, strict=True)}
    outcomes = combine(group, found).members
    assert [o.reward for o in outcomes[:3]] == [(1.0 + 0.5) / 2, (0.0 + 0.0) / 2, (0.5 + 1.0) / 2]
    assert outcomes[3].failure.kind == "abstained"
    assert "no verdict" in outcomes[3].failure.message


def test_a_group_is_final_only_when_every_member_has_its_reward():
    group = request((sample("a"), sample("b"), sample("c", Failure(kind="invalid", message="NaN"))))
    found = {"a": Outcome(reward=2.0), "b": Outcome(reward=1.0)}
    whole = combine(group, found)
    assert [o.reward for o in whole.members] == [0.5, 0.0, None]
    assert whole.members[2].failure.message == "not ranked: NaN"
    assert not whole.is_final
    assert combine(request((sample("a"), sample("b"))), found).is_final


def test_slots_seal_under_the_digest_of_their_keys_in_slot_order_whoever_comes_last(outcomes):
    slots = GroupSlots(outcomes.redis, "run", "launch", 60)
    key = slots.key("train", 0, "f", "g")
    order = [((1, 0), "k3"), ((0, 10), "k2"), ((0, 9), "k1")]
    found = [slots.register(key, slot, k, sample(k), 3, "f") for slot, k in order]
    assert [f.state for f in found] == ["open", "open", "sealed"]
    assert found[2].is_completed_now
    assert found[2].digest == digest(["k1", "k2", "k3"])
    assert list(slots.members(key)) == [(0, 9), (0, 10), (1, 0)]
    assert slots.digests([key]) == [found[2].digest]
    assert slots.register(key, (0, 9), "k1", sample("k1"), 3, "f").state == "sealed"  # again
    assert slots.register(key, (2, 0), "k4", sample("k4"), 3, "f").state == "full"
    replaced = slots.register(key, (0, 9), "other", sample("other"), 3, "f")
    assert (replaced.state, replaced.digest) == ("sealed", digest(["other", "k2", "k3"]))
    outcomes.write({f"run:f:{replaced.digest}": Outcome(reward=1.0)}, "token")
    assert slots.register(key, (0, 9), "third", sample("third"), 3, "f").state == "scored"
    assert slots.digests([key]) == [replaced.digest]


def test_the_number_of_a_groups_message_has_a_time_to_live_also_in_a_redis_that_was_emptied(outcomes):
    slots = GroupSlots(outcomes.redis, "run", "launch", 60)
    key = slots.key("train", 0, "f", "g")
    slots.set_number(key, 7)
    assert 0 < outcomes.redis.pttl(key) <= 60_000


def test_ranks_ask_for_one_attempt_of_a_group_until_one_that_has_had_it_asks_again(outcomes):
    slots = GroupSlots(outcomes.redis, "run", "launch", 60)
    key = slots.key("train", 0, "f", "g")
    sealed = [slots.register(key, (rank, 0), f"k{rank}", sample(f"k{rank}"), 2, "f") for rank in range(2)][-1].digest
    assert slots.ask(key, sealed, 0, "a", 1, "1") == (1, 0)
    slots.set_number(key, 7)
    assert slots.ask(key, sealed, 1, "b", 2, "1") == (1, 7)  # its failure is there already
    assert slots.ask(key, sealed, 1, "b", 2, "1") == (1, 7)  # the reply was lost
    assert slots.ask(key, sealed, 1, "b", 2, "2") == (2, 0)  # the step is submitted again
    slots.set_number(key, 8)
    assert slots.ask(key, sealed, 0, "a", 3, "2") == (2, 8)
    assert slots.ask(key, sealed, 0, "restarted", 3, "1") == (2, 8)
    assert slots.ask(key, digest(["other"]), 0, "a", 1, "3") == (1, 0)  # sealed anew meanwhile: nothing is noted
    assert slots.ask(key, sealed, 1, "b", 3, "3") == (3, 0)
    anew = slots.register(key, (0, 0), "other", sample("other"), 2, "f").digest
    assert slots.ask(key, anew, 1, "b", 1, "4") == (1, 0)
    assert slots.ask(key, anew, 0, "a", 2, "4") == (1, 0)
    slots.ask("gone", anew, 0, "a", 1, "5")
    assert not outcomes.redis.exists("gone")


def test_where_no_rank_has_asked_the_first_attempt_is_asked_for(outcomes):
    slots = GroupSlots(outcomes.redis, "run", "launch", 60)
    key = slots.key("train", 0, "f", "g")
    sealed = [slots.register(key, (rank, 0), f"k{rank}", sample(f"k{rank}"), 2, "f") for rank in range(2)][-1].digest
    assert slots.ask(key, sealed, 0, "a", 3, "1", first=2) == (2, 0)
    assert slots.ask(key, sealed, 1, "b", 3, "1", first=2) == (2, 0)
    assert slots.ask(key, sealed, 1, "b", 3, "2", first=2) == (3, 0), "it has had the second"
    assert slots.ask("gone", sealed, 0, "a", 3, "3", first=2) == (2, 0)


@pytest.mark.parametrize("how", ["rank", "wins"])
def test_the_outcome_of_a_group_over_ranks_says_which_slots_it_is_of(how):
    compared = {"comparisons": (sample("a-b"),), "pairs": ((0, 1),)} if how == "wins" else {}
    asked = request((sample("a"), sample("b")), how=how, shared_key="its slots", **compared)
    found = {part.address: Outcome(reward=0.5) for part in asked.parts}
    assert combine(asked, found).shared_key == "its slots"
