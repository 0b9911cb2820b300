from __future__ import annotations

import itertools
from collections import Counter

import pytest

from tasks.errors import BusyError
from tests.judges.scripted import fails, says
from workers import Unscored
from workers.judges.chat import Reply
from workers.judges.pairwise import Comparison, comparison_of, draw_pairs, read_verdict, win_rates

TIED_UP = BusyError("full")
NO = Unscored("failed", "no connection")


def reply(verdict: str, finish_reason: str = "stop") -> Reply:
    return Reply(f"Because.\nVerdict: {verdict}", finish_reason, (), "m", 1)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Verdict: first", "first"),
        ("The second is sharper.\n**Verdict:** Second.", "second"),
        ("# Verdict: [tie]", "tie"),
        ("Final verdict: the first picture", "first"),
        ("Verdict： second", "second"),
        ("Verdict: first\nVerdict: first", "first"),
        ("Form: 'Verdict: first'\nVerdict: first or second or tie\nVerdict: tie", "tie"),
        ("", None),
        ("first", None),
        ("I prefer the first.", None),
        ("Verdict: neither", None),
        ("Verdict: firstly, the light", None),
        ("Verdict: first\nVerdict: second", None),
        ("Verdict: first or second or tie", None),
        ("Verdict: A", None),
    ],
)
def test_a_verdict_is_one_word_on_its_line(text, verdict):
    if verdict is not None:
        assert read_verdict(text) == verdict
        return
    with pytest.raises(Unscored) as caught:
        read_verdict(text)
    assert caught.value.kind == "unparsable"


@pytest.mark.parametrize(
    ("as_given", "swapped", "points"),
    [
        ("first", "second", 1.0),
        ("second", "first", 0.0),
        ("tie", "tie", 0.5),
        ("first", "first", 0.5),  # it likes the first place
        ("second", "second", 0.5),
        ("first", "tie", 1.0),
        ("tie", "second", 1.0),
        ("tie", "first", 0.0),
        ("second", "tie", 0.0),
    ],
)
def test_both_orders_together_decide(as_given, swapped, points):
    assert comparison_of(reply(as_given), reply(swapped)).points == points


@pytest.mark.parametrize("silent", [NO, reply("maybe"), reply("first", "length"), Reply("", "stop", (), "m", 1)])
def test_a_comparison_without_one_of_its_answers_abstains(silent):
    for replies in ((silent, reply("first")), (reply("first"), silent)):
        found = comparison_of(*replies)
        assert found.points is None
        assert isinstance(found.reason, Unscored)


def test_a_comparison_that_cannot_be_asked_now_is_no_abstention():
    with pytest.raises(BusyError):
        comparison_of(reply("first"), TIED_UP)


@pytest.mark.parametrize("num_members", range(2, 12))
def test_with_all_opponents_each_pair_meets_once(num_members):
    everyone = list(itertools.combinations(range(num_members), 2))
    assert draw_pairs(num_members, "all", "digest") == everyone
    assert draw_pairs(num_members, num_members - 1, "digest") == everyone
    assert draw_pairs(num_members, 100, "digest") == everyone


@pytest.mark.parametrize(("num_members", "k"), [(n, k) for n in range(3, 14) for k in range(1, n - 1)])
def test_each_member_meets_k_others(num_members, k):
    pairs = draw_pairs(num_members, k, "digest")
    assert len(set(pairs)) == len(pairs)
    assert all(0 <= i < j < num_members for i, j in pairs)
    met = Counter(member for pair in pairs for member in pair)
    extra = num_members * k % 2
    assert sorted(met.values()) == [k] * (num_members - extra) + [k + 1] * extra


def test_pairs_depend_on_the_groups_digest_and_on_nothing_else():
    assert draw_pairs(12, 3, "a") == draw_pairs(12, 3, "a")
    assert len({tuple(draw_pairs(12, 3, f"digest {i}")) for i in range(20)}) > 15
    # Written down: pairs may not change between versions, or a repeated task would compare others.
    assert draw_pairs(5, 2, "digest") == PAIRS_OF_FIVE


