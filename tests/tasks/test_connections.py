from __future__ import annotations

import contextlib
import random
import threading

import pytest
import redis

from tasks.celery_app import make_app
from tasks.errors import EvictionError, RedisUnreachableError
from tasks.servers.connections import LOST, check_eviction, check_reachable, connect, why_away
from tasks.settings import load_settings
from tests.servers import wait_until
from workers.scoring.retry import Clock, retry


@contextlib.contextmanager
def lacks_replicas(server, admin):
    admin.config_set("min-replicas-to-write", 1)
    yield
    admin.config_set("min-replicas-to-write", 0)


@contextlib.contextmanager
def cannot_save(server, admin):
    (server.folder / "dump.rdb").mkdir()  # where its file would go
    admin.config_set("save", "3600 1000000")
    admin.bgsave()
    wait_until(lambda: admin.info("persistence")["rdb_last_bgsave_status"] == "err")
    yield
    admin.config_set("save", "")


@contextlib.contextmanager
def runs_a_script(server, admin):
    admin.config_set("lua-time-limit", 50)

    def run():
        with server.client() as other, contextlib.suppress(redis.ResponseError):
            other.eval("while true do end", 0)

    def is_busy():
        try:
            return not admin.ping()
        except redis.ResponseError:
            return True

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(is_busy)
    yield
    admin.script_kill()
    thread.join()


@contextlib.contextmanager
def has_lost_its_master(server, admin):
    admin.config_set("replica-serve-stale-data", "no")
    admin.slaveof("127.0.0.1", 1)
    yield
    admin.slaveof()


@contextlib.contextmanager
def became_a_replica(server, admin):
    admin.slaveof("127.0.0.1", 1)
    yield
    admin.slaveof()


REFUSALS = {
    lacks_replicas: "refuses to write: fewer replicas follow it than its min-replicas-to-write",
    cannot_save: "refuses to write: it cannot save to its disk",
    runs_a_script: "is busy: it runs a script",
    has_lost_its_master: "is away: ",
    became_a_replica: "is away: ",
}


def ways_to_write(url):
    """One for each kind of connection of ours: plain, in a pipeline, in a script, Celery's results, kombu's queues."""
    client, app = connect(url), make_app(load_settings(broker_url=url))
    connection = app.connection_for_write()
    ways = [
        lambda: client.set("key", "value"),
        lambda: client.pipeline(transaction=False).set("key", "value").execute(),
        lambda: client.pipeline().set("key", "value").execute(),
        lambda: client.eval("return redis.call('SET', KEYS[1], ARGV[1])", 1, "key", "value"),
        lambda: app.backend.client.set("key", "value"),
        lambda: connection.default_channel.client.set("key", "value"),
    ]
    for way in ways:
        way()

    def close():
        connection.release()
        app.backend.client.close()
        app.close()
        client.close()

    return ways, close


@pytest.mark.parametrize("refusing", REFUSALS)
def test_a_server_that_refuses_for_a_while_is_asked_again_and_says_why(private_redis, refusing):
    server = private_redis()
    ways, close = ways_to_write(server.url)
    with server.client() as admin, contextlib.ExitStack() as until_mended:
        until_mended.enter_context(refusing(server, admin))
        for way in ways:
            with pytest.raises(LOST) as caught:
                way()
            assert why_away(caught.value).startswith(f"Redis {REFUSALS[refusing]}")
        mender = threading.Timer(0.5, until_mended.close)
        mender.start()
        for way in ways:
            retry(way, 10, Clock(), random.Random())
        mender.join()
    close()


def test_a_password_that_is_set_while_a_client_runs_is_said_as_such(private_redis):
    server = private_redis()
    with connect(server.url) as client:
        client.set("key", "value")
        client.config_set("requirepass", "new")
        client.connection_pool.disconnect()
        with pytest.raises(LOST) as caught:
            client.get("key")
    assert why_away(caught.value).startswith("Redis refuses this user now: ")


def test_a_cluster_without_its_slots_is_waited_for(private_redis):
    server = private_redis("--cluster-enabled", "yes")
    with connect(server.url) as client, pytest.raises(LOST):
        client.get("key")


def test_a_server_that_answers_and_refuses_is_not_said_to_be_nobody_there(private_redis):
    server = private_redis()
    with (
        server.client() as admin,
        cannot_save(server, admin),
        connect(server.url) as client,
        pytest.raises(RedisUnreachableError) as caught,
    ):
        check_reachable(client, server.url, "Redis for queues")
    assert str(caught.value).startswith(f"Redis for queues at {server.url}: Redis refuses to write: it cannot save")


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
    monkeypatch.setattr("tasks.servers.connections.SOCKET_TIMEOUT_S", 0.3)
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


def test_a_user_who_may_not_ask_for_the_policy_is_let_in(private_redis):
    server = private_redis("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    with server.client() as admin:
        admin.acl_setuser(
            "worker", enabled=True, passwords=["+pw"], keys=["*"], categories=["+@all"], commands=["-info"]
        )
    url = server.url.replace("redis://", "redis://worker:pw@")
    with connect(url) as client:
        check_eviction(client, url)
