from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.rewards import RewardConfig
from tests.judges.scripted import Answer, says
from workers import Unscored
from workers.judges.reply import Reply, read_reply
from workers.judges.tokens import word_of
from workers.judges.yes_no import QUESTION, yes_probability

HINT = "chat_template_kwargs: {enable_thinking: false}"


def reply(**candidates: float) -> Reply:
    return Reply("", "length", tuple(candidates.items()), "m", 1)


def logprobs(probabilities: dict[str, float]) -> Reply:
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


def why_not(candidates, **options) -> str:
    with pytest.raises(Unscored) as caught:
        yes_probability(logprobs(candidates), canonicalize=True, **options)
    assert caught.value.kind == "unparsable"
    return caught.value.message


THINKING = {"So": 0.56, "Got": 0.4399, "Okay": 5e-5, "Yes": 2e-6, "No": 4e-7}


def test_next_to_nothing_is_no_reward_but_a_reason_with_the_mass_and_the_likeliest_tokens():
    message = why_not(THINKING)
    assert "P(Yes) + P(No) is 2.4e-06, below min_answer_mass=0.25" in message
    assert "'So', 'Got', 'Okay', 'Yes', 'No' (probabilities 0.56, 0.44, 5e-05, 2e-06, 4e-07)" in message
    assert HINT in message


@pytest.mark.parametrize(
    "candidates",
    [{"\n": 0.9, "Yes": 0.05, "No": 0.01}, {"The": 0.8, "Yes": 0.2}, {"A": 1.0, "Yes": 1.4e-8, "No": 1e-9}],
)
def test_little_of_yes_and_no_is_no_reward(candidates):
    assert "below min_answer_mass=0.25" in why_not(candidates)


@pytest.mark.parametrize("token", ["Sure", "The", "Describe", "A", "</s>", "<b>", "<answer>", "<|im_end|>", ""])
def test_the_hint_at_thinking_is_given_only_where_it_looks_like_that(token):
    assert HINT not in why_not({token: 0.9, "Yes": 0.06, "No": 0.04})
    assert "one word" in why_not({token: 0.9, "Yes": 0.06, "No": 0.04})


@pytest.mark.parametrize("token", ["<", "<th", "<think", "<think>", "[TH", "◁", "Okay", "ĊSo", "<|channel|>"])
def test_a_part_of_a_thoughts_mark_looks_like_thinking(token):
    assert HINT in why_not({token: 0.9, "Yes": 0.06, "No": 0.04})


def test_tokens_that_are_numbers_are_said_to_be():
    assert "--return-tokens-as-token-ids" in why_not({"token_id:9454": 0.7, "token_id:2753": 0.3})


def chosen(token: str, logprob: float, *listed: tuple[str, float]) -> Reply:
    top = [{"token": t, "logprob": math.log(p)} for t, p in listed]
    first = {"token": token, "logprob": logprob, "top_logprobs": top}
    choice = {"message": {"content": token}, "finish_reason": "length", "logprobs": {"content": [first]}}
    return read_reply(json.dumps({"choices": [choice]}).encode(), "m", 1)


def test_a_chosen_token_that_is_not_listed_counts_and_one_that_is_listed_twice_counts_once():
    apart = chosen("No", math.log(0.1), ("Yes", 0.6))
    assert yes_probability(apart, canonicalize=True)[0] == pytest.approx(6 / 7)
    twice = chosen("Yes", math.log(0.4), ("Yes", 0.4), ("Yes", 0.4), ("No", 0.1))
    assert yes_probability(twice, canonicalize=True)[0] == pytest.approx(0.8)
    two_tokens = chosen("Yes", math.log(0.4), ("Yes", 0.4), ("Yes", 0.2), ("No", 0.1))
    assert yes_probability(two_tokens, canonicalize=True)[0] == pytest.approx(6 / 7)


def test_a_chosen_token_whose_probability_is_not_said_is_not_taken_for_0():
    with pytest.raises(Unscored, match="Yes is not among the judge's 2 candidates"):
        yes_probability(chosen("Yes", -9999.0, ("No", 0.5), ("A", 0.3)), canonicalize=True)


