"""What a logger is told of a batch, against numbers computed by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.trainer.batches import NAN, Ranks, batch_of
from trainer_client.advantages import gdpo
from trainer_client.metrics import failure_rate_by_group, metrics
from trainer_client.results import Failed, RewardBatch


@pytest.fixture
def batch() -> RewardBatch:
    """Two groups of three; in `b`, one sample of the second group failed and another timed out."""
    return batch_of(
        {"a": [1, 2, 3, 5, 5, 5], "b": [0, 1, 2, NAN, NAN, 4]},
        ["cat", "cat", "cat", "dog", "dog", "dog"],
        failures=(Failed(3, "b", "failed", "broken", 2), Failed(4, "b", "timeout", "late", 1)),
        weights={"a": 1.0, "b": 0.5},
        num_hits={"a": 4, "b": 0},
        latency_s={"a": np.array([1, 1, 1, 1, 1, 11], np.float32), "b": np.array([2, 2, 2, NAN, NAN, 4], np.float32)},
    )


def test_each_reward_has_its_numbers_under_their_names(batch: RewardBatch) -> None:
    found = metrics(batch)
    std = math.sqrt(2 / 3)
    expected = {
        "train/reward_a_mean": 3.5,
        "train/reward_a_std": math.sqrt((2.5**2 + 1.5**2 + 0.5**2 + 3 * 1.5**2) / 6),
        "train/reward_a_min": 1.0,
        "train/reward_a_max": 5.0,
        "train/reward_a_group_std_mean": std / 2,
        "train/reward_a_group_std_min": 0.0,
        "train/reward_a_group_std_max": std,
        "train/reward_a_group_mean_std": 1.5,
        "train/reward_a_zero_std_ratio": 0.5,
        "train/reward_a_failure_rate": 0.0,
        "train/reward_a_failure_rate_group_max": 0.0,
        "train/reward_a_latency_p50_s": 1.0,
        "train/reward_a_latency_p95_s": 8.5,
        "train/reward_a_cache_hits": 4.0,
        "train/reward_b_mean": 1.75,
        "train/reward_b_failure_rate": 2 / 6,
        "train/reward_b_failure_rate_failed": 1 / 6,
        "train/reward_b_failure_rate_timeout": 1 / 6,
        "train/reward_b_failure_rate_unparsable": 0.0,
        "train/reward_b_failure_rate_group_max": 2 / 3,
        "train/reward_b_latency_p50_s": 2.0,
        "train/failure_rate": 2 / 12,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())


def test_the_weighted_sum_is_over_samples_that_have_every_reward(batch: RewardBatch) -> None:
    found = metrics(batch)
    totals = np.array([1.0, 2.5, 4.0, 7.0])
    assert found["train/reward_mean"] == pytest.approx(totals.mean())
    assert found["train/reward_std"] == pytest.approx(totals.std())
    assert found["train/reward_zero_std_ratio"] == 0.5  # the second group has one such sample
    assert "train/reward_mean" not in metrics(batch_of({"a": [1, 2]}, [0, 0]))


def test_advantages_are_logged_when_given(batch: RewardBatch) -> None:
    assert not any("adv" in key for key in metrics(batch))
    found = metrics(batch, np.array([-2, -1, 0, 0, 1, 3]), prefix="eval")
    assert {key: value for key, value in found.items() if "adv" in key} == pytest.approx(
        {"eval/adv_min": -2.0, "eval/adv_max": 3.0, "eval/adv_abs_mean": 7 / 6}
    )
    with pytest.raises(ValueError, match=r"advantages must have the shape \(6,\), found \(2,\)"):
        metrics(batch, [1, 2])


def test_what_has_no_value_has_no_key() -> None:
    failures = tuple(Failed(i, "a", "failed", "", 1) for i in range(2))
    found = metrics(batch_of({"a": [NAN, NAN]}, [0, 0], failures))
    assert found["train/reward_a_failure_rate"] == 1.0
    assert not any(key.endswith(("_mean", "_std", "_min", "_max", "_s")) for key in found if "failure" not in key)
    assert metrics(batch_of({"a": []}, [])) == {"train/reward_a_cache_hits": 0.0}


def part(batch: RewardBatch, start: int, stop: int) -> RewardBatch:
    """What one rank has of it."""
    cut = slice(start, stop)
    return batch_of(
        {name: list(values[cut]) for name, values in batch.rewards.items()},
        list(batch.groups[cut]),
        tuple(
            Failed(f.sample - start, f.reward, f.kind, f.message, f.attempts)
            for f in batch.failures
            if start <= f.sample < stop
        ),
        dict(batch.weights),
        num_hits={"a": 4, "b": 0} if start == 0 else {"a": 0, "b": 0},
        latency_s={name: values[cut] for name, values in batch.latency_s.items()},
    )


CUTS = [(0, 2), (2, 4), (4, 6)]


def test_the_numbers_of_several_ranks_are_those_of_one(batch: RewardBatch) -> None:
    advantages = gdpo(batch.rewards, batch.groups, batch.weights)

    def on_rank(rank: int, gather: Any) -> Any:
        return metrics(part(batch, *CUTS[rank]), advantages[slice(*CUTS[rank])], gather=gather)

    for found in Ranks(3).run(on_rank):
        assert found == pytest.approx(metrics(batch, advantages))


def test_numbers_are_named_after_the_split_unless_told_otherwise() -> None:
    evaluated = batch_of({"a": [1, 2]}, [0, 0], split="eval")
    assert "eval/reward_a_mean" in metrics(evaluated)
    assert "test/reward_a_mean" in metrics(evaluated, prefix="test")


def test_failures_are_reported_by_group(batch: RewardBatch) -> None:
    expected = {"cat": {"a": 0.0, "b": 0.0}, "dog": {"a": 0.0, "b": 2 / 3}}
    assert failure_rate_by_group(batch) == expected
    for found in Ranks(3).run(lambda rank, gather: failure_rate_by_group(part(batch, *CUTS[rank]), gather=gather)):
        assert found == expected


@pytest.mark.parametrize("group", [np.int64(7), 2**70, ("cat", frozenset({1, None}))])
def test_groups_of_ranks_keep_their_ids(group: Any) -> None:
    ranks = [batch_of({"a": [1, 2]}, [group] * 2), batch_of({"a": [3]}, [group])]
    for found in Ranks(2).run(lambda rank, gather: metrics(ranks[rank], gather=gather)):
        assert found["train/reward_a_group_std_mean"] == pytest.approx(math.sqrt(2 / 3))
    for by_group in Ranks(2).run(lambda rank, gather: failure_rate_by_group(ranks[rank], gather=gather)):
        assert by_group == {group: {"a": 0.0}}


@pytest.mark.parametrize("told", [metrics, failure_rate_by_group])
def test_ranks_with_other_rewards_are_an_error_on_all(told: Any) -> None:
    for raised in Ranks(2).run(lambda rank, gather: told(batch_of({"ab"[rank]: [1.0]}, ["g"]), gather=gather)):
        assert "ranks must have the same rewards, found [['a'], ['b']]" in str(raised)
