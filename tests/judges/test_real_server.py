"""The judges against a real server with a real (small) model: images, log probabilities, replies that are cut."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest

from tests.judges.llama_server import model_path
from tests.servers import ROOT, clean_env, ends_with_us
from trainer_client import RewardClient, Sample
from workers.judges.images import data_url

pytestmark = pytest.mark.timeout(600)

QUESTION = "<image>Is this a picture of {prompt}? Answer Yes or No."
NUM_CALLS = 64
COLLECT_S = 400.0


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the API of a llama.cpp server in a process of its own."""
    model_path()
    folder = tmp_path_factory.mktemp("llama")
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*ends_with_us("KILL"), sys.executable, "-m", "tests.judges.llama_server", str(folder)],
            cwd=ROOT,
            env=clean_env(),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        url = process.stdout.readline().strip()
        assert url, (folder / "server.log").read_text(errors="replace")[-3000:]
        yield f"{url}/v1"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def p_yes(url: str, prompt: str, image: str) -> float:
    """P(Yes) / (P(Yes) + P(No)), asked and computed apart from the code under test."""
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": QUESTION.removeprefix("<image>").replace("{prompt}", prompt)},
    ]
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        top = json.load(reply)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    mass = dict.fromkeys(("yes", "no"), 0.0)
    for candidate in top:
        word = candidate["token"].strip().lower()
        if word in mass:
            mass[word] += math.exp(candidate["logprob"])
    return mass["yes"] / (mass["yes"] + mass["no"])


def test_sixty_four_questions_from_a_worker_are_all_answered(settings, workers, real_server, picture):
    workers("vlm")
    reward = {
        "name": "yes_no",
        "reward_model": "vllm_evaluate",
        "api_base_url": real_server,
        "question": QUESTION,
        "timeout": 300,
        "timeout_s": 390,
    }
    prompts = [f"{i} {thing}" for i in range(16) for thing in ("cats", "dogs", "red cubes", "ships at sea")]
    images = [picture(i, 64) for i in range(NUM_CALLS)]
    with RewardClient.from_dict({"rewards": reward}, run="real", settings=settings) as client:
        client.submit([Sample(prompt=p, image=image) for p, image in zip(prompts, images, strict=True)])
        batch = client.collect(COLLECT_S, progress=False)
    rewards = batch.rewards["yes_no"]
    assert batch.failures == ()
    assert len(rewards) == NUM_CALLS
    assert ((rewards > 0) & (rewards < 1)).all()
    assert len(np.unique(rewards.round(4))) > NUM_CALLS / 2
    for i in (0, 21, 63):  # batched with others it computes in another order, hence the tolerance
        assert rewards[i] == pytest.approx(p_yes(real_server, prompts[i], data_url(images[i], "jpeg")), abs=0.03)


def test_the_image_counts(real_server, make_judge, picture):
    judge = make_judge("vllm_evaluate", real_server, vlm_model="", question=QUESTION, timeout_s=300)
    one, other, again = judge(["a cat"] * 3, image=[picture(1, 64), picture(2, 64), picture(1, 64)]).rewards
    assert abs(one - again) < 1e-3 < abs(one - other)


def test_our_question_is_understood_and_an_answer_of_little_mass_is_told(real_server, make_judge, picture):
    """The model is small: it would rather say something else than Yes or No."""
    options = {"vlm_model": "", "timeout_s": 300}
    (found,) = make_judge("vllm_evaluate", real_server, **options)(["a cat"], image=[picture()]).rewards
    output = make_judge("vllm_evaluate", real_server, min_answer_mass=0.0, **options)(["a cat"], image=[picture()])
    (reward,), (info,) = output.rewards, output.extra_info["judge"]
    assert 0 < reward < 1
    assert info["mass"] < 0.25
    assert f"P(Yes) + P(No) is {found.info['judge']['mass']:.2g}" in found.message


def test_rubric_replies_that_are_cut_are_no_rewards(settings, workers, real_server, picture):
    workers("vlm")
    reward = {
        "name": "rubric",
        "reward_model": "rational_rewards_t2i",
        "api_base_url": real_server,
        "vlm_model": "",
        "max_tokens": 64,
        "timeout": 300,
        "timeout_s": 390,
    }
    with RewardClient.from_dict({"rewards": reward}, run="real", settings=settings, max_failure_rate=1.0) as client:
        client.submit([Sample(prompt=f"{i} cats", image=picture(i, 64)) for i in range(4)])
        batch = client.collect(COLLECT_S, on_failure="nan", progress=False)
    assert np.isnan(batch.rewards["rubric"]).all()
    assert [(f.sample, f.kind) for f in batch.failures] == [(i, "unparsable") for i in range(4)]
    assert all("cut at max_tokens" in f.message for f in batch.failures)
    assert all(info["judge"]["text"] for info in batch.info["rubric"])


def test_a_name_that_it_does_not_list_is_asked_for_and_logged_with_its_list(real_server, make_judge, picture, caplog):
    """llama.cpp serves its one model under every name."""
    judge = make_judge("vllm_evaluate", real_server, vlm_model="Qwen3-VL", question=QUESTION, timeout_s=300)
    judge.warm_up()
    (reward,) = judge(["a cat"], image=[picture(1, 64)]).rewards
    assert 0 < reward < 1
    (said,) = [r.getMessage() for r in caplog.records if "not listed" in r.getMessage()]
    assert "'Qwen3-VL'" in said
    assert ".gguf" in said
