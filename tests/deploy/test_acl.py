"""docker/users.acl on a real Redis: each role can do its work with its user, and nothing of the others' work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import urllib.request

import pytest
import redis

from tasks import keys
from tasks.settings import load_settings
from tests.deploy.conftest import DOCKER
from tests.judges.scripted import MODEL, JudgeServer, says_yes
from tests.pipeline.conftest import assert_rewards, config_of, samples_of
from tests.servers import (
    ROOT,
    WorkerProcess,
    clean_env,
    ends_with_us,
    flower_of,
    free_port,
    server_binary,
    wait_until,
)
from tests.tasks.test_redis_needs import asked_by
from trainer_client import RewardClient

FILE = DOCKER / "users.acl"
ROLES = ("trainer", "gpu_worker", "vlm_worker", "flower")


def users() -> dict[str, list[str]]:
    """The rules of each user, with a password of its own filled in."""
    found = {}
    for line in filled_in().splitlines():
        word, name, *rules = line.split()
        assert word == "user"
        found[name] = rules
    return found


def filled_in() -> str:
    return re.sub(r">([A-Z_]+)_PASSWORD", lambda m: f">pass-of-{m[1].lower()}", FILE.read_text())


def url_of(server, role):
    return server.url.replace("redis://", f"redis://{role}:pass-of-{role}@")


@pytest.fixture
def server(private_redis):
    """A Redis with the users of the file; its own client is not one of them."""
    server = private_redis()
    with server.client() as admin:
        for name, rules in users().items():
            if name != "default":
                admin.execute_command("ACL", "SETUSER", name, "reset", *rules)
    return server


def refusals(server) -> list[str]:
    with server.client() as admin:
        return [f"{e['username']}: {e['reason']} {e['object']}" for e in admin.acl_log()]


def test_each_role_does_its_work_with_its_user_and_is_refused_nothing(server, tmp_path):
    judge = JudgeServer(lambda _: says_yes(0.75))
    settings = {role: load_settings(broker_url=url_of(server, role)) for role in ROLES}
    gpu, vlm = (WorkerProcess(queue, settings[f"{queue}_worker"], tmp_path, None, {}) for queue in ("gpu", "vlm"))
    flower = flower_of(settings["flower"], tmp_path)
    asked = {"reward_model": "vllm_evaluate", "api_base_url": judge.url, "vlm_model": MODEL, "fleet_max_concurrent": 2}
    rewards = ("PixelCode", asked, "jpeg_compressibility_Rank")
    try:
        client = RewardClient.from_dict(config_of(*rewards), "acl", settings=settings["trainer"])
        with flower as url, client:
            for step in range(2):
                numbers = range(8 * step, 8 * step + 8)
                client.submit([s for n in (0, 4) for s in samples_of(numbers[n : n + 4], group=n)], group_size=4)
                batch = client.collect(timeout_s=60)
                assert_rewards(batch, numbers)
                assert batch.rewards["vllm_evaluate"].tolist() == pytest.approx([0.75] * 8)
                assert batch.valid["jpeg_compressibility_Rank"].all()
            wait_until(lambda: num_shown(url) == 2, 60, 0.5)
    finally:
        judge.stop()
        print(refusals(server))
    for worker in (gpu, vlm):
        worker.stop()
    for log in (gpu.log, vlm.log, tmp_path / "flower.log"):
        assert "Traceback" not in log.read_text()
    assert refusals(server) == []


def num_shown(url: str) -> int:
    """How many workers Flower has heard of, by asking them."""
    try:
        with urllib.request.urlopen(f"{url}/api/workers?refresh=1", timeout=20) as answer:
            return len(re.findall(r'"(?:gpu|vlm)\.\d+@[^"]*": \{', answer.read().decode()))
    except OSError:
        return 0


def may(server, role: str, *command: str) -> bool:
    """Whether a user may run a command; it is not run."""
    with server.client() as admin:
        return admin.execute_command("ACL", "DRYRUN", role, *command) == b"OK"


OUTCOME, PAYLOAD, LOCK = keys.outcome("run:f:k"), keys.payload("c.d"), keys.trainer("run", "launch", 0)
GPU, VLM = keys.queue_lists("gpu")[0], keys.queue_lists("vlm")[0]

MAY = [
    ("trainer", "LPUSH", GPU, "m"),
    ("trainer", "LPUSH", keys.queue_lists("vlm")[1], "m"),
    ("gpu_worker", "BRPOP", GPU, "1"),
    ("gpu_worker", "SET", OUTCOME, "v"),
    ("vlm_worker", "ZADD", keys.judge_permits("http://judge"), "1", "t"),
]

MAY_NOT = [
    ("trainer", "BRPOP", GPU, "1"),  # take messages
    ("trainer", "PUBLISH", f"{keys.BROKER}/0.celery.pidbox", "m"),  # command workers
    ("trainer", "GET", "foreign"),
    ("gpu_worker", "LPUSH", VLM, "m"),  # have a worker with API keys ask somebody
    ("gpu_worker", "BRPOP", VLM, "1"),
    ("gpu_worker", "SET", LOCK, "v"),  # be a rank of a trainer
    ("gpu_worker", "HSET", keys.run("run"), "f", "v"),
    ("gpu_worker", "ZADD", keys.judge_permits("http://judge"), "1", "t"),
    ("vlm_worker", "LPUSH", GPU, "m"),
    ("vlm_worker", "BRPOP", GPU, "1"),
    ("flower", "LPUSH", GPU, "m"),
    ("flower", "LPUSH", VLM, "m"),
    ("flower", "BRPOP", GPU, "1"),
    ("flower", "GET", PAYLOAD),
    ("flower", "GET", OUTCOME),
    ("flower", "HGETALL", keys.run("run")),
]


@pytest.mark.parametrize("words", MAY, ids=" ".join)
def test_what_a_role_may_do(server, words):
    assert may(server, *words)


@pytest.mark.parametrize("words", MAY_NOT, ids=" ".join)
def test_what_a_role_may_not_do(server, words):
    assert not may(server, *words)


@pytest.mark.parametrize("role", ROLES)
def test_no_role_administers_the_server_or_looks_through_it(server, role):
    for command in (
        ("FLUSHALL",),
        ("FLUSHDB",),
        ("CONFIG", "GET", "*"),
        ("CONFIG", "SET", "dir", "/"),
        ("ACL", "LIST"),
        ("ACL", "SETUSER", "me"),
        ("SHUTDOWN",),
        ("DEBUG", "SLEEP", "0"),
        ("MODULE", "LIST"),
        ("REPLICAOF", "host", "1"),
        ("MONITOR",),
        ("CLIENT", "LIST"),
        ("CLIENT", "KILL", "127.0.0.1:1"),
        ("KEYS", "*"),
        ("SCAN", "0"),
        ("SCRIPT", "FLUSH"),
        ("FUNCTION", "LIST"),
    ):
        assert not may(server, role, *command), command


@pytest.mark.parametrize("side", ["trainer", "worker"])
def test_the_commands_are_those_that_processes_ask_for_at_their_start(side):
    for role in ("trainer",) if side == "trainer" else ("gpu_worker", "vlm_worker"):
        rules = users()[role]
        assert "-@all" in rules
        more = set() if side == "trainer" else {"smembers"}  # to answer Flower, which a worker can live without
        assert {rule[1:] for rule in rules if rule.startswith("+")} == asked_by(side) | more


def documented_commands() -> str:
    """The commands of SECURITY.md that fill passwords into the file."""
    (block,) = re.findall(r"```sh\n(.*?)```", (ROOT / "SECURITY.md").read_text(), re.DOTALL)
    return block


def test_redis_takes_the_file_and_lets_nobody_in_without_a_password(tmp_path):
    shutil.copytree(DOCKER, tmp_path / "docker")
    said = subprocess.check_output(["bash", "-euc", documented_commands()], cwd=tmp_path, text=True)
    passwords = {user.lower(): password for user, password in map(str.split, said.splitlines())}
    assert passwords.keys() == {*ROLES, "admin"}
    assert len(set(passwords.values())) == len(passwords)
    assert (tmp_path / "users.acl").stat().st_mode & 0o777 == 0o600
    port = free_port()
    command = [server_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--aclfile", "users.acl"]
    process = subprocess.Popen([*ends_with_us("KILL"), *command], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port, "admin", passwords["admin"]), 20)
        for role in ROLES:
            assert answers(port, role, passwords[role])
        for user, password in ((None, None), ("default", "x"), ("trainer", passwords["flower"])):
            with pytest.raises(redis.AuthenticationError):
                answers(port, user, password)
    finally:
        process.terminate()
        process.wait(20)


def answers(port: int, user: str | None, password: str | None) -> bool:
    try:
        with redis.Redis(port=port, username=user, password=password) as client:
            return bool(client.ping())
    except redis.AuthenticationError:
        raise
    except redis.ConnectionError:
        return False


def test_a_worker_with_the_user_of_another_queue_is_told_so_at_its_start(server, tmp_path):
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", "vlm"]
    env = {**clean_env(), "PYTHONPATH": str(ROOT), "REWARDQ_BROKER_URL": url_of(server, "gpu_worker")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == os.EX_CONFIG
    assert "the user 'gpu_worker' may not use the keys of rewardq, rewardq:*" in done.stdout + done.stderr
