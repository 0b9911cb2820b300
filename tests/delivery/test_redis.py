"""A Redis that is full, that would drop keys, and that is restarted."""

from __future__ import annotations

import os
import signal

import pytest

from tasks.errors import EvictionError, SettingsError
from tasks.settings import load_settings
from tests.delivery.conftest import MODULES
from tests.delivery.messages_lost import Filler
from tests.delivery.seen import reward_of
from tests.pipeline.conftest import assert_rewards, samples_of
from tests.servers import WorkerProcess, messages_in, wait_until
from trainer_client import CollectTimeoutError


@pytest.fixture
def full(private_redis):
    """A Redis of 32 MB with settings for it, and what fills it: `fill()` returns a `Filler`."""
    server = private_redis("--maxmemory", "32mb", "--maxmemory-policy", "noeviction")
    fillers = []

    def fill():
        fillers.append(Filler(server))
        return fillers[-1]

    yield server, load_settings(broker_url=server.url, claim_ttl_s=2, reconcile_s=0.5), fill
    for filler in fillers:
        filler.make_room()


def assert_serves(client):
    """A worker takes messages; when its heartbeat is there it does not yet, and might wait for room before it does."""
    client.submit(samples_of([100]))
    assert_rewards(client.collect(timeout_s=60), [100])


def test_a_full_redis_holds_senders_up_says_so_and_the_step_ends_when_there_is_room(full, clients, workers):
    _server, settings, fill = full
    (worker,) = workers("gpu", settings=settings)
    client = clients({"reward_model": "PixelCode", "batch_size": 2}, settings=settings)
    assert_serves(client)
    filler = fill()
    client.submit(samples_of(range(20)))
    with pytest.raises(CollectTimeoutError, match=r"20 of 20 samples had no answer after 4 s: .*Redis is full"):
        client.collect(timeout_s=4)
    filler.make_room()
    assert_rewards(client.collect(timeout_s=60), range(20))
    assert worker.process.poll() is None


@pytest.mark.parametrize("serves", [True, False], ids=["serves", "starts"])
def test_a_worker_that_takes_a_message_while_redis_is_full_serves_on_when_there_is_room(full, clients, workers, serves):
    """Its tasks can note nothing, and a consumer that starts fails at what it writes; that must not be their end."""
    server, settings, fill = full
    (worker,) = workers("gpu", settings=settings)
    client = clients({"reward_model": "PixelCode", "batch_size": 2}, settings=settings)
    if serves:
        assert_serves(client)
    os.kill(worker.pid, signal.SIGSTOP)
    client.submit(samples_of(range(20)))
    client.flush()
    filler = fill()
    os.kill(worker.pid, signal.SIGCONT)
    with pytest.raises(CollectTimeoutError, match="Redis is full"):
        client.collect(timeout_s=6)
    with server.client() as broker:
        assert not serves or len(messages_in(broker, "gpu")) < 10, "it took no message, and this test tests nothing"
    filler.make_room()
    assert_rewards(client.collect(timeout_s=60), range(20))
    assert worker.process.poll() is None
    assert worker.log_text.count("Redis is full") < 10


def test_a_queue_without_a_heartbeat_on_a_redis_that_is_nearly_full_may_be_that_ones_fault(private_redis, clients):
    """It takes some writes and refuses others: the heartbeats may be what it refused."""
    server = private_redis("--maxmemory", "256mb", "--maxmemory-policy", "noeviction")
    with server.client(7) as filler:
        i = 0
        while filler.info("memory")["used_memory"] < 0.992 * 256 * 2**20:
            filler.set(f"filler{i}", b"x" * 200_000)
            i += 1
    client = clients("PixelCode", settings=load_settings(broker_url=server.url))
    client.submit(samples_of(range(2)))
    with pytest.raises(CollectTimeoutError, match=r"Redis is full: .*; queue 'gpu' has no worker"):
        client.collect(timeout_s=2)


