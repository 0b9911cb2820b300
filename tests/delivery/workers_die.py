"""Faults of workers: killed, stopped, held up."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time

from tasks import keys
from tests.delivery.conftest import Bench
from tests.delivery.seen import Numbers, Seen, reward_of, step, undisturbed_s
from tests.pipeline.conftest import samples_of
from tests.servers import wait_until
from workers.process.watchdog import EXIT_HUNG

CHUNK = 16


def kill_gpu_worker(bench: Bench, *, num_kills: int, samples_a_step: int, chunk_s: float, seed: int) -> Seen:
    """`kill -9` of the only worker, which its supervisor starts again: the first in the midst of a call, each other at
    a random moment of its step. What is scored again is what that process had begun and not answered, and no more.
    """
    supervisor = bench.supervised("gpu")
    client = bench.clients(reward_of("Logged", calls=str(bench.calls.path), seconds=chunk_s, batch_size=CHUNK))
    seen, numbers, moments = Seen(), Numbers(), random.Random(seed)
    usual_s = undisturbed_s(lambda: step(client, numbers.take(samples_a_step), seen))
    for i in range(num_kills):
        own, pid, pause_s = numbers.take(samples_a_step), supervisor.worker.pid, moments.uniform(0, usual_s)
        num_again, num_answered, in_hand = bench.calls.num_again, count_outcomes(bench), []

        def kill(i=i, own=own, pid=pid, pause_s=pause_s, num_answered=num_answered, in_hand=in_hand) -> None:
            if i:
                time.sleep(pause_s)
            else:
                wait_until(lambda: set(own) & set(bench.calls.begun_by(pid)), 30, pace_s=0.005)
            supervisor.kill()
            time.sleep(0.1)  # what it sent last arrives; the next process is not ready for seconds
            begun = set(own) & set(bench.calls.begun_by(pid))
            in_hand.append(len(begun) - (count_outcomes(bench) - num_answered))

        killer = threading.Thread(target=kill)
        killer.start()
        seen.added_s.append(step(client, own, seen) - usual_s)
        killer.join()
        assert [bench.calls.num_again - num_again] == in_hand
        supervisor.wait_ready()
    seen.tries, seen.again = num_kills, bench.calls.num_again
    return seen


def kill_vlm_worker(bench: Bench, *, num_kills: int, answer_s: float) -> Seen:
    """`kill -9` with 32 requests in flight."""
    supervisor, judge = bench.supervised("vlm"), bench.judges(delay_s=answer_s)
    client = bench.clients(reward_of("Asks", url=judge.url, batch_size=1, queue="vlm"))
    seen, numbers = Seen(), Numbers()
    usual_s = undisturbed_s(lambda: step(client, numbers.take(64), seen), num_steps=2)
    for _ in range(num_kills):
        wait_until(lambda: judge.num_open == 0)
        judge.hold()  # the first of them is not answered before the last is asked

        def kill_when_busy() -> None:
            try:
                wait_until(lambda: judge.num_open == 32, 30, pace_s=0.005)
                supervisor.kill()
            finally:
                judge.go_on()

        killer = threading.Thread(target=kill_when_busy)
        killer.start()
        seen.added_s.append(step(client, numbers.take(64), seen) - usual_s)
        killer.join()
        supervisor.wait_ready()
    seen.tries, seen.again = num_kills, len(judge.asked) - len(set(judge.asked))
    return seen


def pause_worker(bench: Bench, *, tries: int, pause_s: float, chunk_s: float) -> Seen:
    """SIGSTOP of a worker with work in hand, SIGCONT when another has answered."""
    both = bench.workers("gpu", "gpu", concurrency=1)
    client = bench.clients(reward_of("LoggedAtOnce", calls=str(bench.calls.path), seconds=chunk_s, batch_size=4))
    seen, numbers = Seen(tries=tries), Numbers()
    usual_s = undisturbed_s(lambda: step(client, numbers.take(8), seen), num_steps=2)
    for _ in range(tries):
        own = numbers.take(8)
        started = time.monotonic()
        client.submit(samples_of(own))
        busy = lambda own=own: [w for w in both if set(own) & set(bench.calls.begun_by(w.pid))]  # noqa: E731
        paused = wait_until(busy, 30)[0]  # whichever it is: one may be a step late, and find nothing left
        os.kill(paused.pid, signal.SIGSTOP)
        stopped_at = time.monotonic()
        batch = client.collect(timeout_s=120, on_failure="nan")
        seen.check(batch, own)
        seen.added_s.append(time.monotonic() - started - usual_s)
        answers = {i: batch.info["reward"][i]["origin"]["worker"] for i in range(len(own))}
        time.sleep(max(0.0, pause_s - (time.monotonic() - stopped_at)))
        os.kill(paused.pid, signal.SIGCONT)
        time.sleep(chunk_s + 1)  # its late answer arrives, and changes nothing
        client.submit(samples_of(own))
        late = client.collect(timeout_s=60, on_failure="nan")
        seen.check(late, own)
        assert {i: late.info["reward"][i]["origin"]["worker"] for i in range(len(own))} == answers
    seen.again = bench.calls.num_again
    return seen


def hold_gil(bench: Bench, *, tries: int, hold_s: float) -> Seen:
    """A C call that keeps the interpreter's lock: no heartbeat, no signal, nothing."""
    seen, numbers = Seen(tries=tries), Numbers()
    bench.workers("gpu", "gpu", concurrency=1)
    gentle = bench.clients(reward_of("Logged", calls=str(bench.calls.path), batch_size=4))
    usual_s = undisturbed_s(lambda: step(gentle, numbers.take(8), seen))
    for _ in range(tries):
        own = numbers.take(8)
        harm = {"how": "hold_gil", "on": own[:1], "hold_s": hold_s}
        client = bench.clients(
            reward_of("Logged", calls=str(bench.calls.path), batch_size=4, **harm), run=f"held{own[0]}"
        )
        seen.added_s.append(step(client, own, seen) - usual_s)
        time.sleep(hold_s)  # the one that held it, or its twin, ends too
        client.submit(samples_of(own))
        seen.check(client.collect(timeout_s=60, on_failure="nan"), own)
        client.close()
    seen.again = bench.calls.num_again
    return seen


