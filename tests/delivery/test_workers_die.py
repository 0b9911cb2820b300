from __future__ import annotations

import contextlib
import time

import pytest
from pydantic import SecretStr

from tasks import keys
from tests.delivery import workers_die
from tests.delivery.processes import SilentJudge
from tests.delivery.seen import Seen, reward_of, step
from tests.delivery.workers_die import median_and_worst
from tests.pipeline.conftest import assert_rewards, samples_of
from tests.servers import wait_until


def test_a_gpu_worker_killed_at_random_moments_loses_nothing_and_repeats_only_what_was_in_flight(bench):
    seen = workers_die.kill_gpu_worker(bench, num_kills=3, samples_a_step=48, chunk_s=0.4, seed=1)
    print(median_and_worst(seen))
    seen.assert_held()
    assert seen.again > 0
    assert max(seen.added_s) < 15


def test_a_vlm_worker_killed_with_32_requests_in_flight_asks_only_those_again(bench):
    seen = workers_die.kill_vlm_worker(bench, num_kills=1, answer_s=1.5)
    print(median_and_worst(seen))
    seen.assert_held()
    assert 0 < seen.again <= 32
    assert max(seen.added_s) < 15


def test_a_paused_workers_late_answer_changes_nothing(bench):
    seen = workers_die.pause_worker(bench, tries=1, pause_s=5, chunk_s=0.5)
    seen.assert_held()
    assert seen.again <= 4


def test_a_timeout_is_not_written_over_what_another_worker_scores_meanwhile(bench):
    seen = workers_die.late_while_another_scores(bench, timeout_s=4)
    seen.assert_held()


def test_a_model_that_holds_the_interpreter_is_at_worst_scored_twice(bench):
    seen = workers_die.hold_gil(bench, tries=1, hold_s=5)
    seen.assert_held()
    assert seen.again <= 4


def test_a_stopped_worker_finishes_what_it_has_in_hand(bench):
    seen = workers_die.stop_worker(bench, tries=2, chunk_s=1.0)
    seen.assert_held()
    assert seen.again == 0


def test_a_stopped_worker_gives_back_what_takes_too_long_and_another_takes_it_within_seconds(bench):
    seen = workers_die.stop_worker(bench, tries=1, chunk_s=2.0, grace_s=0.5, claim_ttl_s=60)
    print(median_and_worst(seen))
    seen.assert_held()
    assert 0 < seen.again <= 8
    assert max(seen.added_s) < 30  # no claim expired by then


def test_a_stopped_worker_leaves_neither_claims_nor_starts(bench, never_idle):
    """Else its samples would wait for the claims to expire, and after a few deployments be taken for poison."""
    reward = reward_of("LoggedAtOnce", calls=str(bench.calls.path), seconds=4.0, batch_size=4)
    client = bench.clients(reward)
    for i in range(3):
        (worker,) = bench.workers("gpu", concurrency=2, env={"REWARDQ_STOP_GRACE_S": "0.2"})
        if not i:
            client.submit(samples_of(range(8)))
        wait_until(lambda i=i: len(bench.calls.begun) == 8 * (i + 1), 30)
        assert len(of_claims(bench)) == 16
        worker.stop()
        assert of_claims(bench) == []
    bench.workers("gpu", concurrency=2)
    assert_rewards(client.collect(timeout_s=60), range(8), "reward")
    assert len(bench.calls.begun) == 32


def test_a_redis_that_hangs_keeps_no_worker_from_stopping(bench, private_redis):
    server = private_redis()
    settings = bench.settings.model_copy(update={"broker_url": SecretStr(server.url)})
    (worker,) = bench.workers("gpu", settings=settings, env={"REWARDQ_STOP_GRACE_S": "0.5"})
    client = bench.clients(reward_of("Logged", calls=str(bench.calls.path), seconds=30.0), settings=settings)
    client.submit(samples_of(range(4)))
    wait_until(lambda: bench.calls.begun, 30)
    server.pause()
    try:
        started = time.monotonic()
        worker.stop()
        assert time.monotonic() - started < 8
    finally:
        server.resume()


def of_claims(bench):
    with bench.redis.client() as client:
        return client.keys(keys.claim("*")) + client.keys(keys.starts("*"))


STRICT = {"PYTHONWARNINGS": "error,ignore:You're running the worker"}
"""Every warning is an error, but for that of a worker run as root, in a container of CI."""


def assert_quiet(worker):
    assert not [words for words in ("Traceback", "Warning", "Exception ignored") if words in worker.log_text]


def test_a_worker_starts_scores_and_stops_with_every_warning_as_an_error(bench):
    (worker,) = bench.workers("gpu", env=STRICT)
    client = bench.clients(reward_of("Logged", calls=str(bench.calls.path)))
    seen = Seen(tries=1)
    step(client, range(8), seen)
    worker.stop()
    seen.assert_held()
    assert_quiet(worker)


@pytest.mark.parametrize("grace_s", [8, 0.3], ids=["within the grace", "past the grace"])
def test_a_gpu_worker_stops_with_work_in_hand_and_every_warning_as_an_error(bench, grace_s, never_idle):
    (worker,) = bench.workers("gpu", env={**STRICT, "REWARDQ_STOP_GRACE_S": str(grace_s)})
    client = bench.clients(reward_of("LoggedAtOnce", calls=str(bench.calls.path), seconds=2.0, batch_size=4))
    client.submit(samples_of(range(8)))
    wait_until(lambda: len(bench.calls.begun) == 8, 30)
    worker.stop()
    assert_quiet(worker)
    assert of_claims(bench) == []
    assert workers_die.count_outcomes(bench) == (8 if grace_s == 8 else 0)


@pytest.mark.parametrize("grace_s", [8, 0.3], ids=["within the grace", "past the grace"])
def test_a_vlm_worker_stops_with_questions_in_flight_and_every_warning_as_an_error(bench, grace_s):
    (worker,) = bench.workers("vlm", concurrency=4, env={**STRICT, "REWARDQ_STOP_GRACE_S": str(grace_s)})
    with contextlib.closing(SilentJudge()) as judge:
        timeout_s = 2 if grace_s == 8 else 30  # one that the grace waits for, and one that ends after it
        asks = {"reward_model": "vllm_evaluate", "vlm_model": "any", "timeout_s": timeout_s, "api_base_url": judge.url}
        client = bench.clients(asks)
        client.submit(samples_of(range(8)))
        wait_until(lambda: judge.num_asked >= 4, 30)
        worker.stop()
        assert_quiet(worker)
        assert of_claims(bench) == []
        assert (workers_die.count_outcomes(bench) > 0) == (grace_s == 8)