def test_redis_without_its_replicas_holds_up_a_step_says_so_and_the_step_ends_when_they_are_back(bench, private_redis):
    """With `min-replicas-to-write`, as behind sentinels, a new master refuses writes until its replicas follow it."""
    server = private_redis()
    settings = load_settings(broker_url=server.url, claim_ttl_s=2, reconcile_s=0.5)
    (worker,) = bench.workers("gpu", settings=settings)
    client = bench.clients(
        reward_of("Logged", calls=str(bench.calls.path), seconds=0.3, batch_size=2), settings=settings
    )
    client.submit(samples_of(range(16)))
    wait_until(lambda: len(bench.calls.begun) >= 4, 30)
    with server.client() as admin:
        admin.config_set("min-replicas-to-write", 1)
        client.submit(samples_of(range(16, 24)))
        with pytest.raises(CollectTimeoutError, match="Redis refuses to write: fewer replicas follow it than"):
            client.collect(timeout_s=4)
        admin.config_set("min-replicas-to-write", 0)
    assert_rewards(client.collect(timeout_s=60), range(24), "reward")
    assert worker.process.poll() is None


@pytest.fixture
def apart(private_redis):
    """Two servers, with settings by which the second is for payloads."""
    queues, payloads = private_redis(), private_redis("--maxmemory-policy", "noeviction")
    settings = load_settings(broker_url=queues.url, payload_url=payloads.url, claim_ttl_s=2, reconcile_s=0.5)
    return payloads, settings


def test_payloads_on_a_redis_of_their_own_that_is_full_hold_up_the_trainer_and_no_worker(apart, clients, workers):
    payloads, settings = apart
    (worker,) = workers("gpu", settings=settings)
    client = clients({"reward_model": "Slow", "seconds": 0.2, "batch_size": 2}, settings=settings)
    client.submit(samples_of(range(10)))
    client.flush()
    with payloads.client() as admin:
        admin.config_set("maxmemory", 1)
        (late,) = workers("gpu", settings=settings)  # starts, and serves what is there
        client.submit(samples_of(range(10, 20)))
        wait_until(lambda: client.pending() == 10, 30)
        with pytest.raises(CollectTimeoutError, match=r"10 of 20 samples had no answer after 2 s: .*Redis is full"):
            client.collect(timeout_s=2)
        assert admin.keys("rewardq:payload:*") == [], "a full Redis must give back what is no longer needed"
        admin.config_set("maxmemory", 0)
    assert_rewards(client.collect(timeout_s=60), range(20), "Slow")
    for one in (worker, late):
        assert one.process.poll() is None
        assert "Traceback" not in one.log_text


def test_a_redis_that_is_full_when_the_first_answer_of_a_class_is_seen_gives_back_what_is_no_longer_needed(
    private_redis, clients, workers
):
    """What a trainer notes of the code that answered has no room there; what it frees makes room."""
    server = private_redis("--maxmemory-policy", "noeviction")
    settings = load_settings(broker_url=server.url, claim_ttl_s=2, reconcile_s=0.5)
    (worker,) = workers("gpu", settings=settings)
    with clients("PixelCode", settings=settings, launch="one") as first:
        first.submit(samples_of([1]))
        assert_rewards(first.collect(timeout_s=60), [1])
    worker.stop()
    client = clients("PixelCode", settings=settings, launch="one")
    client.submit(samples_of([2]))
    client.flush()
    with server.client() as admin, server.client(1) as payloads:
        assert payloads.keys("rewardq:payload:*")
        admin.config_set("maxmemory", 1)
        client.submit(samples_of([1]))  # answered before
        wait_until(lambda: client.pending() == 1)
        client.cancel()
        wait_until(lambda: not payloads.keys("rewardq:payload:*"), 15)
        admin.config_set("maxmemory", 0)


def test_payloads_on_a_redis_of_their_own_that_is_away_are_waited_for(apart, clients, workers):
    payloads, settings = apart
    (worker,) = workers("gpu", settings=settings)
    client = clients({"reward_model": "Slow", "seconds": 0.2, "batch_size": 2}, settings=settings)
    client.submit(samples_of(range(10)))
    wait_until(lambda: client.pending() < 8, 30)
    payloads.kill()
    client.submit(samples_of(range(10, 20)))
    with pytest.raises(CollectTimeoutError, match=r"had no answer after 3 s: .*Redis is away"):
        client.collect(timeout_s=3)
    late = WorkerProcess("gpu", settings, worker.log.parent, None, {})
    wait_until(lambda: "worker waits: Redis is away" in late.log_text, 30)
    payloads.start()
    assert_rewards(client.collect(timeout_s=60), range(20), "Slow")
    for one in (worker, late):
        assert one.process.poll() is None
        one.stop()


