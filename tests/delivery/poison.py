"""Samples that end their process, calls that never return, exceptions that are none."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from tasks.outcomes import USUAL_STARTS
from tests.delivery.conftest import Bench
from tests.delivery.models import HARM
from tests.delivery.processes import SilentJudge
from tests.delivery.seen import Numbers, Seen, reward_of, step, undisturbed_s
from tests.pipeline.conftest import samples_of
from tests.servers import wait_until
from trainer_client import CollectTimeoutError
from workers.process.watchdog import EXIT_HUNG


def usual_step_s(
    bench: Bench, reward: Mapping[str, Any], numbers: Numbers, num_samples: int, seen: Seen, *others: Mapping[str, Any]
) -> float:
    """Seconds of a step of rewards that do no harm."""
    client = bench.clients(reward, *others, run="usual")
    usual_s = undisturbed_s(lambda: step(client, numbers.take(num_samples), seen), num_steps=1)
    client.close()
    return usual_s


def poison_sample(bench: Bench, *, tries: int, timeout_s: float) -> Seen:
    """One sample of 64 in 4 chunks that run at once ends its process (as the kernel does for want of memory)."""
    supervisor = bench.supervised("gpu", concurrency=4)
    seen, numbers = Seen(tries=tries), Numbers()
    gentle = reward_of("LoggedAtOnce", calls=str(bench.calls.path), seconds=0.2, batch_size=16)
    usual_s = usual_step_s(bench, gentle, numbers, 64, seen)
    for _ in range(tries):
        own = numbers.take(64)
        harm = {"how": "kill", "on": own[7:8], "timeout_s": timeout_s}
        client = bench.clients({**gentle, **harm}, run=f"poison{own[0]}")
        started, num_ends = time.monotonic(), len(supervisor.statuses)
        client.submit(samples_of(own))
        batch = client.collect(timeout_s=timeout_s + 300, on_failure="nan")
        seen.check(batch, own, without=own[7:8])
        seen.added_s.append(time.monotonic() - started - usual_s)
        (failure,) = batch.failures
        assert (failure.sample, failure.kind) == (7, "failed")
        assert "its worker process ended without an answer each of the 3 times it was scored alone" in failure.message
        assert supervisor.statuses[num_ends:] == [-9] * 5
        client.close()
    seen.again = bench.calls.num_again
    return seen


def large_batch(bench: Bench, *, tries: int) -> Seen:
    """A batch that the host has no memory for: the kernel ends the process, though each sample by itself would fit."""
    supervisor = bench.supervised("gpu")
    seen, numbers = Seen(tries=tries), Numbers()
    gentle = reward_of("Logged", calls=str(bench.calls.path), batch_size=8)
    usual_s = usual_step_s(bench, gentle, numbers, 8, seen)
    for _ in range(tries):
        own = numbers.take(8)
        client = bench.clients({**gentle, "how": "kill", "most": 1}, run=f"large{own[0]}")
        num_ends = len(supervisor.statuses)
        seen.added_s.append(step(client, own, seen) - usual_s)
        assert supervisor.statuses[num_ends:] == [-9] * USUAL_STARTS
        client.close()
    seen.again = bench.calls.num_again
    return seen


def hang(bench: Bench, *, tries: int, timeout_s: float) -> Seen:
    """A model's call never returns, while another reward is computed in the same process and queue."""
    supervisor = bench.supervised("gpu", concurrency=4)
    seen, numbers = Seen(tries=tries), Numbers()
    gentle = reward_of("Logged", calls=str(bench.calls.path), batch_size=4)
    other = {**reward_of("LoggedAtOnce", calls=str(bench.calls.path), seconds=2.0, batch_size=4), "name": "other"}
    usual_s = usual_step_s(bench, gentle, numbers, 16, seen, other)
    for _ in range(tries):
        own = numbers.take(16)
        harm = {"how": "hang", "on": own[2:3], "timeout_s": timeout_s}
        client = bench.clients({**gentle, **harm}, other, run=f"hang{own[0]}")
        started, num_ends = time.monotonic(), len(supervisor.statuses)
        client.submit(samples_of(own))
        batch = client.collect(timeout_s=120, on_failure="nan")
        seen.added_s.append(time.monotonic() - started - usual_s)
        # The call was for 4 samples: the model alone knows which of them it hangs on.
        late = {f.sample for f in batch.failures}
        assert {f.kind for f in batch.failures} == {"timeout"}
        assert 2 in late
        assert len(late) <= 4
        seen.check(batch, own, without=[own[i] for i in late])
        seen.wrong += batch.rewards["other"].tolist() != [float(n) for n in own]
        assert supervisor.statuses[num_ends:] == [EXIT_HUNG]
        client.close()
    return seen


