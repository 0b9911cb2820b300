"""Several trainer ranks: one verdict for all, advantages exact over all, train and eval side by side."""

from __future__ import annotations

import multiprocessing
import time
import uuid

import numpy as np
import pytest

from tasks import keys
from tasks.errors import RanksMissingError
from tests.pipeline.conftest import assert_rewards, config_of, samples_of, together
from tests.servers import wait_until
from tests.trainer.batches import batch_of
from trainer_client import CollectTimeoutError, Failed, RewardClient, ScoringError
from trainer_client.advantages.formulas import gdpo, weighted_sum
from trainer_client.advantages.metrics import metrics


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
    from tasks.servers.connections import connect

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


def brought(*values, step=0, group="g"):
    """What a rank has of a step; its group has members on each rank."""
    return batch_of({"r": list(values)}, [group] * len(values), weights={"r": 1.0}, step=step)


def over(*ranks):
    """The advantages of samples that are spread over ranks, computed in one place."""
    found = gdpo({"r": np.concatenate(ranks)}, ["g"] * sum(map(len, ranks)), {"r": 1.0})
    return np.split(found, np.cumsum([len(values) for values in ranks])[:-1])


def assert_over(found, *ranks):
    for of_rank, expected in zip(found, over(*ranks), strict=True):
        np.testing.assert_array_equal(of_rank, expected)


def test_a_rank_that_is_late_for_advantages_is_named_and_all_can_try_again(two_ranks):
    first, second = two_ranks("PixelCode")
    started = time.monotonic()
    with pytest.raises(RanksMissingError, match="rank 1 did not report on advantages of train step 3 in time"):
        first.advantages(brought(1.0, 2.0, step=3), timeout_s=1)
    assert time.monotonic() - started < 5
    with pytest.raises(RanksMissingError, match="rank 1 did not"):  # too late: that was decided
        second.advantages(brought(5.0, step=3), timeout_s=20)
    found = together(
        lambda: first.advantages(brought(1.0, 2.0, step=3)), lambda: second.advantages(brought(5.0, step=3))
    )
    assert_over(found, [1.0, 2.0], [5.0])


def test_a_rank_restarted_alone_takes_the_answers_of_its_step(two_ranks, clients):
    first, second = two_ranks("PixelCode")
    for step, (ours, theirs) in {0: ([1.0, 2.0], [9.0]), 17: ([4.0, 3.0], [3.5])}.items():
        for method in ("gdpo", "sum"):  # sum gives other numbers: each call has its own answers
            together(
                lambda s=step, v=ours, m=method: first.advantages(brought(*v, step=s), m),
                lambda s=step, v=theirs, m=method: second.advantages(brought(*v, step=s), m),
            )
    second.close()
    again = clients("PixelCode", rank=1, world_size=2, launch="one")
    np.testing.assert_array_equal(again.advantages(brought(3.5, step=17)), over([4.0, 3.0], [3.5])[1])
    by_sum = again.advantages(brought(3.5, step=17), "sum")
    np.testing.assert_array_equal(by_sum, weighted_sum({"r": [4.0, 3.0, 3.5]}, ["g"] * 3, {"r": 1.0})[2:])
    found = together(
        lambda: first.advantages(brought(1.0, step=18)), lambda: again.advantages(brought(2.0, 7.0, step=18))
    )
    assert_over(found, [1.0], [2.0, 7.0])


def test_a_rank_that_comes_after_the_others_gave_up_joins_their_next_try(clients):
    first = clients("PixelCode", rank=0, world_size=2, launch="one")
    for _ in range(2):
        with pytest.raises(RanksMissingError, match="rank 1 did not"):
            first.advantages(brought(1.0, 2.0), timeout_s=0.5)
    second = clients("PixelCode", rank=1, world_size=2, launch="one")
    found = together(lambda: first.advantages(brought(1.0, 2.0)), lambda: second.advantages(brought(5.0)))
    assert_over(found, [1.0, 2.0], [5.0])


def answer_and_wait(settings, told):
    with RewardClient.from_dict(
        config_of("PixelCode"), "test", rank=1, world_size=2, launch="one", settings=settings
    ) as client:
        told.set()
        client.advantages(brought(100.0))


def test_the_answer_of_a_killed_rank_does_not_count_once_its_successor_has_one(clients, settings, outcomes):
    context = multiprocessing.get_context("spawn")
    told = context.Event()
    killed = context.Process(target=answer_and_wait, args=(settings, told))
    killed.start()
    assert told.wait(30)
    wait_until(lambda: outcomes.redis.keys(keys.answer("test", "one", "*", 0, 1)))
    killed.kill()
    killed.join()
    wait_until(lambda: not outcomes.redis.exists(keys.trainer("test", "one", 1)), 20)
    first = clients("PixelCode", rank=0, world_size=2, launch="one")

    def restarted():
        time.sleep(1)
        return clients("PixelCode", rank=1, world_size=2, launch="one").advantages(brought(5.0))

    assert_over(together(lambda: first.advantages(brought(1.0, 2.0)), restarted), [1.0, 2.0], [5.0])