def test_the_floor_is_an_option_and_0_takes_what_there_is():
    found = {"A": 0.7, "Yes": 0.2, "No": 0.1}
    assert yes_probability(logprobs(found), canonicalize=True)[0] == pytest.approx(2 / 3)
    assert yes_probability(logprobs(found), canonicalize=True, min_answer_mass=0.3)[0] == pytest.approx(2 / 3)
    assert "below min_answer_mass=0.31" in why_not(found, min_answer_mass=0.31)
    for canonicalize in (True, False):
        reward, _ = yes_probability(logprobs(THINKING), canonicalize=canonicalize, min_answer_mass=0.0)
        assert reward == pytest.approx(2e-6 / 2.4e-6)
    assert "neither Yes nor No" in why_not({"A": 1.0}, min_answer_mass=0.0)


def test_the_floor_reaches_the_judge_and_is_another_computation(judge_server, make_judge, picture):
    answer = says("<think>", finish_reason="length", logprobs={"<think>": 0.99, "Yes": 0.004, "No": 0.001})
    ours = make_judge("vllm_evaluate", judge_server(lambda _: answer))
    theirs = make_judge("vllm_evaluate", judge_server(lambda _: answer), min_answer_mass=0.0)
    (found,) = ours(["x"], image=[picture()]).rewards
    assert "0.005" in found.message
    assert HINT in found.message
    assert theirs(["x"], image=[picture()]).rewards == [pytest.approx(0.8)]

    def fingerprint(**options):
        block = {"reward_model": "vllm_evaluate", "api_base_url": "http://judge/v1", **options}
        return RewardConfig.from_dict({"rewards": block}).rewards[0].fingerprint

    assert fingerprint() == fingerprint(min_answer_mass=0.25) != fingerprint(min_answer_mass=0.0)
    for wrong in (-0.1, 1.1, "some", True):
        with pytest.raises(ValueError, match="option min_answer_mass"):
            fingerprint(min_answer_mass=wrong)


@pytest.mark.parametrize(
    "token",
    [
        "Yes", "yes", "YES", " Yes", "\nYes", "**Yes", "**Yes**", "*Yes*", "_Yes_", "`Yes`", "# Yes", "Yes,", "Yes.",
        "Yes!", "Yes:", "Yes;", "Yes\n", '"Yes', "'Yes'", "“Yes”", "«Yes»", "「Yes」", "(Yes", "[Yes]", "{Yes}",
        "<Yes>", "- Yes", "• Yes", "Yes…", "ĠYes", "▁Yes", "ĊYes", "ĠYesĊ", "Ｙｅｓ", "ＹＥＳ",
        "𝐘𝐞𝐬", "Yes。", "Yes、", "\u200bYes", "\ufeffYes",
        "\u00a0Yes", "✅ Yes", "Yes</w>", "~~Yes", "> Yes", "$Yes", "Yes\ufe0f",
    ],
)  # fmt: skip
def test_marks_around_a_word_do_not_count(token):
    reward, info = yes_probability(logprobs({token: 0.8, "No": 0.1}), canonicalize=True)
    assert reward == pytest.approx(0.8 / 0.9)
    assert info["mass"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    "token",
    [
        "№", "nº", "Nope", "Not", "None", "No1", "No-one", "nó", "now", "N", "Yes/No", "¬No", "Yesterday", "Ye s",
        "noč", "",
    ],
)  # fmt: skip
def test_another_word_is_another_word(token):
    assert word_of(token) not in ("yes", "no")


