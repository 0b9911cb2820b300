"""Secrets of every kind are planted; none is found in anything that a pipeline shows, stores or sends.

A real Redis with three users, real workers that log at DEBUG, a judge on loopback that repeats its key, code of the
user's that raises with what it knows, and Flower.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import redis

from tasks.celery_app import make_app
from tasks.settings import Settings, load_settings
from tests.judges.scripted import MODEL, Answer, JudgeServer, Question, fails, says
from tests.pipeline.conftest import samples_of
from tests.servers import ROOT, RedisServer, WorkerProcess, flower_of
from trainer_client import RewardClient

SECRETS = {
    "the broker's password": "planted-broker-1",
    "the password of results": "planted-results-2",
    "the password of payloads": "planted-payloads-3",
    "the sentinels' password": "planted-sentinels-4",
    "the key of OpenAI": "planted-openai-5",
    "the key of a judge": "planted-judge-6",
    "another variable of the worker": "planted-aws-7",
    "the password of a proxy": "planted-proxy-8",
}

MODULE = '''
import os
from workers import PointwiseRewardModel

class Leaky(PointwiseRewardModel):
    """Raises with all that it knows."""

    required_fields = ("prompt",)

    def __call__(self, prompt, **kwargs):
        raise RuntimeError(
            f"cannot reach {os.environ['REWARDQ_BROKER_URL']} or {os.environ['HTTPS_PROXY']}; "
            f"key {os.environ['REWARDQ_KEY_JUDGE']} {os.environ['OPENAI_API_KEY']}"
        )
'''

JUDGEMENT = """# Detailed Judgement
1. Text Faithfulness:
## Justification: I was asked with {key}.
## Score: 3.4
2. Physical and Visual Quality:
## Justification: Fine.
## Score: 2.5
3. Text Rendering:
## Score: N/A
# Summary: {key}
"""


class LoudWorker(WorkerProcess):
    """A worker that logs all it can."""

    @staticmethod
    def command(queue: str, concurrency: int | None) -> list[str]:
        return [*WorkerProcess.command(queue, concurrency), "--loglevel", "DEBUG"]


def repeats_the_key(question: Question) -> Answer:
    """An answer of 200, or an error, that has the request's header in it."""
    header = question.headers["authorization"]
    if "logprobs" not in question.body:
        return says(JUDGEMENT.format(key=header))
    if question.number % 2:
        return fails(401, f"no such key: {header}", X_Seen=header)
    return says(f"Yes {header}", logprobs={"Yes": 0.7, header: 0.2, "No": 0.1})


@pytest.fixture
def redis_with_users(private_redis) -> RedisServer:
    """A server with a password for each of its three uses."""
    server = private_redis()
    passwords = list(SECRETS.values())
    with server.client() as admin:
        for user, password in zip(("results", "payloads"), passwords[1:3], strict=True):
            admin.execute_command("ACL", "SETUSER", user, "on", f">{password}", "~*", "&*", "+@all")
        admin.execute_command("ACL", "SETUSER", "admin", "on", "nopass", "~*", "&*", "+@all")
        admin.config_set("requirepass", passwords[0])
    return server


@pytest.fixture
def planted(redis_with_users: RedisServer) -> Settings:
    """Settings with four of the secrets; one of them is in a query."""
    broker, results, payloads, sentinels, *_ = SECRETS.values()
    at = f"127.0.0.1:{redis_with_users.port}"
    return load_settings(
        broker_url=f"redis://:{broker}@{at}/0",
        result_url=f"redis://results:{results}@{at}/1",
        payload_url=f"redis://{at}/2?username=payloads&password={payloads}",
        sentinel_password=sentinels,
        claim_ttl_s=2,
        reconcile_s=0.5,
    )


@pytest.fixture
def judge() -> Iterator[JudgeServer]:
    server = JudgeServer(repeats_the_key)
    yield server
    server.stop()


@pytest.fixture
def env(tmp_path: Path, judge: JudgeServer) -> dict[str, str]:
    """The other four, in the environment of the workers."""
    (tmp_path / "leaky.py").write_text(MODULE)
    *_, openai, key, aws, proxy = SECRETS.values()
    return {
        "REWARDQ_MODULES": "leaky",
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
        "OPENAI_API_KEY": openai,
        "REWARDQ_KEY_JUDGE": key,
        "AWS_SECRET_ACCESS_KEY": aws,
        "HTTPS_PROXY": f"http://me:{proxy}@proxy.invalid:3128",
        "REWARDQ_HOSTS": judge.root.removeprefix("http://"),
    }