def test_a_job_that_starts_anew_under_its_old_launch_finds_no_old_answers(two_ranks):
    for ours, theirs in ([0.0, 1.0], [2.0, 3.5]), ([5.0, 5.5], [100.0, 200.0]):
        first, second = two_ranks("PixelCode")
        started = time.monotonic()
        found = together(
            lambda f=first, v=ours: f.advantages(brought(*v)),
            lambda s=second, v=theirs: (time.sleep(0.5), s.advantages(brought(*v)))[1],
        )
        assert_over(found, ours, theirs)
        assert time.monotonic() - started < 5
        first.close()
        second.close()


def test_a_rank_restarted_alone_joins_the_collect_that_follows_one_that_was_late(two_ranks, clients, workers):
    first, second = two_ranks("PixelCode")
    first.submit(samples_of([1]), step=4)
    second.submit(samples_of([2]), step=4)
    late = together(lambda: first.collect(timeout_s=2), lambda: second.collect(timeout_s=2))
    assert [type(error) for error in late] == [CollectTimeoutError] * 2
    second.close()
    workers("gpu")
    again = clients("PixelCode", rank=1, world_size=2, launch="one")
    again.submit(samples_of([3]), step=4)
    batches = together(lambda: first.collect(timeout_s=60), lambda: again.collect(timeout_s=60))
    assert [b.rewards["PixelCode"].tolist() for b in batches] == [[1.0], [3.0]]
    assert [(b.split, b.step) for b in batches] == [("train", 4)] * 2


@pytest.mark.parametrize("group", [2**70, frozenset({1}), b"x", ("cat", None), np.int64(3)])
def test_group_ids_of_any_plain_kind_go_through_redis(two_ranks, group):
    clients = two_ranks("PixelCode")
    found = together(
        *[lambda c=c, r=r: c.advantages(brought(1.0 + r, 4.0, group=group)) for r, c in enumerate(clients)]
    )
    assert_over(found, [1.0, 4.0], [2.0, 4.0])


def test_what_one_rank_cannot_tell_is_an_error_on_all_at_once(two_ranks):
    def gathers(rewards, groups, weights, *, gather):
        gather(object() if rewards["r"][0] == 1 else 0)

    def raises(rewards, groups, weights, *, gather):
        if rewards["r"][0] == 1:
            raise KeyError("mine")
        return rewards["r"]

    clients = two_ranks("PixelCode")
    started = time.monotonic()
    for method, group, message in (
        (gathers, "g", "rank 1: what it gathers is not plain data"),
        (raises, "g", "rank 1 of those gathered: KeyError: 'mine'"),
        ("gdpo", uuid.UUID(int=1), "rank 1 of those gathered: group ids that several ranks compare must be"),
    ):
        batches = [brought(0.0), brought(1.0, group=group)]
        found = together(
            *[lambda c=c, b=b, m=method: c.advantages(b, m) for c, b in zip(clients, batches, strict=True)]
        )
        for error in found:
            assert isinstance(error, ValueError)
            assert message in str(error)
    assert time.monotonic() - started < 10


def test_numbers_for_a_logger_are_those_of_all_ranks(two_ranks):
    failures = (Failed(1, "r", "failed", "", 1),)
    parts = [brought(1.0, 4.0), batch_of({"r": [7.0, float("nan")]}, ["g", "h"], failures, {"r": 1.0})]
    whole = batch_of(
        {"r": [1.0, 4.0, 7.0, float("nan")]}, ["g", "g", "g", "h"], (Failed(3, "r", "failed", "", 1),), {"r": 1.0}
    )
    clients = two_ranks("PixelCode")
    pairs = list(zip(clients, parts, strict=True))
    for found in together(*[lambda c=c, b=b: c.metrics(b) for c, b in pairs]):
        assert found == pytest.approx(metrics(whole), nan_ok=True)
    for found in together(*[lambda c=c, b=b: c.failure_rate_by_group(b) for c, b in pairs]):
        assert found == {"g": {"r": 0.0}, "h": {"r": 1.0}}


def test_differences_are_taken_at_their_word_if_asked(clients):
    batch = brought(25.0, np.nextafter(np.float32(25), np.float32(26)))
    client = clients("PixelCode")
    assert client.advantages(batch).tolist() == [0.0, 0.0]
    assert client.advantages(batch, noise_floor=False).tolist() == pytest.approx([-1.0, 1.0])
