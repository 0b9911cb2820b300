"""Another Celery application, or another program, in the same Redis database: each has its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
from celery import Celery

from tasks.celery_app import make_app
from tasks.errors import RedisUnreachableError
from tasks.settings import load_settings
from tests.pipeline.conftest import assert_rewards, samples_of
from tests.servers import messages_in, wait_until, worker_env
from trainer_client import CollectTimeoutError


@pytest.fixture
def other(redis_url):
    """A Celery application that has nothing to do with us, and a queue `gpu`."""
    app = Celery("other", broker=redis_url, backend=redis_url, set_as_current=False)
    yield app
    app.close()


def test_the_tasks_of_another_celery_application_are_neither_taken_nor_thrown_away(
    other, clients, workers, settings, redis_server, tmp_path
):
    for number in range(3):
        other.send_task("other.train", args=[number], queue="gpu")
    (worker,) = workers("gpu")
    client = clients("PixelCode")
    client.submit(samples_of(range(8)))
    assert_rewards(client.collect(timeout_s=60), range(8))
    purge = [sys.executable, "-m", "celery", "-A", "tasks", "purge", "-f", "-Q", "gpu"]
    subprocess.run(purge, cwd=tmp_path, env=worker_env(settings, {}), check=True, capture_output=True)
    with redis_server.client() as broker:
        assert broker.llen("gpu") == 3
    assert "message dropped" not in worker.log_text


def test_neither_application_sees_the_others_workers_and_commands(other, workers, outcomes):
    workers("gpu")
    (own,) = outcomes.workers()
    assert other.control.ping(timeout=1) == []
    other.control.shutdown()
    assert [w.node for w in outcomes.workers()] == [own.node]


@pytest.mark.parametrize("value", ["string", "hash"])
def test_a_key_named_like_a_queue_is_of_no_concern(clients, workers, redis_server, value):
    workers("gpu")
    with redis_server.client() as broker:
        if value == "string":
            broker.set("gpu", "x")
        else:
            broker.hset("gpu", "a", "b")
    client = clients("PixelCode")
    client.submit(samples_of(range(8)))
    assert_rewards(client.collect(timeout_s=60), range(8))


def test_a_queues_own_key_that_is_no_list_is_named_and_all_goes_on_once_it_is_deleted(clients, workers, redis_server):
    (worker,) = workers("gpu")
    client = clients("PixelCode")
    client.submit(samples_of([1]))
    assert_rewards(client.collect(timeout_s=60), [1])
    key = "rewardq:queue:gpu"
    with redis_server.client() as broker:
        broker.set(key, "x")
        wait_until(lambda: f"worker waits: the key '{key}' in the Redis for queues is no list" in worker.log_text)
        client.submit(samples_of([2]))
        with pytest.raises(CollectTimeoutError, match=f"the key '{key}' .* is no list|{key}.*WRONGTYPE"):
            client.collect(timeout_s=4)
        with pytest.raises(RedisUnreachableError, match=f"the key '{key}' .* is no list.*delete it"):
            clients("PixelCode", run="another")
        broker.delete(key)
    assert_rewards(client.collect(timeout_s=60), [2])
    assert worker.process.poll() is None


def test_a_message_that_is_none_of_ours_is_dropped_logged_and_counted(clients, workers, redis_server, settings):
    (worker,) = workers("gpu")
    with redis_server.client() as broker:
        broker.lpush("rewardq:queue:gpu", b'{"a prompt": 1}')
        wait_until(lambda: messages_in(broker, "gpu") == [])
    wait_until(lambda: "message dropped" in worker.log_text)
    assert "queue=gpu id=unknown num_bytes=15 why=body: missing" in worker.log_text
    assert "a prompt" not in worker.log_text
    client = clients("PixelCode")
    client.submit(samples_of([1]))
    assert_rewards(client.collect(timeout_s=60), [1])
    code = "import tasks; stats, = tasks.app.control.inspect(timeout=3).stats().values(); print(stats['messages'])"
    said = subprocess.run(
        [sys.executable, "-c", code], env=worker_env(settings, {}), check=True, capture_output=True, text=True
    ).stdout
    assert said == "{'taken': 2, 'dropped': 1}\n"


def test_a_user_of_redis_who_may_use_our_keys_alone_can_do_all(clients, workers, private_redis):
    """Messages, chords, outcomes, payloads, remote control: all keys begin with our name."""
    server = private_redis()
    with server.client() as admin:
        rules = ("reset", "on", ">secret", "~rewardq:*", "&*", "+@all", "-@admin", "-@dangerous", "+info")
        admin.execute_command("ACL", "SETUSER", "mine", *rules)
    settings = load_settings(broker_url=server.url.replace("//", "//mine:secret@"), claim_ttl_s=2, reconcile_s=0.5)
    workers("gpu", settings=settings)
    client = clients("PixelCode", {"reward_model": "jpeg_incompressibility_Rank", "batch_size": 2}, settings=settings)
    client.submit(samples_of(range(8), group="g"), group_size=8)
    assert_rewards(client.collect(timeout_s=60), range(8))
    app = make_app(settings)
    assert len(app.control.ping(timeout=2)) == 1
    app.close()
    with server.client() as admin:
        assert admin.acl_log() == []
