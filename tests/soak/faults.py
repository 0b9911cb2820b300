"""Each fault of tests/delivery, more often, at the default times."""

from __future__ import annotations

from collections.abc import Callable

from tests.delivery import messages_lost, poison, trainers_die, workers_die
from tests.delivery.conftest import Bench
from tests.delivery.seen import Seen

FAULTS: dict[str, Callable[[Bench], Seen]] = {
    "`kill -9` of the only gpu worker at a random moment of each step": lambda bench: workers_die.kill_gpu_worker(
        bench, num_kills=20, samples_a_step=88, chunk_s=0.4, seed=1
    ),
    "`kill -9` of the only vlm worker with 32 requests in flight": lambda bench: workers_die.kill_vlm_worker(
        bench, num_kills=5, answer_s=2.0
    ),
    "an idle worker takes a message while stopped, and is killed": lambda bench: messages_lost.lose_popped_message(
        bench, tries=5
    ),
    "SIGSTOP of a worker for 30 s, another answers": lambda bench: workers_die.pause_worker(
        bench, tries=2, pause_s=30, chunk_s=0.5
    ),
    "a C call holds the interpreter for 20 s, in whichever worker scores the sample": lambda bench: (
        workers_die.hold_gil(bench, tries=2, hold_s=20)
    ),
    "SIGTERM with work in hand": lambda bench: workers_die.stop_worker(bench, tries=5, chunk_s=1.0),
    "SIGTERM with work that takes longer than the grace": lambda bench: workers_die.stop_worker(
        bench, tries=3, chunk_s=3.0, grace_s=0.5
    ),
    "all connections are killed during calls of 10 s": lambda bench: messages_lost.kill_connections(
        bench, tries=3, call_s=10
    ),
    "Redis cannot be reached for 20 s, connections cut": lambda bench: messages_lost.lose_redis(
        bench, tries=2, how="cut", away_s=20
    ),
    "Redis cannot be reached for 20 s, packets lost": lambda bench: messages_lost.lose_redis(
        bench, tries=2, how="freeze", away_s=20
    ),
    "`kill -9` of Redis, started again with its AOF": lambda bench: messages_lost.restart_redis(
        bench, tries=3, keeps_file=True
    ),
    "`kill -9` of Redis, started again empty": lambda bench: messages_lost.restart_redis(
        bench, tries=3, keeps_file=False
    ),
    "Redis full for 6 s": lambda bench: messages_lost.fill_redis(bench, tries=3, full_s=6),
    "5,000 chunks before one worker, one message taken out": lambda bench: queue_much(bench, 5000),
    "trainer killed between submit and collect": lambda bench: trainers_die.kill_between_submit_and_collect(
        bench, tries=3
    ),
    "trainer killed when half of its samples are answered": lambda bench: trainers_die.kill_when_half_is_answered(
        bench, tries=3
    ),
    "trainer killed between two chunks": lambda bench: trainers_die.kill_between_two_chunks(bench, tries=2),
    "trainer killed in the midst of a step, job started again": lambda bench: trainers_die.start_again(bench, tries=3),
    "a sample ends its process each time, 63 others beside it": lambda bench: poison.poison_sample(
        bench, tries=1, timeout_s=5
    ),
    "a batch ends its process, each of its samples alone would not": lambda bench: poison.large_batch(bench, tries=2),
    "a model's call hangs, another reward beside it": lambda bench: poison.hang(bench, tries=3, timeout_s=1),
    "a judge takes questions and never answers, another reward beside it": lambda bench: poison.hang_judge(
        bench, tries=3, timeout_s=2
    ),
    "a call breaks its process's GPU for good": poison.lost_device,
    "SystemExit, KeyboardInterrupt, MemoryError and others": poison.exceptions_that_are_none,
}


def queue_much(bench: Bench, num_chunks: int) -> Seen:
    seen, num_sent = messages_lost.queue_much(bench, num_chunks=num_chunks)
    assert num_sent == num_chunks + 1
    assert seen.again == 0
    return seen