def late_while_another_scores(bench: Bench, *, timeout_s: float) -> Seen:
    """SIGSTOP of a worker for longer than `timeout_s`; when it goes on, and takes its model to hang, another scores."""
    paused = bench.supervised("gpu", concurrency=1)
    own, pid = Numbers().take(1), paused.worker.pid
    harm = {"how": "hang", "on": own, "times": 1, "timeout_s": timeout_s}
    reward = reward_of("Logged", calls=str(bench.calls.path), seconds=0.75 * timeout_s, **harm)
    client, seen = bench.clients(reward), Seen(tries=1)
    client.submit(samples_of(own))
    wait_until(lambda: bench.calls.begun_by(pid), 30)
    os.kill(pid, signal.SIGSTOP)
    stopped_at = time.monotonic()
    (other,) = bench.workers("gpu", concurrency=1)
    wait_until(lambda: bench.calls.begun_by(other.pid), 30)
    time.sleep(max(0.0, stopped_at + timeout_s - time.monotonic()))
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: paused.statuses, 30)
    assert paused.statuses == [EXIT_HUNG]
    seen.check(client.collect(timeout_s=60, on_failure="nan"), own)
    return seen


def stop_worker(
    bench: Bench, *, tries: int, chunk_s: float, grace_s: float | None = None, claim_ttl_s: float | None = None
) -> Seen:
    """SIGTERM with work in hand, as a container's stop sends it, while another worker serves the queue."""
    seen, numbers = Seen(tries=tries), Numbers()
    env = {} if grace_s is None else {"REWARDQ_STOP_GRACE_S": str(grace_s)}
    settings = bench.settings.model_copy(update={"claim_ttl_s": claim_ttl_s or bench.settings.claim_ttl_s})
    bench.workers("gpu", concurrency=1, settings=settings)
    client = bench.clients(
        reward_of("LoggedAtOnce", calls=str(bench.calls.path), seconds=chunk_s, batch_size=4), settings=settings
    )
    (worker,) = bench.workers("gpu", concurrency=2, env=env, settings=settings)
    usual_s = undisturbed_s(lambda: step(client, numbers.take(16), seen), num_steps=1)
    for i in range(tries):
        if i:
            (worker,) = bench.workers("gpu", concurrency=2, env=env, settings=settings)
        while not bench.calls.begun_by(worker.pid):  # which takes no task yet when its heartbeat is there
            step(client, numbers.take(16), seen)
        own = numbers.take(16)
        started = time.monotonic()
        client.submit(samples_of(own))
        wait_until(lambda own=own, pid=worker.pid: len(set(own) & set(bench.calls.begun_by(pid))) >= 4, 30)
        worker.stop()
        seen.check(client.collect(timeout_s=60, on_failure="nan"), own)
        seen.added_s.append(time.monotonic() - started - usual_s)
    seen.again = bench.calls.num_again
    return seen


def count_outcomes(bench: Bench) -> int:
    """How many outcomes are in Redis."""
    with bench.redis.client() as client:
        return len(client.keys(keys.outcome("*")))


def median_and_worst(seen: Seen) -> str:
    """For the test's output."""
    return f"added per fault: median {statistics.median(seen.added_s):.1f} s, worst {max(seen.added_s):.1f} s"
