from __future__ import annotations

from tests.delivery import workers_die
from tests.delivery.workers_die import median_and_worst


def test_a_gpu_worker_killed_at_random_moments_loses_nothing_and_repeats_only_what_was_in_flight(bench):
    seen = workers_die.kill_gpu_worker(bench, num_kills=3, samples_a_step=48, chunk_s=0.4, seed=1)
    print(median_and_worst(seen))
    seen.assert_held()
    assert seen.again <= 3 * workers_die.CHUNK
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


def test_a_model_that_holds_the_interpreter_is_at_worst_scored_twice(bench):
    seen = workers_die.hold_gil(bench, tries=1, hold_s=5)
    seen.assert_held()
    assert seen.again <= 4


def test_a_stopped_worker_finishes_what_it_has_in_hand(bench):
    seen = workers_die.stop_worker(bench, tries=2, chunk_s=1.0)
    seen.assert_held()
    assert seen.again == 0


def test_a_stopped_worker_gives_back_what_takes_too_long_and_another_takes_it_within_seconds(bench):
    seen = workers_die.stop_worker(bench, tries=1, chunk_s=3.0, grace_s=0.5)
    print(median_and_worst(seen))
    seen.assert_held()
    assert 0 < seen.again <= 8
    assert max(seen.added_s) < 12


def test_a_worker_starts_scores_and_stops_with_every_warning_as_an_error(bench):
    strict = {"PYTHONWARNINGS": "error,ignore:You're running the worker"}  # as root, in a container of CI
    (worker,) = bench.workers("gpu", env=strict)
    client = bench.clients(workers_die.reward_of("Logged", calls=str(bench.calls.path)))
    seen = workers_die.Seen(tries=1)
    workers_die.step(client, range(8), seen)
    worker.stop()
    seen.assert_held()
    assert "Traceback" not in worker.log_text
