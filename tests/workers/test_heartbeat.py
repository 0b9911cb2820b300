from __future__ import annotations

import os
import threading
import time

import pytest

from tasks import keys
from tasks.outcomes import address
from tasks.payloads import RedisStore
from tasks.settings import load_settings
from tests.outcomes import Outcomes
from tests.servers import wait_until
from workers.loading.cache import ModelCache
from workers.process.heartbeat import HeartbeatThread, WorkerState
from workers.process.startup import release_and_end
from workers.scoring.held_claims import HeldClaims

A, B, C = (address("run", "f", key) for key in ("a", "b", "c"))
TTL_S = 1.0
LATER_MS = 2**43


@pytest.fixture
def beats_of(settings):
    """Makes heartbeats and ends them."""
    made = []

    def make(outcomes: Outcomes, url: str = settings.payloads, claims: HeldClaims | None = None) -> HeartbeatThread:
        store, models = RedisStore(url), ModelCache(load_settings())
        claims = claims or HeldClaims(outcomes)
        state = WorkerState("gpu.1@h", ("gpu", "mine"))
        beats = HeartbeatThread(state, claims, outcomes, store, models, TTL_S)
        beats.start()
        made.append((beats, store))
        return beats

    yield make
    for beats, store in made:
        beats.end()
        store.close()


@pytest.fixture
def outcomes(outcomes) -> Outcomes:
    return Outcomes(outcomes.redis, TTL_S, 60)


def test_a_worker_says_what_it_serves(outcomes, beats_of, settings):
    beats_of(outcomes)
    (worker,) = wait_until(outcomes.workers)
    assert (worker.node, worker.queues, worker.pid) == ("gpu.1@h", ("gpu", "mine"), os.getpid())
    assert (worker.state, worker.loading, worker.models) == ("ready", (), ())
    store = RedisStore(settings.payloads)
    assert worker.store == store.identity()
    store.close()


def test_a_worker_that_ends_is_off_the_list_at_once_and_stays_off(outcomes, beats_of):
    beats = beats_of(outcomes)
    wait_until(outcomes.workers)
    beats.end()
    assert outcomes.workers() == []
    time.sleep(TTL_S / 2)
    assert outcomes.workers() == []
    assert not beats.is_alive()


def test_a_beat_under_way_when_the_worker_ends_does_not_bring_it_back(outcomes, beats_of, monkeypatch):
    beat = outcomes.beat
    is_beating = []

    def slow_beat(*args):
        is_beating.append(True)
        time.sleep(0.2)
        beat(*args)

    monkeypatch.setattr(outcomes, "beat", slow_beat)
    beats = beats_of(outcomes)
    wait_until(lambda: is_beating)
    beats.end()
    assert outcomes.workers() == []


@pytest.fixture
def claims(outcomes, beats_of) -> HeldClaims:
    """Held claims that a heartbeat extends."""
    claims = HeldClaims(outcomes)
    beats_of(outcomes, claims=claims)
    return claims


def test_claims_that_are_held_live_on_and_others_expire(outcomes, claims):
    outcomes.claim([A, B], [1, 1], "mine", LATER_MS)
    claims.hold([A], "mine")
    wait_until(lambda: outcomes.claimed([A, B]) == [True, False])
    time.sleep(TTL_S)
    assert outcomes.claimed([A]) == [True]
    assert claims.tokens == {A: "mine"}
    claims.drop([A], "mine")
    wait_until(lambda: outcomes.claimed([A]) == [False])


def test_a_task_that_ends_lets_no_claim_of_another_task_go(outcomes, claims):
    """Redis was emptied while a task was scoring, and the same worker took the message that was sent again."""
    outcomes.claim([A], [1], "first", LATER_MS)
    claims.hold([A], "first")
    outcomes.redis.flushall()
    outcomes.claim([A], [1], "second", LATER_MS)
    claims.hold([A], "second")
    claims.drop([A], "first")
    time.sleep(2 * TTL_S)
    assert outcomes.claimed([A]) == [True]


def test_what_an_ending_process_gives_back_is_not_claimed_again_by_an_extension_under_way(
    outcomes, beats_of, monkeypatch
):
    extend, is_extending = outcomes.extend, threading.Event()

    def slow_extend(tokens):
        if tokens:
            is_extending.set()
            time.sleep(0.2)
        return extend(tokens)

    monkeypatch.setattr(outcomes, "extend", slow_extend)
    claims = HeldClaims(outcomes)
    beats = beats_of(outcomes, claims=claims)
    for token, addresses in (("one", [A, B]), ("two", [C])):
        outcomes.claim(addresses, [1] * len(addresses), token, LATER_MS)
        claims.hold(addresses, token)
    assert is_extending.wait(10)
    release_and_end(claims, beats)
    time.sleep(0.3)
    assert outcomes.claimed([A, B, C]) == [False, False, False]
    assert not any(outcomes.redis.exists(keys.starts(a)) for a in (A, B, C))


def test_a_bug_of_ours_does_not_end_the_threads(outcomes, beats_of, monkeypatch):
    beat, extend, bugs = outcomes.beat, outcomes.extend, [0, 0]

    def raise_once(i, call):
        def called(*args):
            bugs[i] += 1
            if bugs[i] == 1:
                raise KeyError("a bug of ours")
            return call(*args)

        return called

    monkeypatch.setattr(outcomes, "beat", raise_once(0, beat))
    monkeypatch.setattr(outcomes, "extend", raise_once(1, extend))
    claims = HeldClaims(outcomes)
    beats_of(outcomes, claims=claims)
    outcomes.claim([A], [1], "mine", LATER_MS)
    claims.hold([A], "mine")
    wait_until(outcomes.workers)
    time.sleep(2 * TTL_S)
    assert outcomes.claimed([A]) == [True]


def test_a_worker_is_back_on_the_list_after_redis_was_emptied_or_away(private_redis, beats_of):
    from tasks.servers.connections import connect

    server = private_redis()
    with connect(server.url) as client:
        outcomes = Outcomes(client, TTL_S, 60)
        beats = beats_of(outcomes, server.url)
        wait_until(outcomes.workers)
        client.flushall()
        wait_until(outcomes.workers)
        server.stop()
        time.sleep(TTL_S)
        assert beats.is_alive()
        server.start()
        assert wait_until(outcomes.workers)
        beats.end()


def test_a_redis_that_refuses_to_write_does_not_end_the_heartbeat(private_redis, beats_of):
    from tasks.servers.connections import connect

    server = private_redis()
    with connect(server.url) as client:
        outcomes = Outcomes(client, TTL_S, 60)
        beats = beats_of(outcomes, server.url)
        wait_until(outcomes.workers)
        client.config_set("min-replicas-to-write", 1)  # NOREPLICAS, as a master without its replicas answers
        time.sleep(TTL_S)
        assert beats.is_alive()
        client.config_set("min-replicas-to-write", 0)
        assert wait_until(outcomes.workers)
        beats.end()
