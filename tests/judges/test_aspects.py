from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.judges.scripted import JudgeServer, says
from workers import Unscored
from workers.judges.aspects import read_judgement, read_score

REPLIES: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("replies.yaml").read_text())
MODELS = {"t2i": "rational_rewards_t2i", "edit": "rational_rewards_edit"}


def by_name(case: dict[str, Any]) -> str:
    return case["name"].replace(" ", "_")


def test_the_table_has_at_least_forty_replies():
    assert len({case["name"] for case in REPLIES}) == len(REPLIES) >= 40


@pytest.mark.parametrize("case", REPLIES, ids=by_name)
def test_the_scores_of_a_reply_are_read(case):
    judgement = read_judgement(case["reply"])
    assert dict(judgement.scores) == case["scores"]
    assert judgement.refined_request == case.get("refined_request", "")


def test_a_reply_becomes_its_reward_or_its_reason(judge_server, make_judge, picture):
    answered: dict[str, Any] = {}
    for judge, model in MODELS.items():
        cases = [case for case in REPLIES if case.get("judge", "t2i") == judge]
        server: JudgeServer = judge_server(lambda q, cases=cases: says(cases[q.number]["reply"]))
        one = make_judge(model, server)
        images = [picture()] * len(cases)
        output = one(["a cube"] * len(cases), image=images, condition_images=[[i] for i in images])
        answered |= {
            case["name"]: (r, i) for case, r, i in zip(cases, output.rewards, output.extra_info["judge"], strict=True)
        }
    for case in REPLIES:
        reward, info = answered[case["name"]]
        if "reason" in case:
            assert isinstance(reward, Unscored), case["name"]
            assert reward.kind == "unparsable", case["name"]
            assert case["reason"] in reward.message, case["name"]
            assert reward.info["judge"]["text"] == case["reply"], case["name"]
        else:
            assert reward == pytest.approx(case["reward"], abs=1e-12), case["name"]
            assert info["aspects"] == case["scores"], case["name"]
            assert info["text"] == case["reply"], case["name"]


@pytest.mark.parametrize(
    ("value", "score"),
    [
        ("3.5", 3.5), (" **3.5** ", 3.5), ("[3.5]", 3.5), ("(3.5)", 3.5), ("`3.5`", 3.5), ("~3.5", 3.5), ("+3.5", 3.5),
        ("3.5/4", 3.5), ("**3.5**/4", 3.5), ("[3.5]/4.0", 3.5), ("3.5 / 4.0 (good)", 3.5), ("3.5 out of 4", 3.5),
        ("3.5 of 4", 3.5), ("3.5 (out of 4)", 3.5), ("3.5.", 3.5), ("3.5,", 3.5), ("3.5; good", 3.5),
        ("3.5 good", 3.5), ("3.5 – good", 3.5), ("3.5 points", 3.5), ("3.5 to be fair", 3.5), ("3.5 or so", 3.5),
        ("0", 1.0), ("-1", 1.0), ("5", 4.0), ("100", 4.0), ("1", 1.0), ("4", 4.0), ("٣", 3.0),
        ("N/A", "N/A"), ("n/a", "N/A"), ("NA", "N/A"), ("N.A.", "N/A"), ("[N/A]", "N/A"), ("**N/A** (no text)", "N/A"),
        ("not applicable", "N/A"), ("N / A", "N/A"),
        ("", None), ("**", None), ("none", None), ("nan", None), ("inf", None), ("high", None), ("nap", None),
        ("3-4", None), ("3 - 4", None), ("3–4", None), ("[3-4]", None), ("3 to 4", None), ("3 or 4", None),
        ("3 and 4", None), ("3, 4", None), ("3 4", None), ("3..4", None), ("**3** - **4**", None), ("3 -> 4", None),
        ("3/5", None), ("3 / 5", None), ("3/10", None), ("3/40", None), ("3/4.5", None), ("3 out of 5", None),
        ("3 of 5", None), ("3 points out of 5", None), ("3 (out of 10)", None), ("75%", None), ("75 %", None),
        ("3x", None), ("3rd", None), ("3e0", None), ("3.5.1", None), ("<3", None), (">3", None), ("3½", None),
    ],
)  # fmt: skip
def test_a_score_is_one_number_on_the_scale_or_none(value, score):
    assert read_score(value) == score


def test_a_huge_number_is_the_scales_end_or_nothing():
    assert read_score("9" * 400) is None
    assert read_score("9" * 30) == 4.0
