"""Several trainer ranks: one verdict for all, advantages exact over all, train and eval side by side."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.pipeline.conftest import assert_rewards, samples_of, together
from tests.servers import wait_until
from trainer_client import CollectTimeoutError, RewardClient, ScoringError
from trainer_client.advantages import gdpo


@pytest.fixture
def two_ranks(clients):
    return lambda *rewards: [clients(*rewards, rank=r, world_size=2, launch="one") for r in range(2)]


def test_advantages_of_two_ranks_are_those_of_one_over_all_their_samples(two_ranks, workers):
    workers("gpu")
    first, second = two_ranks("PixelCode", {"reward_model": "OrderInGroup", "weight": 0.5})
    numbers = ([5, 90, 7, 40], [3, 60, 8, 2])
    groups = (["a", "b", "a", "b"], ["b", "a", "a", "b"])
    for client, ns, gs in zip((first, second), numbers, groups, strict=True):
        for n, g in zip(ns, gs, strict=True):
            client.submit(samples_of([n], group=g), group_size=4, step=0)
    batches = together(lambda: first.collect(timeout_s=60), lambda: second.collect(timeout_s=60))
    found = together(lambda: first.advantages(batches[0]), lambda: second.advantages(batches[1]))
    all_numbers, all_groups = np.array(numbers[0] + numbers[1], float), groups[0] + groups[1]
    members = {g: sorted(n for n, h in zip(all_numbers, all_groups, strict=True) if h == g) for g in "ab"}
    order = [members[g].index(n) for n, g in zip(all_numbers, all_groups, strict=True)]
    weights = {"PixelCode": 1.0, "OrderInGroup": 0.5}
    expected = gdpo({"PixelCode": all_numbers, "OrderInGroup": np.array(order, float)}, all_groups, weights)
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-6)


def test_a_failure_on_one_rank_is_raised_on_all(two_ranks, workers):
    workers("gpu")
    first, second = two_ranks("RaisesOn")
    bad = samples_of([1, 2])
    bad[0].metadata = {"raise": True}
    first.submit(bad, step=0)
    second.submit(samples_of([3, 4]), step=0)
    errors = together(lambda: first.collect(timeout_s=60), lambda: second.collect(timeout_s=60))
    assert [type(e) for e in errors] == [ScoringError, ScoringError]
    assert "this sample is bad" in str(errors[0])
    assert "rank 0: " in str(errors[1])
    assert errors[1].batch.valid["RaisesOn"].all()
    for client in (first, second):  # both go on
        client.submit(samples_of([5]), step=1)
    batches = together(lambda: first.collect(timeout_s=60), lambda: second.collect(timeout_s=60))
    assert [b.rewards["RaisesOn"].tolist() for b in batches] == [[5.0], [5.0]]


def test_a_rank_that_does_not_report_makes_all_raise_at_the_deadline_and_all_can_try_again(two_ranks, workers):
    workers("gpu")
    first, second = two_ranks("PixelCode")
    first.submit(samples_of([1]), step=0)
    second.submit(samples_of([2]), step=0)
    started = time.monotonic()
    with pytest.raises(CollectTimeoutError, match="rank 1 did not report on train step 0"):
        first.collect(timeout_s=4)
    assert time.monotonic() - started < 8
    with pytest.raises(CollectTimeoutError):  # too late: the step was decided
        second.collect(timeout_s=20)
    batches = together(lambda: first.collect(timeout_s=60), lambda: second.collect(timeout_s=60))
    assert [b.rewards["PixelCode"].tolist() for b in batches] == [[1.0], [2.0]]


def test_advantages_follow_the_config_and_mask_what_failed(workers, settings):
    workers("gpu")
    config = {
        "train": {"advantage_aggregation": "sum"},
        "rewards": [{"name": "r", "reward_model": "tests.reward_models.RaisesOn", "weight": 2.0, "on_failure": "nan"}],
    }
    samples = samples_of([10, 20, 30, 77], group="g")
    samples[3].metadata = {"raise": True}
    with RewardClient.from_dict(config, "sum", settings=settings) as client:
        client.submit(samples)
        batch = client.collect(timeout_s=60)
        found = client.advantages(batch)
        by_gdpo = client.advantages(batch, "gdpo")
    # by hand: 2r - 40 = -20, 0, 20 over the population deviation of (20, 40, 60)
    std = np.sqrt((400 + 0 + 400) / 3)
    np.testing.assert_allclose(found, np.float32([-20 / std, 0, 20 / std, 0]), atol=1e-6)
    assert np.isfinite(by_gdpo).all()
    assert by_gdpo[3] == 0
    assert batch.latency_s["r"].shape == (4,)
    assert (batch.latency_s["r"] > 0).all()


def test_train_and_eval_steps_are_open_at_the_same_time_and_have_their_own_rewards(workers, settings, tmp_path):
    calls = tmp_path / "calls"
    counted = {"reward_model": "tests.reward_models.Counts", "file": str(calls), "version": "1"}
    config = {
        "rewards": [
            {"name": "train_only", "reward_model": "tests.reward_models.PixelCode"},
            {"name": "both", **counted},
        ],
        "eval_rewards": [
            {"name": "again", **counted},
            {"name": "order", "reward_model": "tests.reward_models.OrderInGroup"},
        ],
    }
    workers("gpu")
    with RewardClient.from_dict(config, "splits", settings=settings) as client:
        client.submit(samples_of([1, 2]))
        client.submit(samples_of([2, 1, 3], group="e"), split="eval")
        client.submit(samples_of([3]))
        evaluated = client.collect(timeout_s=60, split="eval")
        trained = client.collect(timeout_s=60)
    assert_rewards(evaluated, [2, 1, 3], "again")
    assert_rewards(evaluated, [1, 0, 2], "order")
    assert_rewards(trained, [1, 2, 3], "train_only")
    assert_rewards(trained, [1, 2, 3], "both")
    assert set(trained.rewards) == {"train_only", "both"}
    assert sorted(calls.read_text().split()) == ["1", "2", "3"]


def test_cancel_drops_the_step_and_frees_what_it_stored(clients, settings, workers):
    from tasks import keys
    from tasks.connections import connect

    client = clients("PixelCode")
    client.submit(samples_of(range(8)))
    client.flush()
    client.cancel()
    assert client.pending() == 0
    with connect(settings.payloads) as store:
        wait_until(lambda: not store.keys(keys.payload("*")))
    workers("gpu")
    client.submit(samples_of([1, 9]))
    assert_rewards(client.collect(timeout_s=60), [1, 9])
