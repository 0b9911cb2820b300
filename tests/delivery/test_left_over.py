"""Work that nobody waits for any more costs workers its look-up, and no more."""

from __future__ import annotations

import time

from tasks.connections import connect
from tasks.settings import load_settings
from tests.delivery.messages_lost import queued_in
from tests.delivery.seen import Seen, reward_of, step
from tests.pipeline.conftest import samples_of
from tests.servers import wait_until

NUM_SAMPLES, CHUNK_S = 80, 5.0


def test_a_cancelled_step_in_the_queue_is_not_scored(bench):
    client = bench.clients(reward_of("Logged", calls=str(bench.calls.path), seconds=CHUNK_S, batch_size=4))
    client.submit(samples_of(range(NUM_SAMPLES)))
    client.flush()
    client.cancel()
    assert_passed_over(bench)


def test_a_step_in_the_queue_whose_deadline_has_passed_is_not_scored(bench, redis_url):
    settings = load_settings(broker_url=redis_url, claim_ttl_s=1, reconcile_s=0.5, result_ttl_s=2)
    reward = reward_of("Logged", calls=str(bench.calls.path), seconds=CHUNK_S, batch_size=4)
    client = bench.clients(reward, settings=settings)
    client.submit(samples_of(range(NUM_SAMPLES)))
    client.flush()
    client.close()  # as a trainer that ended
    time.sleep(2.5)
    assert_passed_over(bench)


def assert_passed_over(bench):
    """A worker empties the queue without a call of the model, and then serves who does wait."""
    with connect(bench.settings.broker_url) as broker:
        assert len(queued_in(broker, "gpu")) == NUM_SAMPLES // 4
        bench.workers("gpu", concurrency=1)
        wait_until(lambda: not queued_in(broker, "gpu"), 10)
    assert bench.calls.begun == []
    seen = Seen()
    client = bench.clients(reward_of("Logged", calls=str(bench.calls.path)), run="next")
    step(client, range(8), seen)
    seen.assert_held()
