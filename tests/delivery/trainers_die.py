"""Faults of trainers: killed, stopped, started twice."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.delivery.conftest import Bench
from tests.delivery.processes import TrainerProcess
from tests.delivery.seen import Numbers, Seen, reward_of, undisturbed_s
from tests.servers import wait_until
from trainer_client import RewardClient, Ticket

JOB = """
import json, pickle, sys, time
from pathlib import Path
from tests.pipeline.conftest import config_of, samples_of
from trainer_client import RewardClient

def say(value):
    print(json.dumps(value), flush=True)

rewards, run, options = json.loads({given!r})
client = RewardClient.from_dict(config_of(*rewards), run, **options)
say("ready")
"""

RANK_LOCK_S = 10.0
"""A successor waits at most about so long for the rank lock of a trainer that was killed."""

ORPHANS_LIVE_S = 20
"""Time to live of payloads where one trainer waits for those of another that was killed; 900 s by default."""


def job(
    bench: Bench,
    reward: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    what: str,
    *,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> Any:
    """A trainer process with a client for one reward or several that then does `what`; `options` are its client's."""
    rewards = [reward] if isinstance(reward, Mapping) else list(reward)
    given = json.dumps([rewards, "job", options])
    trainer: TrainerProcess = bench.trainers(JOB.format(given=given) + what, env=env or {})
    assert trainer.line() == "ready"
    return trainer


def successor(bench: Bench, reward: Mapping[str, Any], *, launch: str) -> tuple[RewardClient, float]:
    """A client that takes the rank of one that was killed, and the seconds that it waited for the rank lock."""
    started = time.monotonic()
    client = bench.clients(reward, run="job", launch=launch)
    return client, time.monotonic() - started


def kill_between_submit_and_collect(bench: Bench, *, tries: int) -> Seen:
    """`kill -9` of a trainer that has sent everything; another process collects its pickled ticket."""
    return _kill_with_ticket(bench, tries, seconds=0.1, most_pending=40)


def kill_when_half_is_answered(bench: Bench, *, tries: int) -> Seen:
    """`kill -9` of a trainer that knows some answers when it pickles its ticket; another process collects that."""
    return _kill_with_ticket(bench, tries, seconds=0.3, most_pending=20)


def _kill_with_ticket(bench: Bench, tries: int, *, seconds: float, most_pending: int) -> Seen:
    """The ticket is pickled when all 40 samples are sent, and at most so many not answered."""
    reward = reward_of("Logged", calls=str(bench.calls.path), seconds=seconds, batch_size=4)
    seen, numbers, path = Seen(tries=tries), Numbers(), bench.calls.path.with_name("ticket")
    bench.workers("gpu")
    for i in range(tries):
        own = numbers.take(40)
        what = f"""
ticket = client.submit(samples_of(range({own[0]}, {own[-1] + 1})))
client.flush()
while client.pending() > {most_pending}:
    time.sleep(0.01)
Path({str(path)!r}).write_bytes(pickle.dumps(ticket))
say([ticket.num_sent, client.pending()])
time.sleep(600)
"""
        trainer = job(bench, reward, what, launch=f"launch{i}")
        num_sent, num_pending = trainer.line()
        assert num_sent == 40
        assert 0 < num_pending <= most_pending
        trainer.kill()
        client, waited_s = successor(bench, reward, launch=f"launch{i}")
        assert waited_s < RANK_LOCK_S + 3
        seen.check(client.collect(timeout_s=60, ticket=read(path), on_failure="nan"), own)
        seen.added_s.append(waited_s)
        client.close()
    seen.again = bench.calls.num_again
    return seen


