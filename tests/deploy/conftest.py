"""compose.yaml as compose reads it, and its services as processes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.servers import ROOT, clean_env, ends_with_us, free_port

DOCKER = ROOT / "docker"
SECRETS = {"REDIS_PASSWORD": "pass1", "FLOWER_PASSWORD": "pass2", "JUDGE_KEY": "key3"}
PORTS = {"redis": 6379, "payloads": 6379, "flower": 5555, "judge": 8000}
"""Where each service listens in its container."""


def settings_in_example(**given: str) -> dict[str, str]:
    """What docker/.env.example says, with passwords and `given` filled in and its own references followed."""
    lines = [line for line in (DOCKER / ".env.example").read_text().splitlines() if "=" in line and line[0] != "#"]
    found = {**dict(line.split("=", 1) for line in lines), **SECRETS, **given}
    return {name: re.sub(r"\$\{(\w+)\}", lambda m: found[m[1]], value) for name, value in found.items()}


def filled_in(text: str, given: Mapping[str, str]) -> str:
    """Compose's interpolation: ${NAME}, ${NAME:-default}, ${NAME:?error}."""

    def value(match: re.Match[str]) -> str:
        name, how, rest = match[1], match[2], match[3] or ""
        found = given.get(name, "")
        assert found or how == ":-", f"{name}: {rest}"
        return found or rest

    return re.sub(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", value, text)


def composed(**given: str) -> dict[str, Any]:
    """compose.yaml with what docker/.env.example says and `given`; as compose does, values are filled in once read."""
    variables = settings_in_example(**given)

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(one) for key, one in value.items()}
        if isinstance(value, list):
            return [filled(one) for one in value]
        return filled_in(value, variables) if isinstance(value, str) else value

    found: dict[str, Any] = filled(yaml.safe_load((DOCKER / "compose.yaml").read_text()))
    return found


@pytest.fixture
def services() -> dict[str, Any]:
    services: dict[str, Any] = composed()["services"]
    return services


class Service:
    """A service's exact command as a process, with its environment, empty variables too.

    Names of services become loopback ports, and paths of containers those of the checkout.
    """

    def __init__(self, name: str, service: Mapping[str, Any], ports: Mapping[str, int], folder: Path) -> None:
        self.service, self._ports, self._port = service, ports, ports.get(name)
        self._in_container = PORTS.get(name)
        self.env = {**clean_env(), **{k: self._local(str(v)) for k, v in service.get("environment", {}).items()}}
        self.env["PYTHONPATH"] = str(ROOT)
        self.folder, self.log = folder / name, folder / f"{name}.log"
        self.folder.mkdir(exist_ok=True)
        words = [self._local(word) for word in (*service.get("entrypoint", ()), *service["command"])]
        if Path(words[0]).name == "start_redis.sh":
            words += ["--port", str(self._port), "--bind", "127.0.0.1"]
        if words[0] in ("celery", "rewardq"):
            words[:1] = [sys.executable, "-m", words[0]]
        self._words = words

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*ends_with_us("KILL"), *self._words],
                cwd=self.folder,
                env=self.env,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def is_healthy(self, **env: str) -> bool:
        """What its health check says."""
        kind, *command = [self._local(word) for word in self.service["healthcheck"]["test"]]
        assert kind == "CMD"
        if command[0] == "redis-cli":
            command[1:1] = ["-p", str(self._port)]
        if command[0] in ("python", "python3"):
            command[0] = sys.executable
        done = subprocess.run(command, cwd=self.folder, env={**self.env, **env}, capture_output=True, check=False)
        return done.returncode == 0

    @property
    def stop_grace_s(self) -> float:
        return seconds(self.service.get("stop_grace_period", "10s"))

    def ask_to_stop(self) -> None:
        self.process.send_signal(getattr(signal, self.service.get("stop_signal", "SIGTERM")))

    def stop(self) -> int:
        """As compose does, and the status with which it ends."""
        if self.process.poll() is None:
            self.ask_to_stop()
        return self.process.wait(self.stop_grace_s)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def _local(self, text: str) -> str:
        for volume in self.service.get("volumes", ()):
            source, target = volume.split(":")[:2]
            if source.startswith("./") and (DOCKER / source).is_file():
                text = text.replace(target, str(DOCKER / source))
        text = re.sub(r"@(redis|payloads):6379", lambda m: f"@127.0.0.1:{self._ports[m[1]]}", text)
        return re.sub(rf"\b{self._in_container}\b", str(self._port), text) if self._in_container else text


def seconds(duration: str) -> float:
    """`1m30s` as a number."""
    units = {"s": 1, "m": 60, "h": 3600}
    return sum(float(n) * units[unit] for n, unit in re.findall(r"(\d+)([smh])", duration))


class Composition:
    """Services that are up, and the loopback port of each."""

    def __init__(self, services: Mapping[str, Any], folder: Path) -> None:
        self._services, self._folder = services, folder
        self.ports = {name: free_port() for name in PORTS}
        self.running: dict[str, Service] = {}

    def __call__(self, name: str) -> Service:
        service = self.running[name] = Service(name, self._services[name], self.ports, self._folder)
        service.start()
        return service


@pytest.fixture
def up(services: dict[str, Any], tmp_path: Path) -> Iterator[Composition]:
    """Starts a service as compose does: `up("redis")`."""
    composition = Composition(services, tmp_path)
    yield composition
    for service in reversed(composition.running.values()):
        service.kill()
        print(f"log of {service.folder.name}:\n{service.log_text[-5_000:]}")


@pytest.fixture
def stand_in_vllm(tmp_path: Path) -> Path:
    """A folder with a command `vllm` that writes what it is given to `vllm.json` beside it, and answers /health."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "vllm"
    command.write_text(
        f"#!{sys.executable}\n"
        "import http.server, json, os, pathlib, sys\n"
        "words = sys.argv[1:]\n"
        "names = ('CUDA_VISIBLE_DEVICES', 'CUDA_DEVICE_ORDER', 'HF_HOME', 'VLLM_API_KEY')\n"
        "said = {'words': words, 'env': {n: os.environ.get(n) for n in names}}\n"
        "pathlib.Path(__file__).with_name('vllm.json').write_text(json.dumps(said))\n"
        "class Health(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200 if self.path == '/health' else 404)\n"
        "        self.end_headers()\n"
        "port = int(words[words.index('--port') + 1])\n"
        "http.server.HTTPServer(('127.0.0.1', port), Health).serve_forever()\n"
    )
    command.chmod(0o755)
    return folder


def given_to(stand_in: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stand_in / "vllm.json").read_text())
    return found
