"""Fixtures: reward servers of ours and of others, and remote rewards in this process."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from tasks import catalog
from tests.remote.json_server import JsonServer, Script
from tests.servers import READY_S, ROOT, STOP_S, clean_env, ends_with_us, free_port, wait_until
from workers import Accelerator, RewardArguments
from workers.loading.building import reward_class
from workers.remote import client as remote
from workers.server import RewardServer


def post(url: str, body: Any, timeout_s: float = 20.0, **headers: str) -> tuple[int, dict[str, Any], Any]:
    """Status, JSON and headers of the answer to a POST, by a client of the standard library."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"Content-Type": "application/json", **{n.replace("_", "-"): v for n, v in headers.items()}}
    request = urllib.request.Request(url, data, named)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), error.headers


def get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.loads(answer.read())


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Serves a `compute_reward` in this process: `serve(lambda prompt: ..., max_waiting=2)` gives its URL."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(compute_reward: Callable[..., Any], **attributes: Any) -> str:
        members = {"compute_reward": staticmethod(compute_reward), **attributes}
        app = type("Served", (RewardServer,), members)().make_app()
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started
        return f"http://127.0.0.1:{port}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.fixture
def json_server() -> Iterator[Callable[..., JsonServer]]:
    """Starts servers that speak only Flow-Factory's JSON: `json_server(script)`."""
    servers: list[JsonServer] = []

    def start(script: Script, **options: Any) -> JsonServer:
        servers.append(JsonServer(script, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


class ServerProcess:
    """A reward server in a process of its own, from a file; `kill()` and `start()` keep its port."""

    def __init__(
        self, file: Path, cwd: Path, python_path: str, flags: Sequence[str], python: str = sys.executable
    ) -> None:
        self.port = free_port()
        self._command = [python, *flags, str(file), "--port", str(self.port)]
        self._cwd, self._env = cwd, {**clean_env(), "PYTHONPATH": python_path}
        self.log = cwd / f"server-{self.port}.log"
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*ends_with_us("KILL"), *self._command],
                cwd=self._cwd,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: self.process.poll() is not None or self._is_healthy(), READY_S)
        assert self.process.poll() is None, self.log.read_text()

    def _is_healthy(self) -> bool:
        try:
            return get(f"{self.url}/health")["status"] == "ok"
        except OSError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and the status with which it ends."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(STOP_S)


@pytest.fixture
def server_process(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts a reward server's file as a user does: `server_process(file)`."""
    started: list[ServerProcess] = []

    def start(file: Path, python_path: str = str(ROOT), flags: Sequence[str] = ()) -> ServerProcess:
        started.append(ServerProcess(file, tmp_path, python_path, flags))
        return started[-1]

    yield start
    for server in started:
        server.kill()
        print(f"log of {server.url}:\n{server.log.read_text()[-10_000:]}")


@pytest.fixture
def make_remote(settings: Any) -> Callable[..., Any]:
    """Makes a remote reward in this process: `make_remote("Pointwise", server.url, timeout=2)`."""

    def make(kind: str, *urls: str, timeout_s: float = 20.0, **options: Any) -> Any:
        model = f"Remote{kind}RewardModel"
        defaults = {name: option.default for name, option in catalog.CATALOG[model].options.items()}
        given = {"server_url": urls[0] if len(urls) == 1 else list(urls), **options}
        config = RewardArguments(
            name=model, reward_model=model, timeout_s=timeout_s, extra_kwargs={**defaults, **given}
        )
        return reward_class(model, settings)(config, Accelerator())

    return make


@pytest.fixture(autouse=True)
def _end_of_the_loop() -> Iterator[None]:
    """Closes what remote rewards of this process opened."""
    yield
    loop = remote.remote_loop.take()
    if loop is not None:
        loop.close()