def kill_between_two_chunks(bench: Bench, *, tries: int) -> Seen:
    """`kill -9` of a trainer that has sent some: its sender waits for room in the payload store.

    The next try waits for what the killed one had stored and not sent to expire.
    """
    seen, path = Seen(tries=tries), bench.calls.path.with_name("ticket")
    reward = reward_of("Logged", calls=str(bench.calls.path), batch_size=4)
    numbers = Numbers()
    for i in range(tries):
        own = numbers.take(40)
        what = f"""
ticket = client.submit(samples_of(range({own[0]}, {own[-1] + 1})))
while ticket.num_sent < 8:
    time.sleep(0.01)
time.sleep(0.5)
Path({str(path)!r}).write_bytes(pickle.dumps(ticket))
say(ticket.num_sent)
time.sleep(600)
"""
        env = {"REWARDQ_MAX_STORE_BYTES": "6000", "REWARDQ_PAYLOAD_TTL_S": f"{ORPHANS_LIVE_S}"}
        trainer = job(bench, reward, what, launch=f"launch{i}", env=env)
        trainer.line()
        trainer.kill()
        ticket = read(path)
        assert 8 <= ticket.num_sent < 40
        sent = [n for n, slot in zip(own, ticket.slots, strict=True) if slot.addresses is not None]
        (worker,) = bench.workers("gpu")
        client, waited_s = successor(bench, reward, launch=f"launch{i}")
        batch = client.collect(timeout_s=60, ticket=ticket, on_failure="nan")
        seen.check(batch, own, without=sorted(set(own) - set(sent)))
        seen.added_s.append(waited_s)
        assert {(f.kind, f.message) for f in batch.failures} == {
            ("failed", "the process that submitted it ended before it was sent")
        }
        client.close()
        worker.stop()
    seen.again = bench.calls.num_again
    return seen


def start_again(bench: Bench, *, tries: int) -> Seen:
    """`kill -9` in the midst of a step; the job starts again under its run name, with a new launch."""
    seen, numbers = Seen(tries=tries), Numbers()
    reward = reward_of("Logged", calls=str(bench.calls.path), seconds=0.2, batch_size=4)
    bench.workers("gpu")
    ends = "batch = client.collect(timeout_s=60)\nsay(batch.rewards['reward'].tolist())\nsay(batch.num_hits)"

    def submitted(own: list[int]) -> str:
        return f"client.submit(samples_of(range({own[0]}, {own[-1] + 1})))\n"

    def undisturbed() -> float:
        started, own = time.monotonic(), numbers.take(40)
        usual = job(bench, reward, submitted(own) + ends, launch=f"usual{own[0]}")
        assert usual.line() == own
        usual.close()
        return time.monotonic() - started

    usual_s = undisturbed_s(undisturbed, num_steps=1)
    for i in range(tries):
        own, started = numbers.take(40), time.monotonic()
        first = job(bench, reward, submitted(own) + "client.collect(timeout_s=600)", launch=f"first{i}")
        wait_until(lambda own=own: len(set(own) & set(bench.calls.begun)) >= 12, 30)
        first.kill()
        again = job(bench, reward, submitted(own) + ends, launch=f"second{i}")
        rewards = again.line()
        seen.added_s.append(time.monotonic() - started - usual_s)
        seen.checked += len(own)
        seen.wrong += sum(r != n for r, n in zip(rewards, own, strict=True))
        assert again.line()["reward"] >= 4, "nothing was answered from what the first launch had scored"
        again.close()
    seen.again = bench.calls.num_again
    return seen


def pause_trainer(bench: Bench) -> tuple[float, str]:
    """SIGSTOP of a trainer until another has its place; the seconds that took, and what the first then says."""
    reward = reward_of("Logged", calls=str(bench.calls.path))
    what = """
client.submit(samples_of([1]))
client.collect(timeout_s=60)
say("collected")
try:
    while True:
        client.submit(samples_of([2]))
        client.collect(timeout_s=60)
        time.sleep(0.1)
except Exception as error:
    say(f"{type(error).__name__}: {error}")
"""
    bench.workers("gpu")
    trainer = job(bench, reward, what, launch="one")
    assert trainer.line() == "collected"
    os.kill(trainer.pid, signal.SIGSTOP)
    _client, waited_s = successor(bench, reward, launch="one")
    os.kill(trainer.pid, signal.SIGCONT)
    return waited_s, trainer.line()


def read(path: Path) -> Ticket:
    """A pickled ticket."""
    ticket: Ticket = pickle.loads(path.read_bytes())
    return ticket
