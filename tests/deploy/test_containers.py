"""The containers' exact commands, health checks and stops, run as processes: no engine is where this is built."""

from __future__ import annotations

import base64
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import redis

from tasks.settings import load_settings
from tests.deploy.conftest import PORTS, SECRETS, Service, composed, given_to
from tests.pipeline.conftest import assert_rewards, clients, samples_of  # noqa: F401  (a fixture)
from tests.servers import free_port, wait_until

SLOW = {"reward_model": "Slow", "seconds": 0.5, "batch_size": 2, "version": "1"}


def servers(up):
    """Both Redis, well, and the settings of a trainer that uses them."""
    both = [up(name) for name in ("redis", "payloads")]
    for server in both:
        wait_until(server.is_healthy, 20)
    url = f"redis://:{SECRETS['REDIS_PASSWORD']}@127.0.0.1:{{}}/0"
    return load_settings(
        broker_url=url.format(up.ports["redis"]), payload_url=url.format(up.ports["payloads"]), claim_ttl_s=2
    )


@pytest.fixture
def with_tests_models(services):
    """Workers that may import the tests' reward models; all else is as compose has it."""
    for name in ("gpu-0", "gpu-1"):
        environment = services[name]["environment"]
        services[name]["environment"] = {**environment, "REWARDQ_MODULES": "tests.reward_models"}


@pytest.mark.system
@pytest.mark.usefixtures("with_tests_models")
def test_compose_s_exact_commands_score_a_step(services, up, clients):  # noqa: F811
    empty = {name for name, value in services["vlm"]["environment"].items() if value == ""}
    assert {"OPENAI_API_KEY", "OPENAI_BASE_URL", "REWARDQ_SERVER_TOKEN", "REWARDQ_MODULES"} <= empty, "as in compose"
    settings = servers(up)
    gpu, vlm = up("gpu-0"), up("vlm")
    client = clients("PixelCode", settings=settings)
    client.submit(samples_of(range(8)))
    assert_rewards(client.collect(timeout_s=60), range(8))
    wait_until(lambda: vlm.is_healthy() and gpu.is_healthy(), 30)
    for worker in (gpu, vlm):
        assert worker.stop() == 0
        assert "Traceback" not in worker.log_text
    assert not vlm.is_healthy(), "nobody is there"


@pytest.mark.system
@pytest.mark.usefixtures("with_tests_models")
def test_a_worker_stopped_with_work_in_hand_ends_it_and_leaves_the_rest_to_the_next(up, clients):  # noqa: F811
    settings = servers(up)
    first = up("gpu-0")
    client = clients(SLOW, settings=settings)
    client.submit(samples_of(range(40)))
    wait_until(lambda: client.pending() <= 36, 60)
    started = time.monotonic()
    assert first.stop() == 0
    assert time.monotonic() - started < first.stop_grace_s / 2
    assert "Traceback" not in first.log_text
    assert client.pending() >= 8, "it did not wait for what was queued"
    second = up("gpu-1")
    assert_rewards(client.collect(timeout_s=60), range(40), "Slow")
    assert second.stop() == 0


@pytest.mark.system
@pytest.mark.usefixtures("with_tests_models")
def test_rewards_outlive_a_restart_of_their_redis(up, clients):  # noqa: F811
    settings = servers(up)
    worker = up("gpu-0")
    client = clients(SLOW, settings=settings)
    client.submit(samples_of(range(4)))
    assert_rewards(client.collect(timeout_s=60), range(4), "Slow")
    client.close()
    assert worker.stop() == 0
    broker = up.running["redis"]
    assert broker.stop() == 0
    assert not broker.is_healthy()
    broker.start()
    wait_until(broker.is_healthy, 20)
    later = clients(SLOW, settings=settings)
    later.submit(samples_of(range(4)))
    assert_rewards(later.collect(timeout_s=20), range(4), "Slow")  # nobody is there who could score them


