"""A run against judges that fail in every way: each sample ends with the right reward or a true reason, in time."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import numpy as np
import pytest

from tests.judges.scripted import MODEL, Answer, fails, says, says_yes
from trainer_client import RewardClient, Sample

NUM_SAMPLES = 320
COLLECT_S = 90.0

FAULTS = {
    # fault: (kind of the failure, words of its reason), or None where a retry brings the right reward
    "none": None,
    "500 once": None,
    "429 once": None,
    "cut once": None,
    "cut in the middle once": None,
    "500 always": ("failed", "the judge answered 500 after 3 requests: out of memory"),
    "cut always": ("failed", "no connection to the judge after 3 requests"),
    "hangs": ("timeout", "after 3 requests"),
    "retry after an hour": ("failed", "the judge answered 429 after 1 request: come back tomorrow"),
    "retry after a minute": ("timeout", "no answer within timeout_s=6 seconds after 1 request"),
    "wrong model": ("failed", "the judge answered 404 after 1 request: The model `scripted` does not exist."),
    "bad image": ("failed", "the judge answered 400 after 1 request: cannot identify image file"),
    "garbage": ("failed", "sent no chat completion but '<html>"),
    "half a reply": ("failed", 'sent no chat completion but \'{"choices"'),
    "empty": ("unparsable", {"yes_no": "no logprobs", "rubric": "is empty"}),
    "no logprobs": ("unparsable", {"yes_no": "no logprobs", "rubric": "no readable score"}),
    "truncated": ("unparsable", {"yes_no": "neither Yes nor No", "rubric": "cut at max_tokens"}),
    "babble": ("unparsable", {"yes_no": "neither Yes nor No", "rubric": "no readable score"}),
}
ONCE = {
    "500 once": fails(500, "out of memory"),
    "429 once": fails(429, "slow down", retry_after="1"),
    "cut once": Answer(cut_after=0),
    "cut in the middle once": Answer(body=b'{"choices": [', cut_after=5),
}
ALWAYS = {
    "500 always": fails(500, "out of memory"),
    "cut always": Answer(body=b'{"choices": [', cut_after=5),
    "retry after an hour": fails(429, "come back tomorrow", retry_after="3600"),
    "retry after a minute": fails(429, "slow down", retry_after="60"),
    "wrong model": fails(404, "The model `scripted` does not exist."),
    "bad image": fails(400, "cannot identify image file"),
    "garbage": Answer(body=b"<html>It works!</html>", headers={"Content-Type": "text/html"}),
    "half a reply": Answer(body=b'{"choices": [{"message": {"con'),
    "empty": says(""),
    "no logprobs": says("Yes"),
    "truncated": says("1. Text Faithfulness:\n## Score: 4", finish_reason="length", logprobs={"1": 0.9, "#": 0.1}),
    "babble": says("Well, well.", logprobs={"Well": 0.9, "Hm": 0.1}),
}


def right(i: int, judge: str) -> float:
    """The reward of sample `i` when nothing goes wrong."""
    return (i % 9 + 1) / 10 if judge == "yes_no" else i % 4 / 3


def right_answer(i: int, judge: str) -> Answer:
    if judge == "yes_no":
        return says_yes(right(i, judge))
    titles = ("Text Faithfulness", "Physical and Visual Quality", "Text Rendering")
    return says("\n".join(f"{n}. {title}:\n## Score: {i % 4 + 1}" for n, title in enumerate(titles, 1)))


class FaultyJudge:
    """Answers by what the prompt says is to go wrong, and 5 % of all requests with a 500."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: Counter[str] = Counter()
        self._random = random.Random(0)

    def __call__(self, question) -> Answer:
        marked = next(line for line in question.text.splitlines() if line.startswith("sample "))
        _, number, fault = marked.split(" ", 2)
        judge = "rubric" if "Justification" in question.text else "yes_no"
        with self._lock:
            num_before = self._asked[judge + marked]
            self._asked[judge + marked] += 1
            is_unlucky = self._random.random() < 0.05 and num_before == 0
        if fault == "hangs":
            return Answer(delay_s=30.0)
        if fault in ALWAYS:
            return ALWAYS[fault]
        if num_before == 0 and (fault in ONCE or is_unlucky):
            return ONCE.get(fault, fails(500, "out of memory"))
        return right_answer(int(number), judge)


def test_every_sample_ends_with_the_right_reward_or_a_true_reason(settings, workers, judge_server, picture):
    server = judge_server(FaultyJudge())
    workers("vlm")
    base = {"api_base_url": server.url, "vlm_model": MODEL, "timeout": 1.5, "max_retries": 2, "timeout_s": 6}
    rewards = [
        {**base, "name": "yes_no", "reward_model": "vllm_evaluate"},
        {**base, "name": "rubric", "reward_model": "rational_rewards_t2i", "temperature": 0.0},
    ]
    rng = random.Random(1)
    faults = [rng.choice(list(FAULTS)) if i % 4 == 0 else "none" for i in range(NUM_SAMPLES)]
    assert set(faults) == set(FAULTS)
    images = [picture(i) for i in range(8)]
    started = time.monotonic()
    with RewardClient.from_dict({"rewards": rewards}, run="faults", settings=settings) as client:
        client.submit([Sample(prompt=f"sample {i} {fault}", image=images[i % 8]) for i, fault in enumerate(faults)])
        batch = client.collect(COLLECT_S, on_failure="nan", progress=False)
    assert time.monotonic() - started < COLLECT_S

    found = {(f.reward, f.sample): f for f in batch.failures}
    num_failed = 0
    for judge in ("yes_no", "rubric"):
        for i, fault in enumerate(faults):
            expected, failed = FAULTS[fault], found.get((judge, i))
            if expected is None:
                assert failed is None, f"{judge} {fault}: {failed}"
                assert batch.rewards[judge][i] == pytest.approx(right(i, judge), abs=1e-6)
                continue
            kind, words = expected
            words = words if isinstance(words, str) else words[judge]
            assert failed is not None, f"{judge} {fault}"
            assert np.isnan(batch.rewards[judge][i])
            assert failed.kind == kind, f"{judge} {fault}: {failed}"
            assert words in failed.message, f"{judge} {fault}: {failed}"
            num_failed += 1
    assert batch.failure_rate == num_failed / (2 * NUM_SAMPLES) > 0
