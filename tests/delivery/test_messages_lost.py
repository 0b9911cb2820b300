from __future__ import annotations

import pytest

from tests.delivery import messages_lost


def test_a_message_taken_by_a_worker_that_dies_before_it_notes_it_is_sent_again(bench):
    seen = messages_lost.lose_popped_message(bench, tries=2)
    seen.assert_held()
    assert seen.again == 0


def test_a_call_during_which_all_connections_break_is_made_once(bench):
    seen = messages_lost.kill_connections(bench, tries=1, call_s=10)
    seen.assert_held()
    assert seen.again == 0


@pytest.mark.parametrize("how", ["cut", "freeze"])
def test_trainer_and_workers_go_on_when_redis_can_be_reached_again(bench, how):
    seen = messages_lost.lose_redis(bench, tries=1, how=how, away_s=5)
    seen.assert_held()
    assert seen.again <= 8
    assert max(seen.added_s) < 20


@pytest.mark.parametrize("world_size", [1, 2])
def test_collect_keeps_its_deadline_though_redis_does_not_answer(bench, world_size):
    seen, took_s = messages_lost.collect_while_frozen(bench, world_size=world_size, timeout_s=3)
    assert max(took_s) < 8  # the deadline, and at most twice 2 s in which Redis is asked why
    seen.assert_held()
    assert seen.again == 0


@pytest.mark.parametrize("keeps_file", [True, False])
def test_all_rewards_are_right_though_redis_is_restarted_in_the_midst(bench, keeps_file):
    seen = messages_lost.restart_redis(bench, tries=1, keeps_file=keeps_file)
    seen.assert_held()
    assert seen.again <= 8


def test_a_long_queue_before_a_slow_worker_is_not_sent_again_but_what_was_lost_in_it_is(bench):
    num_chunks = 2000
    seen, num_sent = messages_lost.queue_much(bench, num_chunks=num_chunks)
    seen.assert_held()
    assert seen.again == 0
    assert num_sent == num_chunks + 1
