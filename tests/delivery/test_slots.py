"""A worker's slots: no error around a task costs one, and a worker that takes nothing any more is started again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest

from tasks.settings import load_settings
from tests.pipeline.conftest import assert_rewards, expected_ranks, jpeg_bytes, noisy, samples_of
from tests.servers import messages_in, run_python, wait_until, worker_env
from trainer_client import CollectTimeoutError, Sample
from workers.process.slots import LOOK_EVERY_S, LOOKS_ENDED
from workers.process.watchdog import EXIT_HUNG

MODULES = {"REWARDQ_MODULES": "tests.reward_models,tests.delivery.slot_models"}


def reward_of(model, **options):
    return {"reward_model": f"tests.delivery.slot_models.{model}", "name": "reward", "version": "1", **options}


def rank_samples_of(num_groups, group_size):
    return [
        Sample(prompt=f"group {g}", image=noisy(100 * g + i, 20 * i), group=str(g))
        for g in range(num_groups)
        for i in range(group_size)
    ]


@pytest.mark.parametrize("how", ["full", "away"])
def test_a_redis_that_is_full_or_away_for_longer_than_tasks_wait_costs_no_slot_also_of_chords(
    private_redis, clients, workers, how
):
    """Tasks wait a second here, where they wait two minutes; the chord of each is then not counted."""
    server = private_redis("--maxmemory-policy", "noeviction")
    settings = load_settings(broker_url=server.url, claim_ttl_s=2, reconcile_s=0.5)
    (worker,) = workers("gpu", settings=settings, env=MODULES)
    client = clients(
        reward_of("Impatient"), {"reward_model": "jpeg_compressibility_Rank", "batch_size": 2}, settings=settings
    )
    client.submit(samples_of([5]))
    assert client.collect(timeout_s=60).rewards["reward"].tolist() == [5]

    samples = rank_samples_of(num_groups=20, group_size=6)
    client.submit(samples, group_size=6)
    with server.client() as broker:
        wait_until(lambda: len(messages_in(broker, "gpu")) >= 10)
        if how == "full":
            broker.config_set("maxmemory", broker.info("memory")["used_memory"] // 2)
    if how == "full":
        wait_until(lambda: "left to be sent again" in worker.log_text or "worker waits" in worker.log_text, 30)
        time.sleep(12)
        with server.client() as broker:
            broker.config_set("maxmemory", 0)
    else:
        server.pause()
        time.sleep(12)
        server.resume()

    batch = client.collect(timeout_s=90)
    sizes = [-jpeg_bytes(sample.image) for sample in samples]
    expected = [rank for g in range(20) for rank in expected_ranks(sizes[6 * g : 6 * g + 6])]
    assert batch.rewards["jpeg_compressibility_Rank"].tolist() == pytest.approx(expected)
    assert worker.process.poll() is None
    assert num_slots_of(worker) == (2, [])


def num_slots_of(worker):
    """How many slots it has, and what Celery counts in them once it has nothing to do."""
    code = (
        "import json, tasks; i = tasks.app.control.inspect(timeout=3); "
        "stats, = i.stats().values(); active, = i.active().values(); reserved, = i.reserved().values(); "
        "print(json.dumps([stats['pool']['max-concurrency'], active + reserved]))"
    )
    said = run_python("-c", code, env=worker_env(worker.settings, {})).stdout
    num_slots, listed = json.loads(said)
    return num_slots, listed


def test_an_error_that_leaves_celerys_tracer_costs_no_slot(clients, workers):
    (worker,) = workers("gpu", concurrency=1, env=MODULES)
    client = clients(reward_of("BreaksTracer", batch_size=1))
    client.submit(samples_of(range(20)))
    batch = client.collect(timeout_s=60)
    assert batch.rewards["reward"].tolist() == list(range(20))
    assert re.search(r"its slot is free again task=rewardq.score id=\S+ error=MemoryError: planted", worker.log_text)
    assert worker.log_text.count("Traceback") == 1, "one a minute"
    assert worker.process.poll() is None


def health_of(worker):
    """What a container's health check says of the workers of this host."""
    command = [sys.executable, "-m", "workers.health"]
    env = worker_env(worker.settings, {})
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("LeaksSlots", "2 of its 2 slots are held by tasks that no thread runs"),
        ("Unacknowledged", r"it takes no message, though \d+ wait in its queues and 2 of its 2 slots are free"),
    ],
)
def test_a_worker_that_takes_nothing_any_more_is_named_and_ends_to_be_started_again(
    bench, clients, supervised, model, words
):
    supervisor = supervised("gpu", env=MODULES)
    client = clients(reward_of(model, batch_size=1))
    client.submit(samples_of([1]))
    client.collect(timeout_s=60)
    client.submit(samples_of(range(100, 120)))
    client.flush()
    with pytest.raises(CollectTimeoutError, match=rf"'gpu' has no worker that takes messages \(gpu\.\S+: {words}\)"):
        client.collect(timeout_s=24)
    checked = health_of(supervisor.worker)
    assert checked.returncode == 1
    assert re.search(rf"takes no messages: {words}", checked.stdout)
    batch = client.collect(timeout_s=90)
    assert batch.rewards["reward"].tolist() == list(range(100, 120))
    assert supervisor.statuses == [EXIT_HUNG]
    assert re.search(rf"worker ends, to be started again status=75: {words}", supervisor.log_text)


def test_a_worker_whose_queue_is_long_and_whose_slots_are_busy_is_not_stuck(clients, workers):
    (worker,) = workers("gpu", concurrency=1)
    slow = clients({"reward_model": "Slow", "seconds": 55})
    slow.submit(samples_of([1]))
    client = clients("PixelCode", run="behind")
    client.submit(samples_of([2]))
    time.sleep(LOOKS_ENDED * LOOK_EVERY_S + 3)
    assert worker.heartbeat().stuck == ""
    assert_rewards(slow.collect(timeout_s=120), [1], "Slow")
    assert_rewards(client.collect(timeout_s=120), [2])
    assert worker.process.poll() is None
