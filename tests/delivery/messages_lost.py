"""Faults on the way: messages that vanish, connections that break, a Redis that is restarted or full."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from typing import Any

import pytest
import redis

from tasks import keys
from tasks.servers.connections import connect
from tasks.settings import load_settings
from tests.delivery.conftest import Bench
from tests.delivery.seen import Numbers, Seen, reward_of, step, undisturbed_s
from tests.pipeline.conftest import samples_of, together
from tests.servers import RedisServer, wait_until
from trainer_client import CollectTimeoutError, RewardClient


def lose_popped_message(bench: Bench, *, tries: int) -> Seen:
    """An idle worker is stopped (SIGSTOP), takes a message all the same, and is killed: the message is nowhere."""
    supervisor = bench.supervised("gpu")
    client = bench.clients(reward_of("Logged", calls=str(bench.calls.path)))
    seen, numbers = Seen(tries=tries), Numbers()
    usual_s = undisturbed_s(lambda: step(client, numbers.take(8), seen))
    with connect(bench.settings.broker) as broker:
        for _ in range(tries):
            while True:
                own = numbers.take(8)
                os.kill(supervisor.worker.pid, signal.SIGSTOP)
                started = time.monotonic()
                client.submit(samples_of(own))
                client.flush()
                if not queued_in(broker, "gpu"):
                    break
                os.kill(supervisor.worker.pid, signal.SIGCONT)  # it was stopped between two of its questions for more
                seen.check(client.collect(timeout_s=120, on_failure="nan"), own)
            supervisor.kill()
            seen.check(client.collect(timeout_s=120, on_failure="nan"), own)
            seen.added_s.append(time.monotonic() - started - usual_s)
            supervisor.wait_ready()
    seen.again = bench.calls.num_again
    return seen


def kill_connections(bench: Bench, *, tries: int, call_s: float) -> Seen:
    """`CLIENT KILL` of every connection to Redis, in the midst of a call of a judge and of a model."""
    judge = bench.judges(delay_s=call_s)
    (gpu, vlm) = bench.workers("gpu", "vlm")
    asks = {**reward_of("Asks", url=judge.url, batch_size=1, queue="vlm"), "name": "asks"}
    logs = reward_of("Logged", calls=str(bench.calls.path), seconds=call_s, batch_size=4)
    client = bench.clients(logs, asks)
    seen, numbers = Seen(tries=tries), Numbers()
    for _ in range(tries):
        own = numbers.take(4)
        started = time.monotonic()
        client.submit(samples_of(own))
        wait_until(lambda last=own[-1]: judge.num_open == 4 and last in bench.calls.begun, 30)
        time.sleep(0.2 * call_s)
        with bench.redis.client() as admin:
            admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        batch = client.collect(timeout_s=60, on_failure="nan")
        seen.check(batch, own)
        seen.wrong += batch.rewards["asks"].tolist() != [float(n) for n in own]
        seen.added_s.append(time.monotonic() - started - call_s)
    assert gpu.process.poll() is None
    assert vlm.process.poll() is None
    seen.again = bench.calls.num_again + len(judge.asked) - len(set(judge.asked))
    return seen


def lose_redis(bench: Bench, *, tries: int, how: str, away_s: float) -> Seen:
    """Redis cannot be reached by trainer and workers: connections `cut`, or packets lost (`freeze`)."""
    proxy = bench.proxies(bench.redis)
    settings = load_settings(**{**bench.settings.model_dump(), "broker_url": proxy.url})
    bench.workers("gpu", settings=settings)
    client = bench.clients(
        reward_of("Logged", calls=str(bench.calls.path), seconds=0.5, batch_size=4), settings=settings
    )
    seen, numbers = Seen(tries=tries), Numbers()
    usual_s = undisturbed_s(lambda: step(client, numbers.take(32), seen), num_steps=1)
    for _ in range(tries):
        own = numbers.take(32)
        started = time.monotonic()
        client.submit(samples_of(own[:16]))
        wait_until(lambda first=own[0]: first in bench.calls.begun, 30)
        getattr(proxy, how)()
        client.submit(samples_of(own[16:]))
        mender = threading.Timer(away_s, proxy.mend)
        mender.start()
        seen.check(client.collect(timeout_s=180, on_failure="nan"), own)
        mender.join()
        seen.added_s.append(time.monotonic() - started - usual_s - away_s)
    seen.again = bench.calls.num_again
    return seen


def collect_while_frozen(bench: Bench, *, world_size: int, timeout_s: float) -> tuple[Seen, list[float]]:
    """Packets to Redis are lost while every rank collects; also the seconds that each took to say that it is late."""
    proxy = bench.proxies(bench.redis)
    settings = load_settings(**{**bench.settings.model_dump(), "broker_url": proxy.url})
    reward = reward_of("Logged", calls=str(bench.calls.path), batch_size=4)
    ranks = [
        bench.clients(reward, settings=settings, launch="one", rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    seen, numbers = Seen(tries=1), Numbers()
    own = [numbers.take(8) for _ in ranks]
    for client, mine in zip(ranks, own, strict=True):
        client.submit(samples_of(mine), step=0)
        client.flush()
    proxy.freeze()

    def collect_late(client: RewardClient) -> float:
        started = time.monotonic()
        with pytest.raises(CollectTimeoutError, match="Redis is away"):
            client.collect(timeout_s=timeout_s)
        return time.monotonic() - started

    took_s = together(*(functools.partial(collect_late, client) for client in ranks))
    proxy.mend()
    bench.workers("gpu")
    batches = together(*(functools.partial(client.collect, timeout_s=120, on_failure="nan") for client in ranks))
    for batch, mine in zip(batches, own, strict=True):
        seen.check(batch, mine)
    seen.again = bench.calls.num_again
    return seen, took_s


def restart_redis(bench: Bench, *, tries: int, keeps_file: bool) -> Seen:
    """`kill -9` of Redis with work in queue and in hand, and a start a second later."""
    options = ("--appendonly", "yes", "--appendfsync", "always") if keeps_file else ()
    server = bench.private_redis(*options)
    settings = load_settings(**{**bench.settings.model_dump(), "broker_url": server.url})
    bench.workers("gpu", settings=settings)
    client = bench.clients(
        reward_of("Logged", calls=str(bench.calls.path), seconds=0.5, batch_size=4), settings=settings
    )
    seen, numbers = Seen(tries=tries), Numbers()
    usual_s = undisturbed_s(lambda: step(client, numbers.take(32), seen), num_steps=1)
    for _ in range(tries):
        own = numbers.take(32)
        started = time.monotonic()
        client.submit(samples_of(own))
        wait_until(lambda ninth=own[8]: ninth in bench.calls.begun, 30)
        server.kill()
        time.sleep(1)
        server.start()
        seen.check(client.collect(timeout_s=120, on_failure="nan"), own)
        seen.added_s.append(time.monotonic() - started - usual_s)
    seen.again = bench.calls.num_again
    return seen


def fill_redis(bench: Bench, *, tries: int, full_s: float) -> Seen:
    """Redis at its maxmemory, with messages queued and a worker that takes one."""
    server = bench.private_redis("--maxmemory", "32mb", "--maxmemory-policy", "noeviction")
    settings = load_settings(**{**bench.settings.model_dump(), "broker_url": server.url})
    (worker,) = bench.workers("gpu", settings=settings)
    client = bench.clients(reward_of("Logged", calls=str(bench.calls.path), batch_size=4), settings=settings)
    seen, numbers = Seen(tries=tries), Numbers()
    usual_s = undisturbed_s(lambda: step(client, numbers.take(32), seen), num_steps=1)
    for _ in range(tries):
        own = numbers.take(32)
        os.kill(worker.pid, signal.SIGSTOP)
        client.submit(samples_of(own[:16]))
        client.flush()
        filler = Filler(server)
        client.submit(samples_of(own[16:]))
        os.kill(worker.pid, signal.SIGCONT)
        batch = None
        try:
            batch = client.collect(timeout_s=full_s)  # what was taken back may have made just the room that it needed
        except CollectTimeoutError as error:
            assert "Redis is full" in str(error), error  # noqa: PT017
        started = time.monotonic()
        filler.make_room()
        seen.check(batch or client.collect(timeout_s=120, on_failure="nan"), own)
        seen.added_s.append(time.monotonic() - started - usual_s)
    assert worker.process.poll() is None
    seen.again = bench.calls.num_again
    return seen


def queue_much(bench: Bench, *, num_chunks: int) -> tuple[Seen, int]:
    """Many chunks before one slow worker, with a message taken out by hand; also how many messages were sent."""
    settings = bench.settings.model_copy(update={"reconcile_s": 2.0})  # a pause of the worker's is no loss
    client = bench.clients(reward_of("Logged", calls=str(bench.calls.path), batch_size=1), settings=settings)
    seen, own = Seen(tries=1), Numbers().take(num_chunks)
    client.submit(samples_of(own))
    client.flush(timeout_s=120)
    with connect(bench.settings.broker) as broker:
        queued = queued_in(broker, "gpu")
        assert len(queued) == num_chunks
        place, message = queued[num_chunks // 2]
        assert broker.lrem(place, 1, message) == 1
        bench.workers("gpu", concurrency=1)
        while client.pending() > 1:
            time.sleep(0.05)
        others_at = time.monotonic()
        seen.check(client.collect(timeout_s=170, on_failure="nan"), own)
        seen.added_s.append(time.monotonic() - others_at)
        num_sent = int(broker.get(keys.sent_number("gpu")))
    seen.again = bench.calls.num_again
    return seen, num_sent


def queued_in(broker: Any, queue: str) -> list[tuple[bytes, bytes]]:
    """The messages in a queue, each with the list that it is in (one for each priority)."""
    return [
        (place, m)
        for place in broker.keys(f"rewardq:queue:{queue}*")
        if broker.type(place) == b"list"
        for m in broker.lrange(place, 0, -1)
    ]


class Filler:
    """Fills a Redis to its last byte, and keeps it full."""

    def __init__(self, server: RedisServer) -> None:
        self._client = server.client(7)
        self._is_full = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        wait_until(lambda: self._is_full)

    def _run(self) -> None:
        smallest, largest = 100, 1_000_000
        size, i = largest, 0
        while not self._ended.is_set():
            try:
                self._client.set(f"filler{i}", b"x" * size)
                i += 1
                size = min(2 * size, largest)  # a connection that ends leaves room for hundreds of small values
            except redis.OutOfMemoryError:
                if size == smallest:
                    self._is_full = True
                    time.sleep(0.002)
                size = max(smallest, size // 2)

    def make_room(self) -> None:
        """Stop, and take everything of it away."""
        self._ended.set()
        self._thread.join()
        self._client.flushdb()
        self._client.close()
