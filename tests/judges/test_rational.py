from __future__ import annotations

import io

import pytest
from PIL import Image

from tasks.errors import ModelLoadError
from tasks.rewards import RewardConfig
from tests.judges.scripted import says
from workers import Accelerator, RewardArguments, Unscored
from workers.judges import rubrics
from workers.judges.aspects import TITLES, read_judgement
from workers.judges.rational import RationalT2I

NAMES = {
    "text_faithfulness": "Text Faithfulness",
    "image_faithfulness": "Image Faithfulness",
    "physical_quality": "Physical and Visual Quality",
    "text_rendering": "Text Rendering",
}


def judgement(**scores: object) -> str:
    sections = [f"{i}. {NAMES[a]}:\n## Justification: so.\n## Score: {s}" for i, (a, s) in enumerate(scores.items(), 1)]
    return "# Detailed Judgement\n" + "\n".join(sections) + "\n# Summary: done.\n"


THREE = judgement(text_faithfulness=4.0, physical_quality=2.5, text_rendering=1.0)


def one(judge, picture):
    (reward,) = judge(["a cat"], image=[picture()]).rewards
    return reward


def test_the_reward_is_the_mean_on_a_scale_from_0_to_1(judge_server, make_judge, picture):
    judge = make_judge("rational_rewards_t2i", judge_server(lambda _: says(THREE)))
    assert one(judge, picture) == pytest.approx((2.5 - 1) / 3)


def test_weights_make_a_weighted_mean(judge_server, make_judge, picture):
    server = judge_server(lambda _: says(THREE))
    judge = make_judge("rational_rewards_t2i", server, aspect_weights={"text_faithfulness": 3.0, "text_rendering": 0.0})
    assert one(judge, picture) == pytest.approx(((3 * 4.0 + 2.5) / 4 - 1) / 3)


def test_weights_that_leave_nothing_are_a_reason(judge_server, make_judge, picture):
    server = judge_server(lambda _: says(judgement(text_faithfulness=3, physical_quality="N/A", text_rendering="N/A")))
    found = one(make_judge("rational_rewards_t2i", server, aspect_weights={"text_faithfulness": 0.0}), picture)
    assert (found.kind, found.message) == (
        "unparsable",
        "aspect_weights are 0 for all that the judge scored: text_faithfulness",
    )
    assert found.info["judge"]["aspects"]["text_faithfulness"] == 3.0


def test_only_the_aspects_asked_for_count(judge_server, make_judge, picture):
    server = judge_server(lambda _: says(judgement(text_faithfulness=4, physical_quality=2)))
    judge = make_judge("rational_rewards_t2i", server, aspects=["physical_quality"])
    assert one(judge, picture) == pytest.approx(1 / 3)


def test_a_missing_aspect_may_be_skipped_as_flow_factory_does(judge_server, make_judge, picture):
    server = judge_server(lambda _: says(judgement(text_faithfulness=4, physical_quality=2)))
    assert one(make_judge("rational_rewards_t2i", server), picture).kind == "unparsable"
    assert one(make_judge("rational_rewards_t2i", server, missing_aspects="skip"), picture) == pytest.approx(2 / 3)


def test_with_nothing_usable_skipping_gives_no_number(judge_server, make_judge, picture):
    for text in ("I cannot say.", judgement(text_faithfulness="N/A"), judgement(text_faithfulness="high")):
        server = judge_server(lambda _, text=text: says(text))
        found = one(make_judge("rational_rewards_t2i", server, missing_aspects="skip"), picture)
        assert isinstance(found, Unscored)
        assert found.kind == "unparsable"
        assert found.info["judge"]["text"] == text


def test_the_rubric_travels_with_prompt_and_image_in_their_places(judge_server, make_judge, picture):
    server = judge_server(lambda _: says(THREE))
    prompt = "a {sign} that says <image>"
    make_judge("rational_rewards_t2i", server)([prompt], image=[picture()])
    question = server.questions[0]
    assert question.text.count(prompt) == 1
    assert [mime for mime, _ in question.images] == ["image/png"]
    assert (question.body["temperature"], question.body["max_tokens"]) == (0.1, 2048)
    assert "logprobs" not in question.body