@pytest.mark.system
def test_each_redis_has_the_settings_of_its_part_and_answers_nobody_without_the_password(up):
    servers(up)
    expected = {
        "redis": {"maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "everysec", "save": ""},
        "payloads": {"maxmemory-policy": "noeviction", "appendonly": "no", "save": ""},
    }
    for name, settings in expected.items():
        with redis.Redis(port=up.ports[name], password=SECRETS["REDIS_PASSWORD"], decode_responses=True) as client:
            assert {key: client.config_get(key)[key] for key in settings} == settings, name
            assert int(client.config_get("maxmemory")["maxmemory"]) > 0, name
        with redis.Redis(port=up.ports[name]) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        assert up.running[name].is_healthy()
        command = Path(f"/proc/{up.running[name].process.pid}/cmdline").read_bytes()
        assert SECRETS["REDIS_PASSWORD"].encode() not in command, "every user of the host can read it"
        for wrong in ("", "wrong"):
            assert not up.running[name].is_healthy(REDISCLI_AUTH=wrong), "a refusal is no sign of health"


@pytest.mark.system
def test_flower_asks_for_its_password_and_says_that_it_is_well(up):
    servers(up)
    flower = up("flower")
    wait_until(flower.is_healthy, 60)
    page = f"http://127.0.0.1:{up.ports['flower']}/"
    assert status_of(page) == 401
    assert status_of(page, f"rewardq:{SECRETS['FLOWER_PASSWORD']}") == 200
    assert status_of(page, "rewardq:wrong") == 401
    assert flower.stop() == 0
    assert not flower.is_healthy()


def status_of(url, account=None):
    headers = {"Authorization": f"Basic {base64.b64encode(account.encode()).decode()}"} if account else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


JUDGES = {
    "as in the example": ({}, ("7", "1", "1")),
    "two GPUs": ({"JUDGE_GPUS": "6,7"}, ("6,7", "1", "2")),
    "one copy on two": ({"JUDGE_GPUS": "6,7", "TENSOR_PARALLEL_SIZE": "2"}, ("6,7", "2", "1")),
    "two copies on two each": ({"JUDGE_GPUS": "4,5,6,7", "TENSOR_PARALLEL_SIZE": "2"}, ("4,5,6,7", "2", "2")),
    "one copy though there are two": ({"JUDGE_GPUS": "6,7", "DATA_PARALLEL_SIZE": "1"}, ("6,7", "1", "1")),
}


@pytest.fixture
def judge(stand_in_vllm, tmp_path):
    """Starts compose's judge with a stand-in for vLLM, and waits for its health check."""
    started = []

    def start(**given):
        service = Service("judge", composed(**given)["services"]["judge"], {"judge": free_port()}, tmp_path)
        service.env["PATH"] = f"{stand_in_vllm}:{os.environ['PATH']}"
        started.append(service)
        service.start()
        wait_until(service.is_healthy, 20)
        return service

    yield start
    for service in started:
        service.kill()
        print(f"log of the judge:\n{service.log_text}")


@pytest.mark.parametrize("how", JUDGES)
def test_the_judge_s_command_gives_vllm_every_gpu_it_names(judge, stand_in_vllm, how):
    given, (devices, tensor, data) = JUDGES[how]
    service = judge(**given)
    said = given_to(stand_in_vllm)
    options = dict(zip(said["words"][2::2], said["words"][3::2], strict=True))
    assert said["words"][:2] == ["serve", "TIGER-Lab/RationalRewards-8B-T2I"]
    assert (options["--tensor-parallel-size"], options["--data-parallel-size"]) == (tensor, data)
    assert (options["--host"], options["--max-model-len"]) == ("0.0.0.0", "8192")
    assert options["--served-model-name"] == "RationalRewards-8B-T2I"
    assert said["env"] == {
        "CUDA_VISIBLE_DEVICES": devices,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HF_HOME": "/models",
        "VLLM_API_KEY": SECRETS["JUDGE_KEY"],
    }
    assert SECRETS["JUDGE_KEY"] not in said["words"]
    (device,) = service.service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"]) == ("nvidia", "all"), "the numbers in the container are the host's"
    leaves_one_idle = how == "one copy though there are two"
    assert ("needs 1 GPUs, CUDA_VISIBLE_DEVICES 6,7 names 2" in service.log_text) == leaves_one_idle
    service.kill()
    assert not service.is_healthy()


def test_every_service_s_health_check_is_run_here(services):
    checked = {tuple(s["healthcheck"]["test"]) for s in services.values() if "healthcheck" in s}
    run_here = {tuple(services[name]["healthcheck"]["test"]) for name in (*PORTS, "gpu-0", "vlm")}
    assert checked == run_here


def test_the_folder_in_shared_memory_is_for_a_group_and_for_nobody_else(tmp_path):
    folder = tmp_path / "rewardq"
    folder.mkdir(mode=0o700)
    group = os.getgid()
    service = composed(REWARDQ_PAYLOAD_GROUP=str(group))["services"]["shm"]
    command = [word.replace("/dev/shm/rewardq", str(folder)).replace("$$", "$") for word in service["command"]]
    subprocess.run(command, check=True)
    found = folder.stat()
    assert (found.st_mode & 0o7777, found.st_gid) == (0o2770, group)
