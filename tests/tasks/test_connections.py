from __future__ import annotations

import time

import pytest
import redis

from tasks.connections import check_eviction, check_reachable, connect, persist
from tasks.errors import EvictionError, RedisUnreachableError


class Flaky:
    """Fails so many times, then answers."""

    def __init__(self, num_failures: int, error: Exception) -> None:
        self.left, self.error, self.calls = num_failures, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return "answer"


@pytest.mark.parametrize(
    "error",
    [
        redis.ConnectionError("refused"),
        redis.TimeoutError("slow"),
        redis.BusyLoadingError("loading"),
        redis.OutOfMemoryError("full"),
        ConnectionResetError("reset"),
        TimeoutError("slow"),
    ],
)
def test_a_server_that_is_away_for_a_while_is_asked_again(error):
    call = Flaky(3, error)
    assert persist(call, give_up_s=10) == "answer"
    assert call.calls == 4


@pytest.mark.parametrize("error", [redis.ResponseError("WRONGTYPE"), ValueError("ours"), redis.DataError("ours")])
def test_an_error_that_asking_again_does_not_mend_is_raised_at_once(error):
    call = Flaky(3, error)
    with pytest.raises(type(error)):
        persist(call, give_up_s=10)
    assert call.calls == 1


def test_the_last_error_is_raised_at_the_deadline():
    started = time.monotonic()
    with pytest.raises(redis.ConnectionError, match="refused"):
        persist(Flaky(10**6, redis.ConnectionError("refused")), give_up_s=0.4)
    assert 0.1 < time.monotonic() - started < 1.5


def test_whoever_stops_waits_no_longer():
    started = time.monotonic()
    with pytest.raises(redis.ConnectionError):
        persist(Flaky(10**6, redis.ConnectionError("refused")), give_up_s=60, stop=lambda: True)
    assert time.monotonic() - started < 1


def test_a_server_that_answers_is_reachable(redis_url):
    with connect(redis_url) as client:
        check_reachable(client, redis_url, "Redis")


def test_nobody_there_is_said_with_what_to_start():
    url = "redis://user:s3cr3t@127.0.0.1:1/0"
    with connect(url) as client, pytest.raises(RedisUnreachableError) as caught:
        check_reachable(client, url, "broker")
    words = str(caught.value)
    assert "no broker answers at redis://user:***@127.0.0.1:1/0" in words
    assert "redis-server" in words
    assert "rewardq up" in words
    assert "REWARDQ_BROKER_URL" in words
    assert "s3cr3t" not in words


def test_a_wrong_password_is_said_and_not_shown(private_redis):
    server = private_redis("--requirepass", "right")
    url = server.url.replace("redis://", "redis://:s3cr3t@")
    with connect(url) as client, pytest.raises(RedisUnreachableError) as caught:
        check_reachable(client, url, "broker")
    assert "broker at redis://:***@127.0.0.1" in str(caught.value)
    assert "refuses this user" in str(caught.value)
    assert "s3cr3t" not in str(caught.value)


def test_a_server_that_hangs_is_given_up(private_redis, monkeypatch):
    monkeypatch.setattr("tasks.connections.SOCKET_TIMEOUT_S", 0.3)
    server = private_redis()
    with connect(server.url) as client:
        check_reachable(client, server.url, "broker")
        server.pause()
        with pytest.raises(RedisUnreachableError):
            check_reachable(client, server.url, "broker")
        server.resume()


@pytest.mark.parametrize(
    ("options", "is_refused"),
    [
        ((), False),
        (("--maxmemory", "100mb", "--maxmemory-policy", "noeviction"), False),
        (("--maxmemory-policy", "allkeys-lru"), False),
        (("--maxmemory", "100mb", "--maxmemory-policy", "volatile-ttl"), True),
        (("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"), True),
    ],
)
def test_a_server_that_drops_keys_when_it_is_full_is_refused(private_redis, options, is_refused):
    server = private_redis(*options)
    with connect(server.url) as client:
        if not is_refused:
            check_eviction(client, server.url)
            return
        with pytest.raises(EvictionError, match=f"maxmemory-policy {options[-1]}.*noeviction"):
            check_eviction(client, server.url)