def test_an_edit_shows_the_source_first(judge_server, make_judge, picture):
    text = judgement(text_faithfulness=4, image_faithfulness=3, physical_quality=3.5, text_rendering="N/A")
    server = judge_server(lambda _: says(text))
    source, other, edited = picture(1), picture(2), picture(3)
    judge = make_judge("rational_rewards_edit", server)
    output = judge(["make it green"], image=[edited], condition_images=[[source, other]])
    assert output.rewards == [pytest.approx((3.5 - 1) / 3)]
    shown = [Image.open(io.BytesIO(data)).tobytes() for _, data in server.questions[0].images]
    assert shown == [source.tobytes(), edited.tobytes()]


@pytest.mark.parametrize(
    ("rubric", "aspects"),
    [(rubrics.T2I, "text_faithfulness physical_quality text_rendering"), (rubrics.EDIT, " ".join(TITLES))],
)
def test_an_answer_in_the_rubrics_own_form_can_be_read(rubric, aspects):
    form = rubric[rubric.index("# User Request Analysis") :]
    filled = form.replace("[a number from 1 to 4, or N/A]", "N/A").replace("[a number from 1 to 4]", "2.5")
    found = read_judgement(filled)
    assert found.scores == {a: "N/A" if a == "text_rendering" else 2.5 for a in aspects.split()}
    assert found.refined_request == "[the request as it should be put, and nothing else]"


def test_a_rubric_of_ones_own_is_read_beside_the_rewards_file(tmp_path, judge_server, make_judge, picture):
    (tmp_path / "mine.txt").write_text("You are strict.\n===\nRequest: {prompt}\nPicture: <image>\nScore it.\n")
    (tmp_path / "rewards.yaml").write_text("rewards: {reward_model: rational_rewards_t2i, rubric_file: mine.txt}\n")
    (spec,) = RewardConfig.from_yaml(tmp_path / "rewards.yaml").rewards
    assert spec.options["rubric_file"] == ""
    server = judge_server(lambda _: says(THREE))
    make_judge("rational_rewards_t2i", server, rubric=spec.options["rubric"])(["a cat"], image=[picture()])
    system, user = server.questions[0].body["messages"]
    assert system == {"role": "system", "content": "You are strict."}
    assert [p["type"] for p in user["content"]] == ["text", "image_url", "text"]
    assert server.questions[0].text == "Request: a cat\nPicture: Score it."


def test_another_rubric_is_another_computation(tmp_path):
    def fingerprint(text: str) -> str:
        (tmp_path / "rubric.txt").write_text(text)
        block = {"reward_model": "rational_rewards_t2i", "rubric_file": "rubric.txt"}
        return RewardConfig.from_dict({"rewards": block}, tmp_path).rewards[0].fingerprint

    assert fingerprint("{prompt} A") != fingerprint("{prompt} B")
    assert fingerprint("{prompt} A") == fingerprint("{prompt} A")


@pytest.mark.parametrize(
    ("rubric", "words"),
    [("Score <image>.", "has no {prompt}"), ("{prompt} <image> <image>", "has 2 <image>; it needs 1")],
)
def test_a_rubric_without_its_places_is_refused(judge_server, make_judge, rubric, words):
    with pytest.raises(ModelLoadError, match=words):
        make_judge("rational_rewards_t2i", judge_server(), rubric=rubric)


class Worst(RationalT2I):
    """The lowest score, not the mean."""

    def aggregate_aspect_scores(self, scores):
        return (min(scores.values()) - 1) / 3


def test_aggregation_is_one_function_to_override(judge_server, picture):
    server = judge_server(lambda _: says(judgement(text_faithfulness=4, physical_quality=2.5, text_rendering="N/A")))
    options = {"api_base_url": server.url, "vlm_model": "scripted"}  # of a dotted path: no defaults filled in
    config = RewardArguments(reward_model="mine.Worst", timeout_s=20, extra_kwargs=options)
    assert one(Worst(config, Accelerator()), picture) == pytest.approx(0.5)
    assert server.questions[0].images[0][0] == "image/png"


def test_an_aspect_that_the_rubric_has_not_is_refused(judge_server):
    config = RewardArguments(extra_kwargs={"api_base_url": judge_server().url, "aspects": ["beauty"]})
    with pytest.raises(ModelLoadError, match="no aspect 'beauty'"):
        Worst(config, Accelerator())
