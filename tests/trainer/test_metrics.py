"""What a logger is told of a batch, against numbers computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.trainer.batches import NAN, Ranks, batch_of
from trainer_client.advantages.formulas import gdpo
from trainer_client.advantages.metrics import failure_rate_by_group, metrics
from trainer_client.failure_reasons import Failed
from trainer_client.results import RewardBatch


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
    unknown = {f"train/{name}_s" for name in ("submit", "wait", "ranks", "span", "hidden")}  # of a batch made by hand
    assert all(isinstance(value, float) and math.isfinite(value) for key, value in found.items() if key not in unknown)


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


def same_key_set(*steps: RewardBatch, **options: Any) -> bool:
    found = [metrics(batch, np.zeros(len(batch)), **options) for batch in steps]
    return len({tuple(sorted(one)) for one in found}) == 1


@pytest.mark.parametrize("detail", ["brief", "full"])
def test_a_step_has_the_same_keys_whatever_fails_in_it(batch: RewardBatch, detail: str) -> None:
    names, weights = ("a", "b"), {"a": 1.0, "b": 0.5}
    failures = tuple(Failed(i, name, "timeout", "", 1) for i in range(6) for name in names)
    none = batch_of({name: [NAN] * 6 for name in names}, list(batch.groups), failures, weights)
    empty = batch_of({name: [] for name in names}, [], (), weights)
    timed = batch_of({name: [1.0, 2.0] for name in names}, ["g", "g"], (), weights)
    assert same_key_set(batch, none, empty, timed, detail=detail)


def test_what_has_no_value_is_nan_and_no_number() -> None:
    failures = tuple(Failed(i, "a", "failed", "", 1) for i in range(2))
    found = metrics(batch_of({"a": [NAN, NAN]}, [0, 0], failures))
    assert found["train/reward_a_failure_rate"] == 1.0
    assert math.isnan(found["train/reward_a_mean"])
    assert math.isnan(found["train/reward_a_zero_std_ratio"])
    empty = metrics(batch_of({"a": []}, []))
    assert math.isnan(empty["train/reward_a_failure_rate"])
    assert math.isnan(empty["train/failure_rate"])
    assert empty["train/reward_a_cache_hits"] == 0.0


def test_where_the_time_went_is_among_them_and_what_was_hit_and_rescored() -> None:
    def of_rank(wait_s: float, hidden_s: float, num_hits: int) -> RewardBatch:
        return replace(
            batch_of({"a": [1.0, 2.0], "b": [1.0, 2.0]}, ["g", "g"], num_hits={"a": num_hits, "b": 0}),
            timings={
                "submit_s": 0.5,
                "wait_s": wait_s,
                "ranks_s": 3.5 - wait_s,
                "span_s": 9.0,
                "hidden_s": hidden_s,
                "encode_s": 1.0,
            },
            num_rescored={"a": 0, "b": 1},
        )

    ranks = [of_rank(3.0, 6.0, 1), of_rank(2.0, 7.0, 2)]
    expected = {
        "train/submit_s": 0.5,
        "train/wait_s": 3.0,
        "train/ranks_s": 1.5,
        "train/span_s": 9.0,
        "train/hidden_s": 6.0,
        "train/cache_hits": 3.0,
        "train/reward_a_cache_hits": 3.0,
        "train/rescored": 2.0,
        "train/reward_b_rescored": 2.0,
    }
    for found in Ranks(2).run(lambda rank, gather: metrics(ranks[rank], gather=gather)):
        assert {key: found[key] for key in expected} == expected
        assert "train/encode_s" not in found


def test_five_rewards_are_about_thirty_keys_in_brief() -> None:
    names = ["text", "looks", "aesthetic", "clip", "rank"]
    five = batch_of({name: [1.0, 2.0] for name in names}, ["g", "g"], weights=dict.fromkeys(names, 1.0))
    brief = metrics(five, np.zeros(2), detail="brief")
    assert 25 <= len(brief) <= 32
    full = metrics(five, np.zeros(2))
    assert {key: full[key] for key in brief} == pytest.approx(brief, nan_ok=True)
    assert {f"train/reward_{name}_failure_rate" for name in names} | {"train/reward_mean", "train/wait_s"} <= set(brief)
    with pytest.raises(ValueError, match="detail must be 'brief' or 'full', found 'short'"):
        metrics(five, detail="short")  # type: ignore[arg-type]


def test_a_rank_without_samples_does_not_decide_which_keys_there_are() -> None:
    ranks = [batch_of({"a": [1.0, 2.0]}, ["g", "g"]), batch_of({"a": []}, [])]
    given = [[None, []], [[1.0, -1.0], []]]
    for advantages, has_keys in zip(given, (False, True), strict=True):
        found = Ranks(2).run(lambda rank, gather, mine=advantages: metrics(ranks[rank], mine[rank], gather=gather))
        assert [("train/adv_min" in one) for one in found] == [has_keys] * 2


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
        assert found == pytest.approx(metrics(batch, advantages), nan_ok=True)


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