PAIRS_OF_FIVE = [(0, 2), (0, 3), (1, 2), (1, 4), (3, 4)]


@pytest.mark.parametrize("num_members", [0, 1])
def test_nobody_to_meet_is_no_pair(num_members):
    assert draw_pairs(num_members, "all", "digest") == draw_pairs(num_members, 3, "digest") == []


def test_the_reward_is_the_share_of_wins_with_half_for_a_tie():
    found = {(0, 1): Comparison(1.0), (0, 2): Comparison(0.5), (1, 2): Comparison(0.0)}
    assert win_rates(3, found) == [0.75, 0.0, 0.75]


def test_comparisons_that_abstain_count_for_neither():
    found = {(0, 1): Comparison(None, NO), (0, 2): Comparison(1.0), (1, 2): Comparison(None, NO)}
    first, second, third = win_rates(3, found)
    assert (first, third) == (1.0, 0.0)
    assert second.kind == "failed"
    assert second.message == "none of its 2 comparisons was answered; most often: no connection"


def test_a_group_of_one_abstains():
    (only,) = win_rates(1, {})
    assert only.kind == "abstained"


def test_win_rates_over_all_pairs_add_up_to_half_the_group():
    points = itertools.cycle([1.0, 0.5, 0.0, 0.0, 1.0])
    found = {pair: Comparison(next(points)) for pair in draw_pairs(7, "all", "x")}
    assert sum(win_rates(7, found)) == pytest.approx(3.5)


def number_of(data: bytes) -> int:
    """Which picture it is, told by its size."""
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).width


def by_size(question):
    first, second = (number_of(data) for _, data in question.images)
    return says(f"Because.\nVerdict: {'first' if first > second else 'second' if second > first else 'tie'}")


def test_a_group_is_compared_in_both_orders(judge_server, make_judge, picture):
    server = judge_server(by_size)
    judge = make_judge("pairwise_judge", server)
    output = judge(["a cat"] * 4, image=[picture(0, size) for size in (16, 48, 32, 32)])
    assert output.rewards == [0.0, 1.0, 0.5, 0.5]
    shown = Counter(tuple(number_of(data) for _, data in q.images) for q in server.questions)
    assert len(server.questions) == 12
    assert shown[16, 48] == shown[48, 16] == 1
    assert server.questions[0].body["max_tokens"] == 512


def test_a_judge_that_only_likes_the_first_place_finds_ties(judge_server, make_judge, picture):
    judge = make_judge("pairwise_judge", judge_server(lambda _: says("Verdict: first")), max_concurrent=2)
    assert judge(["a cat"] * 3, image=[picture(i) for i in range(3)]).rewards == [0.5] * 3


def test_a_picture_that_cannot_be_judged_leaves_the_others_their_rank(judge_server, make_judge, picture):
    def script(question):
        if 16 in [number_of(data) for _, data in question.images]:
            return fails(400, "bad image")
        return by_size(question)

    judge = make_judge("pairwise_judge", judge_server(script))
    bad, best, worst = judge(["a cat"] * 3, image=[picture(0, size) for size in (16, 48, 32)]).rewards
    assert (best, worst) == (1.0, 0.0)
    assert bad.kind == "failed"
    assert "bad image" in bad.message


def test_its_rubric_can_be_replaced(judge_server, make_judge, picture):
    server = judge_server(by_size)
    judge = make_judge("pairwise_judge", server, rubric="{prompt}: <image> or <image>? End with 'Verdict: ...'.")
    found = judge.compare("a cat", [picture(0, 16)], [picture(0, 24)])
    assert found.points == 0.0
    assert set(found.info) == {"as_given", "swapped"}
    assert server.questions[0].text.startswith("a cat:")
