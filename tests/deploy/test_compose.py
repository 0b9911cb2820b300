"""compose.yaml as a file: by the specification, by compose itself, and what each service says."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess

import jsonschema
import pytest
import yaml

from tasks.errors import ModelLoadError
from tasks.settings import load_settings
from tests.deploy.compose_schema import COMPOSE
from tests.deploy.conftest import DOCKER, SECRETS, composed, seconds, settings_in_example
from tests.servers import clean_env
from workers.judges.client import api_key

WORKERS = ("vlm", *(f"gpu-{i}" for i in range(8)))
VALIDATOR = jsonschema.Draft202012Validator(COMPOSE)


def test_the_file_is_what_the_compose_specification_says():
    jsonschema.Draft202012Validator.check_schema(COMPOSE)
    VALIDATOR.validate(composed())


WRONG = {
    "a misspelt key": ("redis", lambda service: service.update(helthcheck=service.pop("healthcheck"))),
    "a duration without a unit": ("vlm", lambda service: service.update(stop_grace_period=30)),
    "a port that is a number": ("redis", lambda service: service.update(ports=[6379])),
    "a boolean variable": ("vlm", lambda service: service["environment"].update(REWARDQ_X=True)),
    "two GPUs in one text": (
        "gpu-0",
        lambda s: s["deploy"]["resources"]["reservations"]["devices"][0].update(device_ids=["6,7"]),
    ),
    "a condition that is none": ("vlm", lambda s: s["depends_on"]["redis"].update(condition="service_ready")),
    "a health check of no kind": ("redis", lambda service: service["healthcheck"].update(test=["redis-cli", "ping"])),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_schema_finds_what_is_wrong(what):
    found = copy.deepcopy(composed())
    name, spoil = WRONG[what]
    spoil(found["services"][name])
    assert not VALIDATOR.is_valid(found)


@pytest.mark.system
def test_compose_itself_takes_the_file(tmp_path):
    shutil.copytree(DOCKER, tmp_path / "docker")
    (tmp_path / "docker" / "keys.env").write_text("REWARDQ_KEY_MINE=of-mine\n")
    profiles = {"COMPOSE_PROFILES": "payloads,judge,shm,gpus-8"}
    given = settings_in_example(KEYS_FILE="keys.env", REWARDQ_HOSTS="judge.example", JUDGE_GPUS="6,7", **profiles)
    (tmp_path / "docker" / ".env").write_text("\n".join(f"{k}={v}" for k, v in given.items()))
    command = ["docker-compose", "-f", "docker/compose.yaml", "--env-file", "docker/.env", "config"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=clean_env())
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    environment = services["vlm"]["environment"]
    assert environment["REWARDQ_PAYLOAD_URL"] == "redis://:pass1@payloads:6379/0"
    assert (environment["REWARDQ_KEY_MINE"], environment["REWARDQ_HOSTS"]) == (
        "of-mine",
        "http://judge:8000,judge.example",
    )
    assert environment["REWARDQ_KEY_JUDGE"] == services["judge"]["environment"]["VLLM_API_KEY"] == "key3"
    (tmp_path / "docker" / ".env").write_text("COMPOSE_PROFILES=payloads\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=clean_env())
    assert done.returncode != 0
    assert "set it in docker/.env" in done.stderr


def test_every_service_restarts_is_checked_and_is_pinned(services):
    assert {"redis", "payloads", "flower", "judge", "shm", *WORKERS} == set(services)
    for name, service in services.items():
        if name == "shm":
            continue
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+", service["image"]), name
    for i in range(8):
        (device,) = services[f"gpu-{i}"]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["device_ids"]) == ("nvidia", [str(i)])


def test_whoever_has_work_in_hand_is_asked_to_stop_and_given_the_time(services):
    for name in WORKERS:
        assert services[name]["stop_signal"] == "SIGTERM", name
        # what is in hand, then what a worker still has to do: give back the rest, close
        assert seconds(services[name]["stop_grace_period"]) >= 2 * load_settings().stop_grace_s + 10, name
    for name in ("redis", "judge"):
        assert services[name].get("stop_signal", "SIGTERM") == "SIGTERM"
        assert seconds(services[name]["stop_grace_period"]) >= 60, name


def test_every_container_is_denied_what_it_does_not_need(services):
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert {"mem_limit", "pids_limit"} <= service.keys(), name
        assert {"max-size", "max-file"} <= service["logging"]["options"].keys(), name
        assert not {"ipc", "privileged", "cap_add", "pid", "network_mode"} & service.keys(), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name


def test_no_password_or_key_is_on_a_command_line(services):
    secrets = set(SECRETS.values())
    for name, service in services.items():
        words = " ".join((*service.get("entrypoint", ()), *service.get("command", ())))
        assert not any(secret in words for secret in secrets), name


def test_the_vlm_worker_may_send_the_judge_its_key_and_no_other_service_has_it(services):
    assert services["judge"]["environment"]["VLLM_API_KEY"] == SECRETS["JUDGE_KEY"]
    assert services["vlm"]["environment"]["REWARDQ_KEY_JUDGE"] == SECRETS["JUDGE_KEY"]
    holders = {n for n, s in services.items() if SECRETS["JUDGE_KEY"] in s.get("environment", {}).values()}
    assert holders == {"judge", "vlm"}
    hosts = load_settings(hosts=services["vlm"]["environment"]["REWARDQ_HOSTS"]).allowed_hosts
    assert hosts == ("http://judge:8000",)


def test_the_judge_is_of_a_release_that_knows_its_model_and_copies_of_it(services):
    image, _, tag = services["judge"]["image"].partition("@")[0].partition(":v")
    assert image == "vllm/vllm-openai"
    assert tuple(map(int, tag.split("."))) >= (0, 11, 0), "Qwen3-VL since 0.11.0, --data-parallel-size since 0.8"


def test_the_vlm_worker_is_given_what_paid_judges_need():
    given = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "https://llm.example/v1", "REWARDQ_HOSTS": "judge.example"}
    vlm = composed(**given, KEYS_FILE="keys.env")["services"]["vlm"]
    expected = {**given, "REWARDQ_HOSTS": "http://judge:8000,judge.example"}
    assert {name: vlm["environment"][name] for name in given} == expected
    assert vlm["env_file"] == "keys.env"
    assert (DOCKER / composed()["services"]["vlm"]["env_file"]).is_file(), "compose wants it to be there"
    for line in (DOCKER / "keys.env.example").read_text().splitlines():
        assert line.startswith("#"), "it is used as it stands"


def test_a_key_that_compose_gives_as_empty_is_not_set(services, in_env):
    assert services["vlm"]["environment"]["OPENAI_API_KEY"] == ""
    in_env(OPENAI_API_KEY="", OPENAI_BASE_URL="")
    with pytest.raises(ModelLoadError, match="OPENAI_API_KEY, which is not set on this worker"):
        api_key("https://api.openai.com/v1", "OPENAI_API_KEY")
