from __future__ import annotations

import time

import pytest

from tests.delivery import poison
from tests.delivery.seen import reward_of
from tests.pipeline.conftest import samples_of
from trainer_client import CollectTimeoutError


def test_a_sample_that_ends_its_process_each_time_fails_alone_among_63_others(bench):
    seen = poison.poison_sample(bench, tries=1, timeout_s=5)
    print(seen)
    seen.assert_held()


def test_a_collect_that_waits_for_it_says_so(bench):
    bench.supervised("gpu")
    client = bench.clients(reward_of("Logged", calls=str(bench.calls.path), how="kill", on=[3]))
    client.submit(samples_of([1, 2, 3]))
    deadline, words = time.monotonic() + 90, ""
    while "1 were begun more than 2 times and never answered: they, or what they need, may be what ends" not in words:
        assert time.monotonic() < deadline, words
        with pytest.raises(CollectTimeoutError) as raised:
            client.collect(timeout_s=2)
        words = str(raised.value)


def test_a_model_that_hangs_times_out_and_its_worker_is_replaced(bench):
    seen = poison.hang(bench, tries=1, timeout_s=1)
    print(seen)
    seen.assert_held()


def test_a_batch_too_large_for_its_host_is_scored_one_by_one_in_the_end(bench):
    seen = poison.large_batch(bench, tries=1)
    seen.assert_held()


def test_a_judge_that_never_answers_is_given_up_and_its_worker_serves_on(bench):
    seen = poison.hang_judge(bench, tries=1, timeout_s=1)
    seen.assert_held()
    assert seen.again == 0


def test_a_worker_whose_gpu_is_lost_to_it_is_replaced_and_no_sample_fails(bench):
    seen = poison.lost_device(bench)
    seen.assert_held()
    assert 0 < seen.again <= 8


def test_a_group_that_ends_its_process_each_time_fails_alone(bench):
    seen = poison.group_that_ends_its_process(bench, timeout_s=1)
    seen.assert_held()


def test_a_task_that_raises_each_time_is_sent_again_more_and_more_rarely_and_collect_says_what_it_raised(
    bench, never_idle
):
    words, (before, after) = poison.task_that_raises(bench)
    assert "the task raised LookupError: no scale at hand" in words
    assert "on queue gpu" in words
    assert before == after


def test_what_is_no_usual_exception_out_of_a_groupwise_model_costs_its_group_and_not_a_slot(bench):
    seen = poison.exceptions_out_of_groups(bench)
    seen.assert_held()


def test_what_is_no_usual_exception_costs_a_sample_and_not_a_slot(bench):
    seen = poison.exceptions_that_are_none(bench)
    seen.assert_held()
