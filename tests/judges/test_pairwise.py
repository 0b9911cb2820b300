from __future__ import annotations

import numpy as np
import pytest

from tasks.errors import BusyError
from tests.judges.scripted import fails, says, together
from trainer_client import RewardClient, Sample
from workers import Unscored
from workers.judges.chat import Reply
from workers.judges.pairwise import comparison_of, read_verdict

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
        ("Verdict: first, second or tie\nVerdict: tie", "tie"),
        ("Verdict: first (though the second is close)", "first"),
        ("Verdict: second is better than the first", "second"),
        ("Verdict: first > second", "first"),
        ("Verdict: first. Not by much.", "first"),
        ("Verdict: first, as the second has no hands", "first"),
        ("Verdict: tie between first and second", "tie"),
        ("Verdict: first is worse", None),
        ("Verdict: first image loses", None),
        ("Verdict: first isn’t the better one", None),
        ("Verdict: first is not better than the second", None),
        ("Verdict: first and second are equal", None),
        ("Verdict: first = second", None),
        ("Verdict: first < second", None),
        ("Verdict: second? No, first", None),
        ("Verdict: tie-breaker: first", None),
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


def number_of(data: bytes) -> int:
    """Which picture it is, told by its size."""
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).width


def by_size(question):
    first, second = (number_of(data) for _, data in question.images)
    return says(f"Because.\nVerdict: {'first' if first > second else 'second' if second > first else 'tie'}")


def test_each_pair_is_compared_in_both_orders(judge_server, make_judge, picture):
    server = judge_server(by_size)
    small, large, other = picture(0, 16), picture(0, 48), picture(1, 48)
    pairs = [(small, large), (large, small), (large, other)]
    output = make_judge("pairwise_judge", server)(["a cat"] * 3, image=[list(pair) for pair in pairs])
    assert output.rewards == [0.0, 1.0, 0.5]
    shown = [tuple(number_of(data) for _, data in q.images) for q in server.questions]
    assert shown == [(16, 48), (48, 16), (48, 16), (16, 48), (48, 48), (48, 48)]
    assert server.questions[0].body["max_tokens"] == 512
    assert server.most_in_flight == 1


def test_both_orders_may_be_asked_side_by_side(judge_server, make_judge, picture):
    server = judge_server(together(2, lambda _: says("Verdict: first")))
    judge = make_judge("pairwise_judge", server, max_concurrent=2)
    assert judge(["a cat"], image=[[picture(1), picture(2)]]).rewards == [0.5]
    assert server.most_in_flight == 2


def test_a_comparison_that_fails_abstains_alone(judge_server, make_judge, picture):
    def script(question):
        sizes = [number_of(data) for _, data in question.images]
        return fails(400, "bad image") if 16 in sizes else by_size(question)

    bad, large, small = picture(0, 16), picture(0, 48), picture(0, 32)
    judge = make_judge("pairwise_judge", judge_server(script))
    lost, won = judge(["a cat"] * 2, image=[[bad, large], [large, small]]).rewards
    assert won == 1.0
    assert (lost.kind, "bad image" in lost.message) == ("failed", True)


def test_videos_are_compared_by_frames(judge_server, make_judge, picture):
    server = judge_server(by_size)
    small, large = ([picture(i, size) for i in range(5)] for size in (16, 24))
    judge = make_judge("pairwise_judge", server, frames=3)
    server.script = lambda _: says("Verdict: tie")
    assert judge(["a cat"], video=[[small, large]]).rewards == [0.5]
    assert [number_of(data) for _, data in server.questions[0].images] == [16] * 3 + [24] * 3


def test_its_rubric_can_be_replaced(judge_server, make_judge, picture):
    server = judge_server(by_size)
    judge = make_judge("pairwise_judge", server, rubric="{prompt}: <image> or <image>? End with 'Verdict: ...'.")
    found = judge.compare("a cat", [picture(0, 16)], [picture(0, 24)])
    assert found.points == 0.0
    assert set(found.info) == {"as_given", "swapped"}
    assert server.questions[0].text.startswith("a cat:")


@pytest.mark.parametrize(("opponents", "num_pairs"), [("all", 15), (2, 6)])
def test_a_group_is_ranked_by_the_share_of_comparisons_won(
    settings, workers, judge_server, picture, opponents, num_pairs
):
    server = judge_server(by_size)
    workers("vlm")
    reward = {
        "name": "preferred",
        "reward_model": "pairwise_judge",
        "api_base_url": server.url,
        "vlm_model": "scripted",
        "opponents": opponents,
    }
    sizes = (16, 24, 32, 40, 48, 56)
    with RewardClient.from_dict({"rewards": reward}, run="pairs", settings=settings) as client:
        samples = [Sample(prompt="a cat", image=picture(size, size), group="cats") for size in sizes]
        client.submit(samples, group_size=len(sizes))
        batch = client.collect(60, progress=False)
    rewards = batch.rewards["preferred"].tolist()
    assert len(server.questions) == 2 * num_pairs
    met = [{number_of(data) for _, data in q.images} for q in server.questions]
    for size, reward_found in zip(sizes, rewards, strict=True):
        own = [max(pair) == size for pair in met if size in pair]
        assert reward_found == pytest.approx(sum(own) / len(own))
    if opponents == "all":
        assert rewards == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_only_fit_member_of_a_group_abstains_at_once(settings, workers, judge_server, picture):
    server = judge_server(by_size)
    workers("vlm")
    reward = {"reward_model": "pairwise_judge", "api_base_url": server.url, "vlm_model": "scripted"}
    with RewardClient.from_dict({"rewards": reward}, run="alone", settings=settings, max_failure_rate=1.0) as client:
        broken = np.full((3, 16, 16), np.nan, np.float32)
        pair = [Sample(prompt="a cat", image=image, group="cats") for image in (broken, picture(1))]
        client.submit(pair, group_size=2)
        client.submit([Sample(prompt="a dog", image=picture(2), group="dogs")], group_size=1)
        batch = client.collect(30, on_failure="nan", progress=False)
    assert [f.kind for f in batch.failures] == ["invalid", "abstained", "abstained"]
    assert "it was compared with nobody" in batch.failures[1].message
    assert server.questions == []
