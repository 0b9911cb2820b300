"""Faults of workers: killed, stopped, held up."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time

from tests.delivery.conftest import Bench
from tests.delivery.seen import Numbers, Seen, reward_of, step, undisturbed_s
from tests.pipeline.conftest import samples_of
from tests.servers import wait_until

CHUNK = 16


def kill_gpu_worker(bench: Bench, *, num_kills: int, samples_a_step: int, chunk_s: float, seed: int) -> Seen:
    """`kill -9` at a random moment of each step, of the only worker, which its supervisor starts again."""
    supervisor = bench.supervised("gpu")
    client = bench.clients(reward_of("Logged", calls=str(bench.calls.path), seconds=chunk_s, batch_size=CHUNK))
    seen, numbers, moments = Seen(), Numbers(), random.Random(seed)
    usual_s = undisturbed_s(lambda: step(client, numbers.take(samples_a_step), seen))
    for _ in range(num_kills):
        killer = threading.Timer(moments.uniform(0, usual_s), supervisor.kill)
        killer.start()
        seen.added_s.append(step(client, numbers.take(samples_a_step), seen) - usual_s)
        killer.join()
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

        def kill_when_busy() -> None:
            wait_until(lambda: judge.num_open == 32, 30, pace_s=0.005)
            supervisor.kill()

        killer = threading.Thread(target=kill_when_busy)
        killer.start()
        seen.added_s.append(step(client, numbers.take(64), seen) - usual_s)
        killer.join()
        supervisor.wait_ready()
    seen.tries, seen.again = num_kills, len(judge.asked) - len(set(judge.asked))
    return seen


def pause_worker(bench: Bench, *, tries: int, pause_s: float, chunk_s: float) -> Seen:
    """SIGSTOP of a worker with work in hand, SIGCONT when another has answered."""
    paused, _other = bench.workers("gpu", "gpu", concurrency=1)
    client = bench.clients(reward_of("LoggedAtOnce", calls=str(bench.calls.path), seconds=chunk_s, batch_size=4))
    seen, numbers = Seen(tries=tries), Numbers()
    usual_s = undisturbed_s(lambda: step(client, numbers.take(8), seen), num_steps=2)
    for _ in range(tries):
        own = numbers.take(8)
        started = time.monotonic()
        client.submit(samples_of(own))
        wait_until(lambda own=own: set(own) & set(bench.calls.begun_by(paused.pid)), 30)
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


def stop_worker(bench: Bench, *, tries: int, chunk_s: float, grace_s: float | None = None) -> Seen:
    """SIGTERM with work in hand, as a container's stop sends it, while another worker serves the queue."""
    seen, numbers = Seen(tries=tries), Numbers()
    env = {} if grace_s is None else {"REWARDQ_STOP_GRACE_S": str(grace_s)}
    bench.workers("gpu", concurrency=1)
    client = bench.clients(reward_of("LoggedAtOnce", calls=str(bench.calls.path), seconds=chunk_s, batch_size=4))
    (worker,) = bench.workers("gpu", concurrency=2, env=env)
    usual_s = undisturbed_s(lambda: step(client, numbers.take(16), seen), num_steps=1)
    for i in range(tries):
        if i:
            (worker,) = bench.workers("gpu", concurrency=2, env=env)
        own = numbers.take(16)
        started = time.monotonic()
        client.submit(samples_of(own))
        wait_until(lambda own=own, pid=worker.pid: len(set(own) & set(bench.calls.begun_by(pid))) >= 4, 30)
        worker.stop()
        seen.check(client.collect(timeout_s=60, on_failure="nan"), own)
        seen.added_s.append(time.monotonic() - started - usual_s)
    seen.again = bench.calls.num_again
    return seen


def median_and_worst(seen: Seen) -> str:
    """For the test's output."""
    return f"added per fault: median {statistics.median(seen.added_s):.1f} s, worst {max(seen.added_s):.1f} s"
