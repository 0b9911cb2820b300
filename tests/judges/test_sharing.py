"""Who is asked how often, through the whole pipeline: answers are shared, samples at a temperature are not."""

from __future__ import annotations

import pytest

from benchmarks.judges import steady_ratio
from tasks import keys
from tasks.servers.connections import connect
from tasks.settings import load_settings
from tests.judges.scripted import MODEL, says, says_yes
from tests.servers import wait_until
from trainer_client import RewardClient, Sample


def rewards_of(settings, samples, *rewards):
    with RewardClient.from_dict({"rewards": list(rewards)}, run="sharing", settings=settings) as client:
        client.submit(samples)
        return client.collect(60, progress=False)


def test_equal_questions_are_asked_once_and_sampled_ones_for_each_slot(settings, workers, judge_server, picture):
    sure, warm, cached = judge_server(), judge_server(), judge_server()
    workers("vlm")
    base = {"reward_model": "vllm_evaluate", "vlm_model": MODEL}
    batch = rewards_of(
        settings,
        [Sample(prompt="a cat", image=picture(i // 4)) for i in range(8)],
        {**base, "name": "sure", "api_base_url": sure.url},
        {**base, "name": "also sure", "api_base_url": sure.url, "timeout": 7, "max_retries": 1},
        {**base, "name": "warm", "api_base_url": warm.url, "temperature": 0.5},
        {**base, "name": "cached", "api_base_url": cached.url, "temperature": 0.5, "cache": True},
    )
    for name in ("sure", "also sure", "warm", "cached"):
        assert batch.rewards[name].tolist() == [0.75] * 8
    assert (len(sure.questions), len(warm.questions), len(cached.questions)) == (2, 8, 2)


def test_a_restarted_trainer_does_not_pay_a_judge_twice(settings, workers, judge_server, picture):
    server = judge_server()
    workers("vlm")
    reward = {"reward_model": "vllm_evaluate", "vlm_model": MODEL, "api_base_url": server.url}
    samples = [Sample(prompt="a cat", image=picture(i)) for i in range(4)]
    first = rewards_of(settings, samples, reward)
    again = rewards_of(settings, samples, {**reward, "timeout": 30, "max_concurrent": 4})
    assert first.rewards["vllm_evaluate"].tolist() == again.rewards["vllm_evaluate"].tolist()
    assert len(server.questions) == 4


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_group_whose_parts_others_are_asking_for_waits_for_their_answers(
    redis_url, workers, judge_server, picture, batch_size
):
    """As one task and as a chord; reconciliation, which would send the group again, comes too late to help."""
    settings = load_settings(broker_url=redis_url, claim_ttl_s=2, reconcile_s=60)
    server = judge_server(lambda q: says_yes(0.2 + 0.15 * q.number, delay_s=1.5))
    workers("vlm", settings=settings)
    plain = {"reward_model": "vllm_evaluate", "vlm_model": MODEL, "api_base_url": server.url, "batch_size": batch_size}
    rank = {**plain, "reward_model": "vllm_evaluate_Rank"}
    samples = [Sample(prompt="a cat", image=picture(i), group="g") for i in range(4)]
    with (
        RewardClient.from_dict({"rewards": plain}, "sharing", settings=settings) as first,
        RewardClient.from_dict({"rewards": rank}, "sharing", settings=settings) as second,
    ):
        first.submit(samples)
        first.flush()
        with connect(settings.results) as redis:
            wait_until(lambda: len(redis.keys(keys.claim("*"))) == 4, 30, pace_s=0.02)
        second.submit(samples, group_size=4)
        ranks = second.collect(30, progress=False).rewards["vllm_evaluate_Rank"]
        scores = first.collect(30, progress=False).rewards["vllm_evaluate"]
    assert ranks.tolist() == [sum(scores < mine) / 4 for mine in scores]
    assert len(server.questions) == 4


def test_a_changed_way_of_asking_takes_effect_in_a_running_worker(settings, workers, judge_server, picture):
    server = judge_server(lambda _: says_yes(0.5, delay_s=1.0))
    workers("vlm")
    reward = {"reward_model": "vllm_evaluate", "vlm_model": MODEL, "api_base_url": server.url, "max_retries": 0}
    with pytest.raises(Exception, match=r"timeout=0\.2 seconds"):
        rewards_of(settings, [Sample(prompt="a cat", image=picture())], {**reward, "timeout": 0.2})
    batch = rewards_of(settings, [Sample(prompt="a cat", image=picture())], {**reward, "timeout": 5})
    assert batch.rewards["vllm_evaluate"].tolist() == [0.5]


def test_an_edit_goes_through_with_its_source(settings, workers, judge_server, picture):
    server = judge_server(lambda _: says(THREES_OF_EDIT))
    workers("vlm")
    reward = {"reward_model": "rational_rewards_edit", "vlm_model": MODEL, "api_base_url": server.url}
    samples = [Sample(prompt="greener", image=picture(i), condition_images=[picture(9)]) for i in range(3)]
    batch = rewards_of(settings, samples, {**reward, "name": "edit"})
    assert batch.rewards["edit"].tolist() == pytest.approx([2 / 3] * 3)
    judged = batch.info["edit"][0]["judge"]
    assert judged["aspects"] == dict.fromkeys(ASPECTS, 3.0)
    assert (judged["refined_request"], judged["text"]) == ("Much greener.", THREES_OF_EDIT)
    assert all(len(q.images) == 2 for q in server.questions)


ASPECTS = ("text_faithfulness", "image_faithfulness", "physical_quality", "text_rendering")
TITLES = ("Text Faithfulness", "Image Faithfulness", "Physical and Visual Quality", "Text Rendering")
THREES_OF_EDIT = "\n".join(f"{t}:\nScore: 3" for t in TITLES) + "\n# Summary: x\n## Refined Request: Much greener."


def test_the_benchmarks_ratio_is_one_for_a_judge_that_is_never_idle():
    busy = [(0.5 * wave + 0.01 * lane, 0.5 * wave + 0.01 * lane + 0.5) for wave in range(20) for lane in range(4)]
    assert steady_ratio(busy, 0.5, 4) == pytest.approx(1.0)
    with_gaps = [(0.6 * wave + 0.01 * lane, 0.6 * wave + 0.01 * lane + 0.5) for wave in range(40) for lane in range(4)]
    assert steady_ratio(with_gaps, 0.5, 4) == pytest.approx(1.2, rel=0.01)
    slowed = [(0.6 * wave, 0.6 * wave + 0.6) for wave in range(40) for _ in range(4)]
    assert steady_ratio(slowed, 0.5, 4) == pytest.approx(1.2)