@pytest.fixture
def loud_workers(planted: Settings, env: dict[str, str], tmp_path: Path) -> Iterator[list[WorkerProcess]]:
    started = [LoudWorker(queue, planted, tmp_path, 2, env) for queue in ("gpu", "vlm")]
    try:
        for worker in started:
            worker.wait_ready()
        yield started
    finally:
        for worker in started:
            worker.stop()


@pytest.fixture
def flower(planted: Settings, env: dict[str, str], tmp_path: Path, loud_workers) -> Iterator[str]:
    with flower_of(planted, tmp_path, "--address=127.0.0.1", **env, FLOWER_DEBUG="true") as url:
        yield url


def page(url: str) -> str:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=20) as reply:
        return reply.read().decode("utf-8", "replace")
    return ""


def all_of_redis(server: RedisServer) -> str:
    """Every name and value in every database, as text; messages are read out of their base64."""
    found: list[str] = []
    for database in range(3):
        with redis.Redis(port=server.port, db=database, username="admin", password="any") as client:
            for name in client.scan_iter():
                read = {b"string": client.get, b"list": lambda n, c=client: c.lrange(n, 0, -1), b"hash": client.hgetall}
                kind = client.type(name)
                found.append(repr((name, read.get(kind, client.dump)(name))))
    return "\n".join(found)


def test_no_planted_secret_is_found_anywhere(
    planted, redis_with_users, judge, loud_workers, flower, tmp_path, caplog
) -> None:
    caplog.set_level(logging.DEBUG)
    asking = {"api_base_url": judge.url, "vlm_model": MODEL, "api_key_env": "REWARDQ_KEY_JUDGE", "max_retries": 0}
    rewards = [
        {"name": "yes", "reward_model": "vllm_evaluate", **asking},
        {"name": "rubric", "reward_model": "rational_rewards_t2i", **asking},
        {"name": "leaky", "reward_model": "leaky.Leaky", "kind": "pointwise", "required_fields": ["prompt"]},
        {"name": "elsewhere", "reward_model": "vllm_evaluate", **asking, "api_base_url": "http://10.255.255.1:1/v1"},
    ]
    places: dict[str, str] = {}
    with RewardClient.from_dict({"rewards": rewards}, "planted", settings=planted, max_failure_rate=1.0) as client:
        ticket = client.submit(samples_of(range(4)))
        batch = client.collect(timeout_s=90, on_failure="nan")
        places["the client"] = repr(client) + repr(client.settings)
        places["the ticket"] = repr(pickle.dumps(ticket))
        places["the batch"] = repr((batch.failures, batch.info)) + repr(pickle.dumps(batch))
        places["redis"] = all_of_redis(redis_with_users)

        app = make_app(planted)
        inspect = app.control.inspect(timeout=3)
        for what in ("stats", "conf", "report", "active", "registered", "active_queues"):
            places[f"inspect {what}"] = repr(getattr(inspect, what)())
        app.backend.client.connection_pool.disconnect()
        app.close()

        names = list(json.loads(page(f"{flower}/api/workers?refresh=1")))
        paths = ["", "workers", "tasks", "broker", "metrics", "api/workers", "api/tasks", "api/queues/length"]
        for path in (*paths, *(f"worker/{name}" for name in names)):
            places[f"flower /{path}"] = page(f"{flower}/{path}")

    rubric = batch.rewards["rubric"]
    assert rubric.tolist() == pytest.approx([0.65] * 4), "the judge was asked, with its key"
    assert {q.headers["authorization"] for q in judge.questions} == {f"Bearer {SECRETS['the key of a judge']}"}
    assert {failure.reward for failure in batch.failures} >= {"leaky", "elsewhere"}
    assert "***" in places["the batch"]
    assert len(names) == 2
    assert all(places.values()), [name for name, text in places.items() if not text]

    for worker in loud_workers:
        worker.stop()
        places[f"the log of {worker.queue}"] = worker.log_text
    places["flower's log"] = (tmp_path / "flower.log").read_text()
    places["the trainer's log"] = caplog.text
    assert "RuntimeError: cannot reach redis://:***@127.0.0.1" in places["the log of gpu"]

    found = []
    for where, text in places.items():
        found += [f"{what} in {where}: {around(secret, text)}" for what, secret in SECRETS.items() if secret in text]
    assert found == []


def around(secret: str, text: str) -> str:
    at = text.index(secret)
    return text[max(0, at - 80) : at + len(secret) + 20]


def test_a_secret_in_a_message_is_found_by_the_search_itself() -> None:
    """The search reads msgpack as it lies in Redis: a planted secret in it would be seen."""
    assert "planted-judge-6" in repr(msgpack.packb({"text": "planted-judge-6"}))
