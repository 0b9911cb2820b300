"""Groupwise rewards: whole groups to one model, ranks by chord, groups over several trainer ranks."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
import signal
import threading
import time

import msgpack
import numpy as np
import pytest

from tasks import keys
from tasks.celery_app import make_app
from tasks.messages import WIRE_VERSION, Heartbeat
from tasks.rewards import RewardConfig
from tasks.servers.connections import connect
from tasks.settings import load_settings
from tests.pipeline.conftest import (
    assert_rewards,
    config_of,
    expected_ranks,
    jpeg_bytes,
    noisy,
    samples_of,
    spread_over_ranks,
    together,
)
from tests.reward_models import image_of
from tests.servers import messages_in, wait_until
from trainer_client import CollectTimeoutError, InvalidSampleError, RewardClient, Sample


def rank_samples(groups: dict[str, list[np.ndarray]]) -> list[Sample]:
    return [Sample(image=image, group=group) for group, images in groups.items() for image in images]


def test_a_groupwise_model_gets_each_group_whole_and_once(clients, workers, tmp_path):
    calls = tmp_path / "calls"
    workers("gpu")
    client = clients({"reward_model": "OrderInGroup", "file": str(calls), "version": "1", "batch_size": 2})
    a, b = [30, 10, 20, 40], [7, 9, 8, 5]
    mixed = [s for pair in zip(samples_of(a, group="a"), samples_of(b, group="b"), strict=True) for s in pair]
    client.submit(mixed[:5], group_size=4)
    client.submit(mixed[5:], group_size=4)
    batch = client.collect(timeout_s=60)
    numbers = [n for pair in zip(a, b, strict=True) for n in pair]
    group_of = dict.fromkeys(a, a) | dict.fromkeys(b, b)
    assert_rewards(batch, [sorted(group_of[n]).index(n) for n in numbers], "OrderInGroup")
    assert calls.read_text().split() == ["4", "4"]


def test_a_group_of_unknown_size_is_what_was_submitted_for_it_until_collect(clients, workers):
    workers("gpu")
    client = clients("OrderInGroup")
    client.submit(samples_of([3, 1], group=0))
    client.submit(samples_of([2], group=0))
    assert_rewards(client.collect(timeout_s=60), [2, 0, 1], "OrderInGroup")


@pytest.mark.parametrize("batch_size", [16, 3])
def test_ranks_equal_those_by_hand_whether_the_group_is_one_task_or_a_chord(clients, workers, batch_size):
    workers("gpu")
    client = clients({"reward_model": "jpeg_incompressibility_Rank", "batch_size": batch_size})
    groups = {g: [noisy(i, 10 * i) for i in random.Random(g).sample(range(12), 8)] for g in ("x", "y")}
    groups["x"][3] = groups["x"][6]  # a tie
    client.submit(rank_samples(groups), group_size=8)
    batch = client.collect(timeout_s=60)
    expected = [r for images in groups.values() for r in expected_ranks([jpeg_bytes(i) for i in images])]
    np.testing.assert_allclose(batch.rewards["jpeg_incompressibility_Rank"], np.float32(expected), rtol=0, atol=1e-7)
    assert batch.info["jpeg_incompressibility_Rank"][0]["score"] == jpeg_bytes(groups["x"][0]) / 1000


@pytest.mark.parametrize("another", [True, False], ids=["another has it", "it ends"])
@pytest.mark.parametrize("model", ["jpeg_incompressibility", "jpeg_incompressibility_Rank"])
def test_what_waits_for_its_model_to_load_is_not_sent_again(clients, settings, outcomes, model, another):
    """A rank waits for the model that it ranks. It waits no longer once another worker has the model."""
    client = clients({"reward_model": model})
    (spec,) = (r.part for r in RewardConfig.from_dict(config_of({"reward_model": model})).rewards)

    def beat(node, **how):
        store = client._engine.store.identity()
        given = {"wire": WIRE_VERSION, "queues": ("gpu",), "host": "h", "pid": 1, "store": store, "state": "ready"}
        outcomes.beat(Heartbeat(node=node, **{**given, **how}), ttl_s=60)

    beat("gpu.1@h", state="loading", loading=(spec.fingerprint,))
    beat("gpu.2@h", loaded=("of other options",), models=(spec.reward_model,))
    beat("other.1@h", queues=("other",), loaded=(spec.fingerprint,), models=(spec.reward_model,))
    client.submit(rank_samples({"g": [noisy(i, 20 * i) for i in range(2)]}), group_size=2)
    client.flush()
    with connect(settings.broker) as broker:
        broker.delete("rewardq:queue:gpu\x06\x166")  # taken, and not claimed before the model is there
        outcomes.take("gpu", 1)
        time.sleep(8 * settings.reconcile_s)
        assert messages_in(broker, "gpu") == []
        with pytest.raises(CollectTimeoutError, match=r"gpu\.1@h is still loading jpeg_incompressibility\n"):
            client.collect(timeout_s=0.5)
        if another:
            beat("gpu.2@h", loaded=(spec.fingerprint,), models=(spec.reward_model,))
        else:
            outcomes.end_beat("gpu.1@h")
        wait_until(lambda: messages_in(broker, "gpu"))


def test_ties_can_be_ranked_in_their_order_as_flow_factory_does(clients, workers):
    workers("gpu")
    client = clients({"reward_model": "jpeg_incompressibility_Rank", "ties": "ordinal"})
    same, more = noisy(1, 10), noisy(2, 90)
    client.submit(rank_samples({"g": [more, same, same, same]}), group_size=4)
    ranks = client.collect(timeout_s=60).rewards["jpeg_incompressibility_Rank"]
    assert ranks[0] == 0.75
    assert sorted(ranks[1:]) == [0.0, 0.25, 0.5]


def test_a_member_without_a_score_is_nan_and_the_others_are_ranked_among_themselves(clients, workers):
    workers("gpu")
    client = clients({"reward_model": "jpeg_incompressibility_Rank", "batch_size": 2}, "OrderInGroup")
    images = [noisy(i, 20 * i + 1) for i in range(5)]
    samples = rank_samples({"g": images})
    samples[2].image = np.full((3, 8, 8), np.nan, np.float32)
    client.submit(samples, group_size=5)
    batch = client.collect(timeout_s=60, on_failure="nan")
    valid = [i for i in range(5) if i != 2]
    expected = expected_ranks([jpeg_bytes(images[i]) for i in valid])
    assert np.isnan(batch.rewards["jpeg_incompressibility_Rank"][2])
    np.testing.assert_allclose(batch.rewards["jpeg_incompressibility_Rank"][valid], np.float32(expected), atol=1e-7)
    assert batch.valid["OrderInGroup"].tolist() == [i != 2 for i in range(5)]
    assert {(f.sample, f.kind) for f in batch.failures} == {(2, "invalid")}


def test_a_groupwise_model_that_raises_fails_its_group_and_no_other(clients, workers):
    workers("gpu")
    client = clients("OrderInGroup")
    bad, good = samples_of([1, 2], group="bad"), samples_of([4, 3], group="good")
    bad[1].metadata = {"raise": True}
    client.submit([*bad, *good], group_size=2)
    batch = client.collect(timeout_s=60, on_failure="nan")
    assert np.isnan(batch.rewards["OrderInGroup"][:2]).all()
    assert batch.rewards["OrderInGroup"][2:].tolist() == [1.0, 0.0]
    assert "this group is bad" in batch.failures[0].message


def test_a_reward_and_its_rank_score_each_sample_once_and_in_the_same_messages(clients, workers, settings):
    client = clients(
        {"reward_model": "jpeg_incompressibility", "batch_size": 3},
        {"reward_model": "jpeg_incompressibility_Rank", "batch_size": 3},
    )
    images = [noisy(i, 15 * i) for i in range(9)]
    client.submit(rank_samples({"g": images}), group_size=9)
    client.flush()
    with connect(settings.broker) as broker:
        assert len(messages_in(broker, "gpu")) == 3  # the chord's header; nothing twice
    workers("gpu", "gpu")
    batch = client.collect(timeout_s=60)
    sizes = [jpeg_bytes(i) for i in images]
    np.testing.assert_allclose(batch.rewards["jpeg_incompressibility"], np.float32(sizes) / 1000, rtol=1e-6)
    np.testing.assert_allclose(batch.rewards["jpeg_incompressibility_Rank"], np.float32(expected_ranks(sizes)))
    with connect(settings.payloads) as store:
        wait_until(lambda: not store.keys(keys.payload("*")))


def test_the_same_group_again_is_answered_from_what_is_there(clients, workers, tmp_path):
    calls = tmp_path / "calls"
    workers("gpu")
    client = clients({"reward_model": "OrderInGroup", "file": str(calls), "version": "1"})
    for _ in range(2):
        client.submit(samples_of([5, 6, 4], group="g"), group_size=3)
        batch = client.collect(timeout_s=60)
        assert_rewards(batch, [1, 2, 0], "OrderInGroup")
    assert batch.num_hits == {"OrderInGroup": 3}
    assert calls.read_text().split() == ["3"]


def test_equal_groups_in_one_step_and_in_two_splits_share_one_answer(clients, workers, settings, tmp_path):
    calls = tmp_path / "calls"
    workers("gpu")
    rank = {"reward_model": "jpeg_incompressibility_Rank", "batch_size": 2}
    client = clients({"reward_model": "OrderInGroup", "file": str(calls), "version": "1"}, rank)
    for name in ("a", "b"):
        client.submit(samples_of([7, 5, 6], group=name), group_size=3)
        client.submit(samples_of([7, 5, 6], group=name), group_size=3, split="eval")
    for batch in (client.collect(timeout_s=60), client.collect(timeout_s=60, split="eval")):
        assert_rewards(batch, [2, 0, 1] * 2, "OrderInGroup")
        ranks = batch.rewards["jpeg_incompressibility_Rank"]
        assert ranks[:3].tolist() == ranks[3:].tolist()
    assert calls.read_text().split() == ["3"]
    with connect(settings.payloads) as store:
        wait_until(lambda: not store.keys(keys.payload("*")))


@pytest.mark.parametrize(
    ("samples", "group_size", "message"),
    [
        (samples_of([1, 2, 3], group="g"), 2, "group 'g' of step 0 would have 3 members, group_size=2"),
        (samples_of([1], group="g"), 0, "group_size must be at least 1"),
    ],
)
def test_submit_refuses_groups_that_cannot_be(clients, samples, group_size, message):
    client = clients("OrderInGroup")
    with pytest.raises(InvalidSampleError, match=message):
        client.submit(samples, group_size=group_size)
    assert client.pending() == 0


def test_a_group_that_nobody_can_complete_is_told_when_it_is_collected_and_can_still_be_completed(clients, workers):
    client = clients("OrderInGroup", "PixelCode")
    client.submit(samples_of([1, 2, 3], group="g"), group_size=5)
    # No worker serves: whoever waited here would wait until the deadline, which is after the test's own.
    with pytest.raises(CollectTimeoutError, match=r"group 'g' of step 0 has 3 of 5 members, 2 missing") as error:
        client.collect(timeout_s=600)
    assert "OrderInGroup needs whole groups" in str(error.value)
    assert len(error.value.batch) == 3
    workers("gpu")
    client.submit(samples_of([4, 5], group="g"), group_size=5)
    batch = client.collect(timeout_s=60)
    assert_rewards(batch, [1, 2, 3, 4, 5])
    assert_rewards(batch, [0, 1, 2, 3, 4], "OrderInGroup")


@pytest.mark.parametrize("when", ["encoded before", "encoded after"])
def test_where_failures_are_data_an_incomplete_group_is_one_and_the_rest_is_waited_for(
    clients, workers, never_idle, when
):
    workers("gpu")
    client = clients("OrderInGroup", "PixelCode")
    client.submit(samples_of([1, 2, 3], group="short"), group_size=4)
    client.submit(samples_of([5, 4], group="whole"), group_size=2)
    if when == "encoded before":
        client.flush()
    batch = client.collect(timeout_s=600, on_failure="nan")
    assert_rewards(batch, [1, 2, 3, 5, 4])
    np.testing.assert_array_equal(batch.rewards["OrderInGroup"], np.float32([np.nan] * 3 + [1, 0]))
    assert [(f.sample, f.reward, f.kind) for f in batch.failures] == [(i, "OrderInGroup", "invalid") for i in range(3)]
    assert "group 'short' of step 0 has 3 of 4 members, 1 missing" in batch.failures[0].message
    # The next step is another: a group of the same name is completed there.
    client.submit(samples_of([7, 8, 9, 6], group="short"), group_size=4)
    assert_rewards(client.collect(timeout_s=60), [1, 2, 3, 0], "OrderInGroup")


def test_a_ticket_of_a_part_of_a_group_waits_for_the_rest_of_it(clients, workers):
    workers("gpu")
    client = clients("OrderInGroup")
    first = client.submit(samples_of([1, 2], group="g"), group_size=3)
    with pytest.raises(CollectTimeoutError, match=r"has 2 of 3 members, 1 missing"):
        client.collect(ticket=first, timeout_s=2)  # another thread may be about to submit it
    client.submit(samples_of([3], group="g"), group_size=3)
    assert_rewards(client.collect(ticket=first, timeout_s=60), [0, 1], "OrderInGroup")


def test_a_group_of_unknown_size_that_waits_for_redis_says_so_and_misses_no_member(clients, private_redis):
    server = private_redis()
    client = clients("OrderInGroup", settings=load_settings(broker_url=server.url))
    client.submit(samples_of([1, 2], group="g"))
    client.flush()
    server.pause()
    client.submit(samples_of([3], group="g"))
    batch = client.collect(timeout_s=1, on_failure="nan")
    server.resume()
    assert len(batch.failures) == 3
    assert all("Redis is away" in failed.message for failed in batch.failures)


def trainer_rank(settings, rank, plan, pipe, config, first_step, dies_in_step):
    """A trainer process: submits its members step by step, in its order, and sends what it collected."""
    with RewardClient.from_dict(config, "ranks", rank=rank, world_size=4, launch="one", settings=settings) as client:
        for step in range(first_step, len(plan)):
            rng = random.Random(rank * 1000 + step)
            for i, (number, group) in enumerate(plan[step]):
                client.submit(samples_of([number], group=group), group_size=8, step=step)
                time.sleep(rng.random() * 0.01)
                if step == dies_in_step and i == len(plan[step]) // 2:
                    client.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
            batch = client.collect(timeout_s=120)
            pipe.send((rank, step, batch.rewards["OrderInGroup"].tolist()))
    pipe.send((rank, -1, []))


def test_fifty_groups_over_four_ranks_one_of_them_killed_are_computed_once_each(workers, settings, tmp_path):
    calls = tmp_path / "calls"
    config = config_of({"reward_model": "OrderInGroup", "file": str(calls), "version": "1"})
    workers("gpu", "gpu")
    num_steps, num_groups, killed = 5, 10, 2
    plans, groups = spread_over_ranks(random.Random(7), 4, num_steps, num_groups, group_size=8)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()

    def start(rank, first_step=0, dies_in_step=-1):
        args = (settings, rank, plans[rank], theirs, config, first_step, dies_in_step)
        process = context.Process(target=trainer_rank, args=args)
        process.start()
        return process

    processes = [start(rank, dies_in_step=2 if rank == killed else -1) for rank in range(4)]
    ended, collected = set(), set()
    deadline = time.monotonic() + 150
    while len(ended) < 4:
        assert time.monotonic() < deadline, f"only {sorted(collected)} were collected"
        if processes[killed].exitcode == -signal.SIGKILL:
            processes[killed] = start(killed, first_step=2)
        if not ours.poll(1):
            continue
        rank, step, rewards = ours.recv()
        if step < 0:
            ended.add(rank)
            continue
        collected.add((rank, step))
        assert rewards == [sorted(groups[step, group]).index(n) for n, group in plans[rank][step]]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len(collected) == 4 * num_steps
    assert calls.read_text().split() == ["8"] * (num_steps * num_groups)


def test_ranks_over_two_trainer_ranks_and_a_slot_beyond_the_group(clients, workers):
    workers("gpu")
    config = {"reward_model": "jpeg_incompressibility_Rank", "batch_size": 2}
    first = clients(config, rank=0, world_size=2, launch="one")
    second = clients(config, rank=1, world_size=2, launch="one")
    images = [noisy(i, 15 * i) for i in (3, 0, 5, 2, 4)]
    first.submit(rank_samples({"g": images[:3]}), group_size=5, step=0)
    first.flush()
    second.submit(rank_samples({"g": images[3:]}), group_size=5, step=0)
    ranks = expected_ranks([jpeg_bytes(i) for i in images])
    name = "jpeg_incompressibility_Rank"
    batches = together(lambda: first.collect(timeout_s=60), lambda: second.collect(timeout_s=60))
    np.testing.assert_allclose([*batches[0].rewards[name], *batches[1].rewards[name]], np.float32(ranks))

    second.submit(rank_samples({"g": [noisy(9, 9)]}), group_size=5, step=0)
    none, batch = together(
        lambda: first.collect(timeout_s=30, step=0), lambda: second.collect(timeout_s=30, on_failure="nan")
    )
    assert none.rewards[name].shape == (0,)
    assert "the group was scored with another sample in this slot" in batch.failures[0].message


def test_a_restarted_rank_with_the_same_samples_gets_the_same_group(clients, workers, tmp_path):
    calls = tmp_path / "calls"
    config = {"reward_model": "OrderInGroup", "file": str(calls), "version": "1"}
    workers("gpu")
    other = clients(config, rank=0, world_size=2, launch="one")
    other.submit(samples_of([10, 30], group="g"), group_size=4, step=3)
    before = clients(config, rank=1, world_size=2, launch="one")
    before.submit(samples_of([20], group="g"), group_size=4, step=3)
    before.flush()
    before.close()  # and its successor draws another second sample
    after = clients(config, rank=1, world_size=2, launch="one")
    after.submit(samples_of([25, 40], group="g"), group_size=4, step=3)
    batches = together(lambda: other.collect(timeout_s=60), lambda: after.collect(timeout_s=60))
    assert_rewards(batches[0], [0, 2], "OrderInGroup")
    assert_rewards(batches[1], [1, 3], "OrderInGroup")
    assert calls.read_text().split() == ["4"]


@pytest.mark.parametrize("name", ["OrderInGroup", "jpeg_incompressibility_Rank"])
def test_a_rank_restarted_with_other_samples_after_its_group_was_sealed_seals_it_anew(clients, workers, name):
    config = {"reward_model": name, "version": "1"}
    other = clients(config, rank=0, world_size=2, launch="one")
    other.submit(rank_samples({"g": [image_of(10), image_of(30)]}), group_size=4, step=0)
    other.flush()
    before = clients(config, rank=1, world_size=2, launch="one")
    before.submit(rank_samples({"g": [image_of(20), image_of(40)]}), group_size=4, step=0)
    before.flush()
    wait_until(lambda: all(g.awaited is not None for g in other._engine._state.groups))
    before.close()
    after = clients(config, rank=1, world_size=2, launch="one")
    after.submit(rank_samples({"g": [image_of(21), image_of(5)]}), group_size=4, step=0)
    after.flush()
    workers("gpu")
    batches = together(lambda: other.collect(timeout_s=60), lambda: after.collect(timeout_s=60))
    found = [*batches[0].rewards[name], *batches[1].rewards[name]]
    sizes = [jpeg_bytes(image_of(n)) for n in (10, 30, 21, 5)]
    np.testing.assert_allclose(found, [1, 3, 2, 0] if name == "OrderInGroup" else np.float32(expected_ranks(sizes)))


def test_a_group_that_two_ranks_overfill_has_its_members_and_the_others_are_told(clients, workers):
    workers("gpu")
    first, second = (clients("OrderInGroup", rank=r, world_size=2, launch="one") for r in range(2))
    for g in range(8):
        first.submit(samples_of([10 * g + 1, 10 * g + 2, 10 * g + 3], group=g), group_size=4, step=0)
    for g in range(8):
        second.submit(samples_of([10 * g + 4, 10 * g + 5, 10 * g + 6], group=np.int64(g)), group_size=4, step=0)
    batches = together(*(lambda c=c: c.collect(timeout_s=60, on_failure="nan") for c in (first, second)))
    valid = [b.valid["OrderInGroup"] for b in batches]
    assert sum(v.sum() for v in valid) == 8 * 4
    failures = [f for b in batches for f in b.failures]
    assert len(failures) == 8 * 2
    assert {f.kind for f in failures} == {"invalid"}
    assert all(
        re.search(r"group \S+: it has its 4 members already, this sample is one more", f.message) for f in failures
    )


def test_ranks_that_differ_about_the_size_of_a_group_are_told(clients):
    first, second = (clients("OrderInGroup", rank=r, world_size=2, launch="one") for r in range(2))
    first.submit(samples_of([1, 2], group="g"), group_size=4, step=0)
    first.flush()
    second.submit(samples_of([3, 4], group=np.str_("g")), group_size=2, step=0)
    batches = together(*(lambda c=c: c.collect(timeout_s=4, on_failure="nan") for c in (first, second)))
    assert {f.kind for f in batches[0].failures} == {"timeout"}
    assert "rank 0: samples 0, 1 are there" in batches[0].failures[0].message
    assert "group 'g' of step 0 has 2 of 4 members, 2 missing" in batches[0].failures[0].message
    assert "group_size=2 here, another rank said group_size=4" in batches[1].failures[0].message


def test_groups_survive_an_emptied_redis(clients, workers, settings, redis_server):
    workers("gpu")
    config = {"reward_model": "jpeg_incompressibility_Rank", "batch_size": 2}
    first = clients(config, rank=0, world_size=2, launch="one")
    second = clients(config, rank=1, world_size=2, launch="one")
    images = [noisy(i, 15 * i) for i in range(6)]
    first.submit(rank_samples({"g": images[:3]}), group_size=6, step=0)
    first.flush()
    with redis_server.client() as client:
        client.flushall()
    second.submit(rank_samples({"g": images[3:]}), group_size=6, step=0)
    ranks = expected_ranks([jpeg_bytes(i) for i in images])
    name = "jpeg_incompressibility_Rank"
    batches = together(lambda: first.collect(timeout_s=60), lambda: second.collect(timeout_s=60))
    np.testing.assert_allclose([*batches[0].rewards[name], *batches[1].rewards[name]], np.float32(ranks))


@pytest.mark.parametrize("is_answered_late", [False, True])
def test_a_group_that_one_rank_alone_has_seen_answered_survives_an_emptied_redis(
    clients, workers, redis_server, monkeypatch, tmp_path, is_answered_late
):
    calls = tmp_path / "calls"
    config = {"reward_model": "OrderInGroup", "file": str(calls), "version": "1"}
    workers("gpu")
    ranks = [clients(config, rank=r, world_size=2, launch="one") for r in range(2)]
    ranks[1].submit(samples_of([20, 40], group="g"), group_size=4, step=0)
    ranks[1].flush()
    with monkeypatch.context() as patch:
        patch.setattr(ranks[1]._engine._loop, "_turn", lambda: time.sleep(0.05))
        time.sleep(0.6)
        ranks[0].submit(samples_of([10, 30], group="g"), group_size=4, step=0)
        wait_until(lambda: ranks[0].pending() == 0, 30)
        with redis_server.client() as redis:
            kept = [(name, redis.dump(name)) for name in redis.keys("rewardq:outcome:*") if is_answered_late]
            redis.flushall()
            for name, outcome in kept:
                redis.restore(name, 60_000, outcome)
    batches = together(*(functools.partial(rank.collect, timeout_s=30) for rank in ranks))
    assert_rewards(batches[0], [0, 2], "OrderInGroup")
    assert_rewards(batches[1], [1, 3], "OrderInGroup")
    assert calls.read_text().split() == ["4"]


def test_messages_that_arrive_twice_change_nothing(clients, workers, settings, redis_server, tmp_path):
    """Headers and bodies of chords, groups in one task and whole groups: each is there twice, and once more later."""
    calls = tmp_path / "calls"
    rank = {"reward_model": "jpeg_incompressibility_Rank", "batch_size": 2}
    within = {**rank, "name": "within", "batch_size": 16, "ties": "ordinal"}
    whole = {"reward_model": "OrderInGroup", "file": str(calls), "version": "1"}
    client = clients(rank, within, whole)
    images = [noisy(i, 15 * i) for i in range(6)]
    client.submit(rank_samples({"g": images}), group_size=6)
    client.flush()
    with redis_server.client() as broker, results_of_tasks(settings) as (app, results):
        lists = [(name, messages) for name in broker.keys("rewardq:queue:gpu*") if (messages := list_in(broker, name))]
        assert sum(len(messages) for _, messages in lists) >= 4
        bodies = [body for _, messages in lists for m in messages if (body := body_in(m)) is not None]
        assert bodies

        def send_again():
            for name, messages in lists:
                broker.rpush(name, *messages)
            for body in bodies:
                app.send_task(body["task"], args=body["args"], queue="gpu", ignore_result=True)

        def outcomes():
            return {name: broker.get(name) for name in broker.keys(keys.outcome("*"))}

        send_again()
        workers("gpu")
        batch = client.collect(timeout_s=60)
        wait_until(lambda: not any(list_in(broker, name) for name, _ in lists))
        before = outcomes()
        send_again()
        wait_until(lambda: not any(list_in(broker, name) for name, _ in lists))
        time.sleep(1)  # the last of them is at work, and any body they would send
        assert outcomes() == before
        wait_until(lambda: len(results) >= 3 * sum(len(messages) for _, messages in lists))
        num_scored = sum(int(number) for words in results for number in re.findall(r"(\d+) scored", words))
        assert num_scored == len(images) + len(images), "6 for both ranks together, 6 for the groupwise model"
    ranks = np.float32(expected_ranks([jpeg_bytes(i) for i in images]))
    np.testing.assert_allclose(batch.rewards["jpeg_incompressibility_Rank"], ranks)
    np.testing.assert_allclose(batch.rewards["within"], ranks)
    assert calls.read_text().split() == ["6"]


@contextlib.contextmanager
def results_of_tasks(settings):
    """An app, and what workers say that each task came to while this is open."""
    app, results = make_app(settings), []
    with app.connection_for_read() as connection:
        handlers = {"task-succeeded": lambda event: results.append(event["result"])}
        receiver = app.events.Receiver(connection, handlers=handlers)
        listener = threading.Thread(target=receiver.capture, kwargs={"wakeup": False})
        listener.start()
        try:
            yield app, results
        finally:
            receiver.should_stop = True
            listener.join()
            app.close()


def body_in(message):
    """The task that a chord's header carries along, to be sent when all of them are done; None where there is none."""
    _args, _kwargs, embedded = msgpack.unpackb(base64.b64decode(json.loads(message)["body"]))
    return embedded["chord"]


def list_in(broker, name):
    return broker.lrange(name, 0, -1) if broker.type(name) == b"list" else []


def test_image_of_carries_its_number():
    assert image_of(70_000)[0, 0].tolist() == [1, 17, 112]
