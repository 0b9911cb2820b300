"""Work that nobody waits for any more costs workers its look-up, and no more."""

from __future__ import annotations

import time

import pytest

from tasks import keys
from tasks.servers.connections import connect
from tasks.settings import load_settings
from tests.delivery.messages_lost import queued_in
from tests.delivery.seen import Seen, reward_of, step
from tests.pipeline.conftest import assert_rewards, samples_of
from tests.servers import wait_until

NUM_SAMPLES, CHUNK_S = 80, 5.0


@pytest.mark.parametrize("given_up_by", ["cancel", "the deadline of collect"])
def test_a_step_in_the_queue_that_was_given_up_is_not_scored(bench, given_up_by, never_idle):
    client = bench.clients(reward_of("Logged", calls=str(bench.calls.path), seconds=CHUNK_S, batch_size=4))
    client.submit(samples_of(range(NUM_SAMPLES)))
    client.flush()
    if given_up_by == "cancel":
        client.cancel()
    else:
        assert not client.collect(timeout_s=0.1, on_failure="nan").valid["reward"].any()
    assert_passed_over(bench)


def test_a_step_in_the_queue_whose_deadline_has_passed_is_not_scored(bench, redis_url, never_idle):
    settings = load_settings(broker_url=redis_url, claim_ttl_s=1, reconcile_s=0.5, result_ttl_s=2)
    reward = reward_of("Logged", calls=str(bench.calls.path), seconds=CHUNK_S, batch_size=4)
    client = bench.clients(reward, settings=settings)
    client.submit(samples_of(range(NUM_SAMPLES)))
    client.flush()
    client.close()  # as a trainer that ended
    time.sleep(2.5)
    assert_passed_over(bench)


def test_what_is_left_of_a_cancelled_step_costs_a_worker_no_more_than_a_look(bench):
    bench.workers("gpu")
    client = bench.clients(reward_of("Logged", calls=str(bench.calls.path), seconds=0.5, batch_size=1))
    client.submit(samples_of(range(200)))
    client.flush()
    wait_until(lambda: bench.calls.begun, 30)
    client.cancel()
    num_begun = len(bench.calls.begun)
    time.sleep(1.0)  # the client frees what it gave up
    started = time.monotonic()
    client.submit(samples_of(range(1000, 1004)))
    assert_rewards(client.collect(timeout_s=60), range(1000, 1004), "reward")
    assert time.monotonic() - started < 15  # 200 of them would take 100 s
    assert len(bench.calls.begun) - num_begun - 4 <= 4


def test_messages_whose_time_is_over_are_dropped_and_sent_anew(bench, redis_url, never_idle):
    times = load_settings(broker_url=redis_url, claim_ttl_s=1, reconcile_s=0.5, result_ttl_s=2)
    client = bench.clients(reward_of("Logged", calls=str(bench.calls.path), batch_size=4), settings=times)
    client.submit(samples_of(range(8)))
    client.flush()
    time.sleep(2.5)
    with connect(redis_url) as broker:
        assert int(broker.get(keys.sent_number("gpu"))) == 2
        bench.workers("gpu", settings=times, env={"REWARDQ_RESULT_TTL_S": "30"})
        assert_rewards(client.collect(timeout_s=60), range(8), "reward")
        assert int(broker.get(keys.sent_number("gpu"))) > 2, "the first two were scored"
    assert sorted(bench.calls.begun) == list(range(8))


def assert_passed_over(bench):
    """A worker empties the queue without a call of the model, and then serves who does wait."""
    with connect(bench.settings.broker) as broker:
        assert len(queued_in(broker, "gpu")) == NUM_SAMPLES // 4
        bench.workers("gpu", concurrency=1)
        wait_until(lambda: not queued_in(broker, "gpu"), 30)
    assert bench.calls.begun == []
    seen = Seen()
    client = bench.clients(reward_of("Logged", calls=str(bench.calls.path)), run="next")
    step(client, range(8), seen)
    seen.assert_held()
