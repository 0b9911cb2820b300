from __future__ import annotations

import pytest

from workers import Unscored
from workers.judges.chat import Reply
from workers.judges.yes_no import QUESTION, yes_probability


def reply(**candidates: float) -> Reply:
    return Reply("", "length", tuple(candidates.items()), "m", 1)


def logprobs(probabilities: dict[str, float]) -> Reply:
    import math

    return Reply("x", "length", tuple((t, math.log(p)) for t, p in probabilities.items()), "m", 1)


@pytest.mark.parametrize(
    ("candidates", "summed", "exact"),
    [
        ({"Yes": 0.6, "No": 0.2}, 0.75, 0.75),
        ({"Yes": 0.3, " yes": 0.2, "YES": 0.1, "no": 0.1, " No": 0.1}, 0.75, None),  # exactly No: at most 0.1
        ({"Yes": 0.3, "No": 0.1, "no": 0.5}, 1 / 3, 0.75),
        ({"yes": 0.3, "no": 0.1}, 0.75, None),
        ({"Yes": 0.5, "Maybe": 0.5}, 1.0, 1.0),
        ({"No": 0.5, "Maybe": 0.5}, 0.0, 0.0),
        ({"Yes.": 0.5, "Nope": 0.5}, 1.0, None),
        ({"Maybe": 1.0}, None, None),
    ],
)
def test_the_reward_is_yes_over_yes_and_no(candidates, summed, exact):
    for canonicalize, expected in ((True, summed), (False, exact)):
        if expected is None:
            with pytest.raises(Unscored, match="among the judge's") as caught:
                yes_probability(logprobs(candidates), canonicalize=canonicalize)
            assert caught.value.kind == "unparsable"
        else:
            reward, info = yes_probability(logprobs(candidates), canonicalize=canonicalize)
            assert reward == pytest.approx(expected)
            assert info["p_yes"] / (info["p_yes"] + info["p_no"]) == pytest.approx(expected)


@pytest.mark.parametrize("logprob", [float("nan"), float("inf"), 5.0, 1000.0])
def test_what_is_no_log_probability_is_no_reward(logprob):
    with pytest.raises(Unscored):
        yes_probability(reply(Yes=logprob, No=-1.0), canonicalize=True)


def test_words_that_the_server_finds_impossible_are_no_reward():
    with pytest.raises(Unscored):
        yes_probability(reply(Yes=float("-inf"), No=float("-inf")), canonicalize=True)


@pytest.mark.parametrize("word", ["natural", "artifacts", "pleasing", "details", "belong together"])
def test_our_question_covers_what_it_should(word):
    assert word in QUESTION
    assert "{prompt}" in QUESTION
    assert "Yes" in QUESTION


def test_exact_words_are_an_option(judge_server, make_judge, picture):
    from tests.judges.scripted import says

    server = judge_server(lambda _: says("yes", logprobs={"yes": 0.5, "Yes": 0.3, "No": 0.1}))
    summed = make_judge("vllm_evaluate", server)(["x"], image=[picture()]).rewards
    exact = make_judge("vllm_evaluate", server, canonicalize=False)(["x"], image=[picture()]).rewards
    assert summed == [pytest.approx(0.8 / 0.9)]
    assert exact == [pytest.approx(0.75)]


def test_a_video_is_judged_by_its_first_frame_or_evenly_spaced_ones(judge_server, make_judge, picture):
    server = judge_server()
    video = [picture(i) for i in range(9)]
    for frames, places in ((1, [0]), (2, [0, 8]), (3, [0, 4, 8]), (20, list(range(9)))):
        server.questions.clear()
        make_judge("vllm_evaluate", server, frames=frames, image_format="png")(["x"], video=[video])
        assert [as_picture(data) for _, data in server.questions[0].images] == [video[i].tobytes() for i in places]


def as_picture(data: bytes) -> bytes:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).tobytes()
