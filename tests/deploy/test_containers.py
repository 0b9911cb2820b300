"""The containers, as far as they can be seen without an engine: compose's file and exact commands, what images hold."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from tasks.settings import load_settings
from tests.pipeline.conftest import assert_rewards, clients, samples_of  # noqa: F401  (a fixture)
from tests.servers import ROOT, clean_env, ends_with_us, free_port, wait_until

DOCKER = ROOT / "docker"
SECRETS = {"REDIS_PASSWORD": "pass1", "FLOWER_PASSWORD": "pass2"}


def settings_in_example():
    """What docker/.env.example says, with passwords filled in and its own references followed."""
    lines = [line for line in (DOCKER / ".env.example").read_text().splitlines() if "=" in line and line[0] != "#"]
    given = {**dict(line.split("=", 1) for line in lines), **SECRETS}
    return {name: re.sub(r"\$\{(\w+)\}", lambda m: given[m[1]], value) for name, value in given.items()}


def filled_in(text, given):
    """Compose's interpolation: ${NAME}, ${NAME:-default}, ${NAME:?error}."""

    def value(match):
        name, how, rest = match[1], match[2], match[3] or ""
        found = given.get(name, "")
        assert found or how == ":-", f"{name}: {rest}"
        return found or rest

    return re.sub(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", value, text)


@pytest.fixture
def compose():
    return yaml.safe_load(filled_in((DOCKER / "compose.yaml").read_text(), settings_in_example()))


def test_every_service_restarts_is_checked_and_is_pinned(compose):
    services = compose["services"]
    assert {"redis", "payloads", "vlm", "flower", "judge", "shm"} | {f"gpu-{i}" for i in range(8)} == set(services)
    for name, service in services.items():
        if name == "shm":
            continue
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+", service["image"]), name
    for i in range(8):
        (device,) = services[f"gpu-{i}"]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["device_ids"]) == ("nvidia", [str(i)])


def test_images_are_pinned_and_not_root():
    text = (DOCKER / "Dockerfile").read_text()
    bases = [line.split()[1] for line in text.splitlines() if line.startswith("FROM")]
    stages = set(re.findall(r"AS (\S+)", text))
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in bases if base not in stages)
    for role in ("gpu", "vlm", "flower"):
        stage = text.split(f" AS {role}\n")[1].split("\nFROM")[0]
        assert "USER rewardq" in stage


@pytest.mark.system
def test_compose_itself_takes_the_file(tmp_path):
    shutil.copytree(DOCKER, tmp_path / "docker")
    (tmp_path / "docker" / ".env").write_text("\n".join(f"{k}={v}" for k, v in settings_in_example().items()))
    command = ["docker-compose", "-f", "docker/compose.yaml", "--env-file", "docker/.env", "config"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=clean_env())
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert services["vlm"]["environment"]["REWARDQ_PAYLOAD_URL"] == "redis://:pass1@payloads:6379/0"
    (tmp_path / "docker" / ".env").write_text("COMPOSE_PROFILES=payloads\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=clean_env())
    assert done.returncode != 0
    assert "set it in docker/.env" in done.stderr


class Service:
    """A service's exact command as a process, with its environment; names of other services become loopback ports."""

    def __init__(self, service, ports, folder, *more):
        def local(text):
            text = text.replace("/etc/redis.conf", str(conf)) if conf else text
            return re.sub(r"@(redis|payloads):6379", lambda m: f"@127.0.0.1:{ports[m[1]]}", text)

        conf = next((DOCKER / v.split(":")[0] for v in service["volumes"] if "redis.conf" in v), None)
        self.env = {**clean_env(), **{k: local(str(v)) for k, v in service.get("environment", {}).items() if v}}
        self.env["PYTHONPATH"] = str(ROOT)
        self.folder, self.log = folder, folder / "log"
        folder.mkdir()
        command = [local(word) for word in service["command"]]
        if command[0] == "celery":
            command[:1] = [sys.executable, "-m", "celery"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*ends_with_us("KILL"), *command, *more], cwd=folder, env=self.env, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def is_healthy(self, service):
        command = [sys.executable if w == "python" else w for w in service["healthcheck"]["test"][1:]]
        return subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True).returncode == 0

    def stop(self):
        self.process.terminate()
        return self.process.wait(40)


@pytest.mark.system
def test_compose_s_exact_commands_score_a_step(compose, clients, tmp_path):  # noqa: F811
    services = compose["services"]
    ports = {"redis": free_port(), "payloads": free_port()}
    running = {}
    try:
        for name, port in ports.items():
            where = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path))
            running[name] = Service(services[name], ports, tmp_path / name, *where)
            running[name].env["REDISCLI_AUTH"] = SECRETS["REDIS_PASSWORD"]
            ping = ["redis-cli", "-p", str(port), "ping"]
            wait_until(lambda: b"PONG" in subprocess.run(ping, env=running[name].env, capture_output=True).stdout, 20)  # noqa: B023
        url = "redis://:pass1@127.0.0.1:{}/0"
        settings = load_settings(broker_url=url.format(ports["redis"]), payload_url=url.format(ports["payloads"]))
        services["gpu-0"]["environment"]["REWARDQ_MODULES"] = "tests.reward_models"
        for name in ("gpu-0", "vlm"):
            running[name] = Service(services[name], ports, tmp_path / name)
        wait_until(lambda: running["vlm"].is_healthy(services["vlm"]), 60)
        client = clients("PixelCode", settings=settings)
        client.submit(samples_of(range(8)))
        assert_rewards(client.collect(timeout_s=60), range(8))
        services["flower"]["volumes"] = []
        page = free_port()
        services["flower"]["command"] = [re.sub("5555", str(page), w) for w in services["flower"]["command"]]
        running["flower"] = Service(services["flower"], ports, tmp_path / "flower")
        wait_until(lambda: status_of(f"http://127.0.0.1:{page}/healthcheck") == 200, 60)
        assert status_of(f"http://127.0.0.1:{page}/api/workers") == 401
        for name in ("gpu-0", "vlm"):
            assert running.pop(name).stop() == 0
            assert "Traceback" not in (tmp_path / name / "log").read_text()
    finally:
        for service in running.values():
            service.stop()


def status_of(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def install_line(role):
    """The words of `pip install` in the stage that builds a role's environment."""
    stage = (DOCKER / "Dockerfile").read_text().split(f" AS {role}-build\n")[1].split("\nFROM")[0]
    return shlex.split(re.search(r"RUN (pip install .*)", stage)[1])


@pytest.mark.system
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("role", "needs"), [("vlm", "import openai, workers.judges.judge, tasks"), ("flower", "import flower, tasks")]
)
def test_the_images_of_those_who_compute_nothing_hold_no_torch(role, needs, tmp_path):
    source = tmp_path / "src"  # what the Dockerfile copies
    for name in ("tasks", "workers", "trainer_client"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    words = ["-m", *install_line(role), "--quiet", "--disable-pip-version-check"]
    subprocess.run([python, *words], cwd=source, check=True, env=env)
    subprocess.run([python, "-c", needs], cwd=tmp_path, check=True, env=env)
    listed = json.loads(subprocess.check_output([python, "-m", "pip", "list", "--format=json"], env=env))
    assert not {"torch", "transformers", "open_clip_torch", "onnxruntime"} & {p["name"].lower() for p in listed}
    subprocess.run([python, "-m", "pip", "check"], check=True, env=env)
    assert Path(python.parent / "celery").exists()
