"""A training run of four ranks: every kind of reward, train and eval, random delays; each reward at its own sample."""

from __future__ import annotations

import multiprocessing
import random
import re
import time

import numpy as np
import pytest

from tests.judges.scripted import MODEL, JudgeServer, says_yes
from tests.pipeline.conftest import config_of, expected_ranks, jpeg_bytes, samples_of, spread_over_ranks
from tests.reward_models import image_of
from trainer_client import RewardClient

NUM_RANKS, NUM_STEPS, NUM_GROUPS, GROUP_SIZE = 4, 30, 4, 4
EVAL_EVERY, NUM_EVAL = 10, 3
SAMPLING_S = 0.1
"""The longest that one image takes to sample."""

RANK, ORDER, JUDGE = "jpeg_incompressibility_Rank", "OrderInGroup", "vllm_evaluate"


def p_yes(number: int) -> float:
    """What the judge says of the image of this number."""
    return (number % 89 + 5) / 100


def judge(question):
    return says_yes(p_yes(int(re.search(r"number (\d+)", question.text)[1])), delay_s=0.1)


def eval_numbers(step: int, rank: int) -> list[int]:
    return [1_000_000 + 1000 * step + 100 * rank + i for i in range(NUM_EVAL)]


def train(settings, rank, plan, config, pipe):
    """One rank: submits its members one by one, evaluates now and then, sends what it collected."""
    rng = random.Random(rank)
    with RewardClient.from_dict(
        config, "whole", rank=rank, world_size=NUM_RANKS, launch="1", settings=settings
    ) as client:
        for step, members in enumerate(plan):
            found = {}
            is_eval = step % EVAL_EVERY == 0
            if is_eval:
                client.submit(samples_of(eval_numbers(step, rank)), split="eval", step=step)
            for number, group in members:
                time.sleep(rng.random() * SAMPLING_S)
                client.submit(samples_of([number], group=group), group_size=GROUP_SIZE, step=step)
            batch = client.collect(timeout_s=60, step=step)
            found["train"] = {name: values.tolist() for name, values in batch.rewards.items()}
            if is_eval:
                evaluated = client.collect(timeout_s=60, split="eval")
                found["eval"] = {name: values.tolist() for name, values in evaluated.rewards.items()}
            advantages = client.advantages(batch)
            assert np.isfinite(advantages).all()
            pipe.send((rank, step, found, batch.timings["span_s"], batch.timings["hidden_s"]))
    pipe.close()


@pytest.mark.timeout(170)
def test_thirty_steps_of_four_ranks_with_every_kind_of_reward(workers, settings):
    workers("gpu", "vlm", concurrency=8)
    server = JudgeServer(judge)
    rewards = config_of(
        "PixelCode",
        {"reward_model": RANK, "batch_size": 2},
        {"reward_model": ORDER, "version": "1"},
        {"reward_model": JUDGE, "api_base_url": server.url, "vlm_model": MODEL, "question": "Is it {prompt}?"},
    )["rewards"]
    config = {"rewards": rewards, "eval_rewards": config_of({"reward_model": "PixelCode", "add": 7})["rewards"]}
    plans, groups = spread_over_ranks(random.Random(3), NUM_RANKS, NUM_STEPS, NUM_GROUPS, GROUP_SIZE)
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(NUM_RANKS)]
    ranks = [
        context.Process(target=train, args=(settings, rank, plans[rank], config, ours))
        for rank, (_, ours) in enumerate(pipes)
    ]
    for process, (_, theirs) in zip(ranks, pipes, strict=True):
        process.start()
        theirs.close()
    spans_s, hidden_s = np.zeros(NUM_STEPS), np.zeros(NUM_STEPS)
    for rank, (pipe, _) in enumerate(pipes):
        for step in range(NUM_STEPS):
            assert pipe.poll(100), f"rank {rank} is stuck before the end of step {step}"
            found_rank, found_step, found, span_s, one_hidden_s = pipe.recv()
            assert (found_rank, found_step) == (rank, step)
            check(found, plans[rank][step], groups, step, rank)
            spans_s[step] += span_s
            hidden_s[step] += one_hidden_s
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    server.stop()
    for step in range(NUM_STEPS):
        print(f"step {step}: {hidden_s[step] / spans_s[step]:.0%} of {spans_s[step] / NUM_RANKS:.2f} s hidden")
    assert hidden_s.sum() > 0


def check(found, members, groups, step, rank):
    """Each reward of one rank's step equals what an independent computation says of its own sample."""
    train = found["train"]
    assert train["PixelCode"] == [number for number, _ in members]
    for i, (number, group) in enumerate(members):
        everyone = groups[step, group]
        sizes = [jpeg_bytes(image_of(n)) for n in sorted(everyone)]
        rank_of = dict(zip(sorted(everyone), expected_ranks(sizes), strict=True))
        assert train[RANK][i] == pytest.approx(rank_of[number], abs=1e-6)
        assert train[ORDER][i] == sorted(everyone).index(number)
        assert train[JUDGE][i] == pytest.approx(p_yes(number), abs=1e-5)
    if "eval" in found:
        assert found["eval"] == {"PixelCode": [number + 7 for number in eval_numbers(step, rank)]}
    assert ("eval" in found) == (step % EVAL_EVERY == 0)