@pytest.mark.parametrize("role", ["broker_url", "result_url", "payload_url"])
def test_a_client_refuses_any_redis_that_drops_keys(private_redis, clients, role):
    urls = {"broker_url": private_redis().url}
    evicting = private_redis("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    settings = load_settings(**{**urls, role: evicting.url})
    with pytest.raises(EvictionError) as caught:
        clients("PixelCode", settings=settings)
    assert f"the Redis at {evicting.url} has maxmemory-policy allkeys-lru and drops keys" in str(caught.value)
    assert "set `maxmemory-policy noeviction`" in str(caught.value)


@pytest.mark.parametrize("role", ["result_url", "payload_url"])
def test_a_worker_refuses_a_redis_for_results_or_payloads_that_drops_keys(private_redis, tmp_path, role):
    evicting = private_redis("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    settings = load_settings(**{"broker_url": private_redis().url, role: evicting.url})
    worker = WorkerProcess("gpu", settings, tmp_path, None, MODULES)
    assert worker.process.wait(30) == os.EX_CONFIG
    assert f"the Redis at {evicting.url} has maxmemory-policy allkeys-lru and drops keys" in worker.log_text
    assert "Traceback" not in worker.log_text


def test_a_user_who_may_not_ask_for_the_policy_trains_all_the_same(private_redis, clients, workers):
    server = private_redis()
    with server.client() as admin:
        admin.acl_setuser(
            "trainer",
            enabled=True,
            passwords=["+pw"],
            keys=["*"],
            channels=["*"],
            categories=["+@all"],
            commands=["-info", "-config"],
        )
    url = server.url.replace("redis://", "redis://trainer:pw@")
    settings = load_settings(broker_url=url, claim_ttl_s=2, reconcile_s=0.5)
    workers("gpu", settings=settings)
    client = clients("PixelCode", settings=settings)
    client.submit(samples_of(range(4)))
    assert_rewards(client.collect(timeout_s=60), range(4))


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_worker_refuses_a_redis_that_drops_keys_in_one_line(private_redis, tmp_path, policy):
    server = private_redis("--maxmemory", "100mb", "--maxmemory-policy", policy)
    worker = WorkerProcess("gpu", load_settings(broker_url=server.url), tmp_path, None, MODULES)
    assert worker.process.wait(30) == os.EX_CONFIG
    assert f"has maxmemory-policy {policy} and drops keys" in worker.log_text
    assert "set `maxmemory-policy noeviction`" in worker.log_text
    assert "Traceback" not in worker.log_text


def test_a_redis_that_evicts_nothing_is_taken_whatever_its_policy(private_redis, workers, clients):
    server = private_redis("--maxmemory-policy", "allkeys-lru")
    settings = load_settings(broker_url=server.url)
    workers("gpu", settings=settings)
    client = clients("PixelCode", settings=settings)
    client.submit(samples_of(range(4)))
    assert_rewards(client.collect(timeout_s=60), range(4))


def test_a_payload_folder_that_others_may_write_to_ends_a_worker_and_a_client_at_their_start(
    private_redis, clients, tmp_path
):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    settings = load_settings(broker_url=private_redis().url, payload_url=f"file://{folder}")
    worker = WorkerProcess("gpu", settings, tmp_path, None, MODULES)
    with pytest.raises(SettingsError, match=rf"the payload folder {folder} is refused: others may write to it"):
        clients("PixelCode", settings=settings)
    assert worker.process.wait(30) == os.EX_CONFIG
    assert f"the payload folder {folder} is refused: others may write to it (mode 0777)" in worker.log_text
    assert "Traceback" not in worker.log_text