def hang_judge(bench: Bench, *, tries: int, timeout_s: float) -> Seen:
    """A judge takes questions and never answers, while another is asked by the same two threads."""
    (worker,) = bench.workers("vlm", concurrency=2)
    judge = bench.judges()
    answers = reward_of("Asks", url=judge.url, batch_size=1, queue="vlm")
    seen, numbers = Seen(tries=tries), Numbers()
    usual_s = usual_step_s(bench, answers, numbers, 8, seen)
    with contextlib.closing(SilentJudge()) as silent:
        hangs = {"reward_model": "vllm_evaluate", "name": "hangs", "vlm_model": "any", "timeout_s": timeout_s}
        hangs["api_base_url"] = silent.url
        client = bench.clients(hangs, run="first")  # a process's first question loads its SDK, within its time
        client.submit(samples_of(numbers.take(1)))
        client.collect(timeout_s=120, on_failure="nan")
        client.close()
        for _ in range(tries):
            own, num_before = numbers.take(8), silent.num_asked
            client = bench.clients(hangs, answers, run=f"silent{own[0]}")
            started = time.monotonic()
            client.submit(samples_of(own))
            batch = client.collect(timeout_s=120, on_failure="nan")
            seen.added_s.append(time.monotonic() - started - usual_s)
            seen.check(batch, own)
            assert [(f.reward, f.kind) for f in batch.failures] == [("hangs", "timeout")] * len(own)
            assert silent.num_asked >= num_before + len(own)
            wait_until(lambda: silent.num_given_up == silent.num_asked, 30)
            client.close()
    assert worker.process.poll() is None
    seen.again = len(judge.asked) - len(set(judge.asked))
    return seen


def lost_device(bench: Bench) -> Seen:
    """A call breaks its process's GPU for good: nothing in that process could be scored any more."""
    supervisor = bench.supervised("gpu")
    seen, numbers = Seen(tries=1), Numbers()
    gentle = reward_of("Logged", calls=str(bench.calls.path), batch_size=4)
    usual_s, own = usual_step_s(bench, gentle, numbers, 8, seen), numbers.take(8)
    harm = {"how": "lose_device", "on": own[1:2], "times": 1}
    seen.added_s.append(step(bench.clients({**gentle, **harm}), own, seen) - usual_s)
    assert supervisor.statuses == [EXIT_HUNG]
    seen.again = bench.calls.num_again
    return seen


def group_that_ends_its_process(bench: Bench, *, timeout_s: float) -> Seen:
    """A groupwise model ends its process (as the kernel does for want of memory) on one group of two."""
    supervisor = bench.supervised("gpu", concurrency=2)
    own, seen = Numbers().take(8), Seen(tries=1)
    harm = {"how": "kill", "on": own[1:2], "timeout_s": timeout_s}
    client = bench.clients(reward_of("LoggedGroup", calls=str(bench.calls.path), **harm))
    client.submit([*samples_of(own[:4], group="bad"), *samples_of(own[4:], group="good")], group_size=4)
    batch = client.collect(timeout_s=120, on_failure="nan")
    seen.check(batch, own, without=own[:4])
    words = "its worker process ended without an answer each of the 3 times it was scored alone"
    assert [(f.sample, f.kind, f.message) for f in batch.failures] == [(i, "failed", words) for i in range(4)]
    assert supervisor.statuses == [-9] * 5
    seen.again = bench.calls.num_again
    return seen


def exceptions_out_of_groups(bench: Bench) -> Seen:
    """As `exceptions_that_are_none`, out of a groupwise model: its group has the reason, and no other."""
    bench.workers("gpu", concurrency=1)
    seen, numbers = Seen(tries=len(HARM)), Numbers()
    for how in HARM:
        own = numbers.take(8)
        client = bench.clients(reward_of("LoggedGroup", calls=str(bench.calls.path), how=how, on=own[1:2]), run=how)
        client.submit([*samples_of(own[:4], group="bad"), *samples_of(own[4:], group="good")], group_size=4)
        batch = client.collect(timeout_s=60, on_failure="nan")
        seen.check(batch, own, without=own[:4])
        assert [f.sample for f in batch.failures] == [0, 1, 2, 3]
        assert all(f.kind == "failed" and f.message.startswith(how) for f in batch.failures), batch.failures
        client.close()
    return seen  # each after the first by the only slot, which was not lost


def task_that_raises(bench: Bench) -> tuple[str, list[int]]:
    """A task raises each time, and not for a sample; what collect says of it, and how often it ran before and after."""
    (worker,) = bench.workers("gpu")
    client = bench.clients(reward_of("NeverAdmits", calls=str(bench.calls.path), batch_size=4))
    client.submit(samples_of(range(4)))
    num_raised = lambda: worker.log_text.count("raised unexpected: LookupError")  # noqa: E731
    wait_until(lambda: num_raised() == 4, 30)  # pauses double from reconcile_s: the next is 4 s later
    try:
        client.collect(timeout_s=2)
    except CollectTimeoutError as error:
        return str(error), [4, num_raised()]
    raise AssertionError("there is nothing to collect")


def exceptions_that_are_none(bench: Bench) -> Seen:
    """Out of a model: what would end a thread of Celery's pool for good, and leave the worker to take nothing."""
    bench.workers("gpu", concurrency=1)
    seen, numbers = Seen(tries=len(HARM)), Numbers()
    usual_s = usual_step_s(bench, reward_of("Logged", calls=str(bench.calls.path)), numbers, 16, seen)
    for how in HARM:
        own = numbers.take(16)
        reward = reward_of("Logged", calls=str(bench.calls.path), how=how, on=own[5:6])
        client = bench.clients(reward, run=how)
        started = time.monotonic()
        client.submit(samples_of(own))
        batch = client.collect(timeout_s=60, on_failure="nan")
        seen.added_s.append(time.monotonic() - started - usual_s)
        failed = [own[f.sample] for f in batch.failures]
        assert own[5] in failed
        assert all(f.kind == "failed" and f.message.startswith(how) for f in batch.failures), batch.failures
        # Ctrl-C is not to be swallowed by halving: the whole batch has this reason.
        assert how == "KeyboardInterrupt" or failed == own[5:6]
        seen.check(batch, own, without=failed)
        step(client, numbers.take(4), seen)  # the slot, the only one, is not lost
        client.close()
    return seen
