from __future__ import annotations

import os
import platform
import time

import numpy as np
import pytest

from tasks.errors import RankTakenError
from tasks.servers.connections import connect
from tasks.settings import load_settings
from tests.delivery import trainers_die
from tests.delivery.seen import reward_of
from tests.delivery.trainers_die import RANK_LOCK_S, job
from tests.pipeline.conftest import jpeg_bytes, together
from tests.reward_models import image_of
from tests.servers import wait_until
from trainer_client import Sample

GONE_MEANWHILE = -2
"""What Redis says of the time that a key has left that is not there."""


def test_a_successor_collects_the_ticket_of_a_trainer_that_was_killed(bench):
    seen = trainers_die.kill_between_submit_and_collect(bench, tries=1)
    seen.assert_held()
    assert seen.again == 0


def test_a_successor_collects_a_ticket_of_which_half_was_answered_when_its_trainer_was_killed(bench):
    seen = trainers_die.kill_when_half_is_answered(bench, tries=1)
    seen.assert_held()
    assert seen.again == 0


def test_what_a_killed_trainer_had_not_sent_is_failed_with_that_reason(bench):
    seen = trainers_die.kill_between_two_chunks(bench, tries=2)
    seen.assert_held()


def test_a_job_started_again_is_answered_from_what_was_scored(bench):
    seen = trainers_die.start_again(bench, tries=1)
    seen.assert_held()
    assert seen.again <= 8  # what was in hand when it died, if it was claimed but not answered yet


def test_a_second_trainer_of_the_same_rank_is_refused_with_the_name_of_the_first(bench):
    first = job(bench, reward_of("Logged", calls="unused"), "time.sleep(600)", launch="one")
    started = time.monotonic()
    with pytest.raises(RankTakenError, match=f"process {first.pid} on {platform.node()} .*, which is alive"):
        bench.clients(reward_of("Logged", calls="unused"), run="job", launch="one")
    assert time.monotonic() - started < RANK_LOCK_S
    bench.clients(reward_of("Logged", calls="unused"), run="job", launch="two")
    bench.clients(reward_of("Logged", calls="unused"), run="job", launch="one", rank=1, world_size=2)


def test_a_trainer_that_was_paused_and_replaced_stops_instead_of_mixing_its_steps(bench):
    waited_s, words = trainers_die.pause_trainer(bench)
    assert waited_s < RANK_LOCK_S + 3
    assert words.startswith("RankTakenError: run 'job', launch 'one', rank 0 is taken by process")
    assert f"process {os.getpid()} on" in words


def test_killed_trainers_keys_all_have_a_time_to_live_and_are_gone_after_it(bench, redis_url):
    """Of a pointwise reward, a group over two ranks that is scored by a chord, and a verdict among the ranks."""
    times = load_settings(broker_url=redis_url, claim_ttl_s=1, reconcile_s=0.5, result_ttl_s=6, payload_ttl_s=3)
    env = {"REWARDQ_RESULT_TTL_S": "6", "REWARDQ_PAYLOAD_TTL_S": "3"}
    (worker,) = bench.workers("gpu", settings=times, env=env)
    rewards = (
        reward_of("Logged", calls=str(bench.calls.path), seconds=0.2, batch_size=4),
        {"name": "rank", "reward_model": "jpeg_incompressibility_Rank", "batch_size": 2},
    )
    what = """
client.submit(samples_of(range({0}, {0} + 6), group="whole"), group_size=12, step=0)
client.collect(timeout_s=60)
client.submit(samples_of(range({0} + 20, {0} + 26), group="whole"), group_size=12, step=1)
client.submit(samples_of(range({0} + 40, {0} + 46), group="half"), group_size=18, step=1)
client.flush()
say("sent")
time.sleep(600)
"""
    ranks = [
        job(bench, rewards, what.format(100 * rank), env=env, launch="one", rank=rank, world_size=2) for rank in (0, 1)
    ]
    unseen = [f"rewardq:{kind}" for kind in ("outcome", "claim", "group", "payload", "ledger", "answer", "trainer")]
    unseen.append("rewardq:celery-taskset-meta-")  # of a chord

    def all_were_seen():
        names = keys_of_runs(redis_url)
        unseen[:] = [kind for kind in unseen if not any(name.startswith(kind) for name in names)]
        return not unseen

    wait_until(all_were_seen, 60)  # not all at once: a claim may be gone when the last is sent
    for rank in ranks:
        assert rank.line() == "sent"
    for rank in ranks:
        rank.kill()
    long_lived = ("rewardq:answer:", "rewardq:celery-")
    wait_until(lambda: all(name.startswith(long_lived) for name in keys_of_runs(redis_url)), 60, pace_s=0.2)
    left = keys_of_runs(redis_url)
    assert {name: left_s for name, left_s in left.items() if not 0 < left_s <= 3600} == {}
    assert worker.process.poll() is None


def keys_of_runs(url):
    """Seconds left (-1: it lives for ever) of each key of the server that belongs to a run: all but those of workers,
    counters of queues, what marks a store as itself, and Kombu's bindings."""
    of_workers = ("rewardq:worker", "rewardq:store", "rewardq:room")
    of_none = (*of_workers, "rewardq:sent:", "rewardq:taken:", "rewardq:queue:_kombu.binding")
    found = {}
    with connect(url) as client:
        databases = [name.removeprefix("db") for name in client.info("keyspace")]
    for database in databases:
        with connect(url.removesuffix("0") + database) as client:
            names = [name.decode() for name in client.keys("*")]
            left_ms = {name: client.pttl(name) for name in names if not name.startswith(of_none)}
        found |= {name: ms / 1000 for name, ms in left_ms.items() if ms != GONE_MEANWHILE}
    return found


def test_groups_of_a_job_started_again_do_not_mix_with_those_of_the_one_that_died(bench):
    """Rank 0 of the first launch left half a group; the second launch submits other images under the same names."""
    reward = {"name": "rank", "reward_model": "jpeg_incompressibility_Rank"}
    bench.workers("gpu")
    old, new = [image(n) for n in range(4)], [image(n) for n in range(100, 104)]

    def submit_half(rank, launch, images):
        client = bench.clients(reward, run="job", launch=launch, rank=rank, world_size=2)
        client.submit([Sample(image=i, group="g") for i in images], group_size=4, step=0)
        client.flush()
        return client

    submit_half(0, "one", old[:2])._engine._loop.close()  # as if it had died here
    first, second = submit_half(0, "two", new[:2]), submit_half(1, "two", new[2:])
    batches = together(lambda: first.collect(timeout_s=60), lambda: second.collect(timeout_s=60))
    rewards = np.concatenate([batch.rewards["rank"] for batch in batches])
    sizes = [jpeg_bytes(one) for one in new]
    assert len(set(sizes)) == 4
    np.testing.assert_array_equal(rewards, [sorted(sizes).index(size) / 4 for size in sizes])


def image(number):
    return image_of(number, 32 + number % 7 * 8, 48)