@pytest.mark.parametrize(
    ("candidates", "reward"),
    [
        ({"Yes": 0.95, "A": 0.03, "B": 0.02}, 1.0),  # nothing is left
        ({"Yes": 0.6, "A": 0.2, "B": 0.02}, 1.0),  # No has at most 0.02
        ({"No": 0.6, "A": 0.2, "B": 0.02}, 0.0),
        ({"Yes": 0.6, "A": 0.2, "B": 0.1}, None),  # No has at most 0.1
        ({"No": 0.6, "A": 0.2, "B": 0.1}, None),
        ({"No": 0.5}, None),  # only one candidate was asked for
        ({"No": 0.96}, 0.0),
        ({"B": 0.02, "Yes": 0.5, "A": 0.2, "C": 0.1}, None),  # the chosen one stands before the likeliest
    ],
)
def test_a_word_that_is_not_among_the_candidates_may_have_as_much_as_the_least(candidates, reward):
    if reward is not None:
        assert yes_probability(logprobs(candidates), canonicalize=True)[0] == reward
        return
    message = why_not(candidates)
    missing = "No" if "Yes" in candidates else "Yes"
    assert message.startswith(f"{missing} is not among the judge's {len(candidates)} candidates")
    assert "top_logprobs" in message
    assert "question" in message


WORDS = ("Yes", "No", "Maybe", "The", "So", "I")


@st.composite
def likeliest(draw):
    """The first of a distribution over six words, as a server lists it, and the whole."""
    weights = draw(st.lists(st.floats(1e-6, 1.0), min_size=len(WORDS), max_size=len(WORDS)))
    words = draw(st.permutations(WORDS))
    total = sum(weights)
    ranked = sorted(((w / total, word) for w, word in zip(weights, words, strict=True)), reverse=True)
    return {word: p for p, word in ranked[: draw(st.integers(1, len(WORDS)))]}, {word: p for p, word in ranked}


@given(likeliest())
def test_a_reward_is_within_0_05_of_that_of_the_whole_distribution(found):
    """Whatever the server did not list: the truth is known here."""
    listed, whole = found
    truth = whole["Yes"] / (whole["Yes"] + whole["No"])
    try:
        reward, _ = yes_probability(logprobs(listed), canonicalize=True, min_answer_mass=0.0)
    except Unscored:
        assert len({"Yes", "No"} & set(listed)) < 2
    else:
        assert abs(reward - truth) <= 0.05 + 1e-5


@given(likeliest(), st.floats(0.0, 1.0))
def test_what_is_refused_could_have_been_another_reward(found, floor):
    """By every share of what is left that a missing word can have, in steps."""
    listed, _ = found
    left, least = max(0.0, 1.0 - sum(listed.values())), min(listed.values())
    shares = [i / 200 * min(left, least) for i in range(201)]
    yes = [listed["Yes"]] if "Yes" in listed else shares
    no = [listed["No"]] if "No" in listed else shares
    possible = [y / (y + n) for y, n in itertools.product(yes, no) if y + n > 0.0]
    mass = listed.get("Yes", 0.0) + listed.get("No", 0.0)
    is_answer = mass >= floor and mass > 0.0 and max(possible) - min(possible) <= 0.05
    try:
        reward, _ = yes_probability(logprobs(listed), canonicalize=True, min_answer_mass=floor)
    except Unscored:
        assert not is_answer or abs(mass - floor) < 1e-5 or max(possible) - min(possible) > 0.05 - 1e-5
    else:
        assert mass >= floor - 1e-5
        assert min(possible) - 1e-5 <= reward <= max(possible) + 1e-5
        assert max(possible) - min(possible) <= 0.05 + 1e-5


def test_candidates_that_are_no_probabilities_are_told():
    assert "sum to 1.5" in why_not({"Yes": 0.9, "No": 0.6})


def test_one_null_among_the_log_probabilities_is_a_probability_of_0(judge_server, make_judge, picture):
    def answer(**found):
        top = [{"token": token, "logprob": p if p is None else math.log(p)} for token, p in found.items()]
        one = says("Yes", finish_reason="length", logprobs={"Yes": 0.5})
        body = json.loads(one.body)
        body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = top
        return Answer(body=json.dumps(body).encode())

    def reward(**found):
        server = judge_server(lambda _: answer(**found))
        return make_judge("vllm_evaluate", server)(["x"], image=[picture()]).rewards[0]

    assert reward(Yes=0.6, No=0.2, Maybe=None) == pytest.approx(0.75)
    assert reward(Yes=0.6, No=None) == 1.0
    assert "neither Yes nor No" in reward(Yes=None, No=None, Maybe=0.5).message


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
