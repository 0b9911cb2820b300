"""Fixtures: a real Redis, real workers, settings that point at them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest

hypothesis.settings.register_profile("rewardq", deadline=None)  # other tests run beside
hypothesis.settings.load_profile("rewardq")
for _name in [n for n in os.environ if n.startswith(("REWARDQ_", "OPENAI_"))]:
    del os.environ[_name]  # whoever runs the tests may have a pipeline of their own configured
for _ignored in (signal.SIGINT, signal.SIGHUP):  # as a job in the background of a shell has them, and its children too
    signal.signal(_ignored, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

from tasks.servers.connections import connect  # noqa: E402
from tasks.settings import Settings, load_settings  # noqa: E402
from tests.outcomes import Outcomes  # noqa: E402
from tests.servers import RedisServer, WorkerProcess  # noqa: E402
from trainer_client.engine.state import EngineState  # noqa: E402


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Any:
    """What was printed and logged may be no Unicode, on purpose: processes of tests cannot tell each other that."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "replace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The Redis server that all tests share."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """URL of an empty Redis."""
    with redis_server.client() as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def settings(redis_url: str) -> Settings:
    """Settings for an empty Redis, with short times."""
    return load_settings(broker_url=redis_url, claim_ttl_s=2, reconcile_s=0.5)


@pytest.fixture
def outcomes(settings: Settings) -> Iterator[Outcomes]:
    """The outcomes in an empty Redis."""
    with connect(settings.results) as client:
        yield Outcomes(client, settings.claim_ttl_s, settings.result_ttl_s)


@pytest.fixture
def private_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisServer]]:
    """Starts servers that a test may stop, kill, pause or configure: `private_redis("--maxmemory", "8mb")`."""
    servers: list[RedisServer] = []

    def start(*options: str) -> RedisServer:
        servers.append(RedisServer(tmp_path_factory.mktemp("redis"), *options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def workers(settings: Settings, tmp_path: Path) -> Iterator[Callable[..., list[WorkerProcess]]]:
    """Starts real workers and waits until they are ready: `workers("gpu", "vlm")`, one for each queue named.

    By the documented commands: `vlm` gets 32 threads. `settings=` are others than the fixture's, `env=` adds
    variables. Workers are stopped by SIGTERM at the end; nothing of them may be left.
    """
    started: list[WorkerProcess] = []

    def start(
        *queues: str,
        settings: Settings = settings,
        concurrency: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> list[WorkerProcess]:
        new = []
        for queue in queues:
            threads = concurrency or (32 if queue == "vlm" else None)
            new.append(WorkerProcess(queue, settings, tmp_path, threads, env or {}))
            started.append(new[-1])
        for worker in new:
            worker.wait_ready()
        return new

    yield start
    problems = []
    for worker in started:
        worker.ask_to_stop()
    for worker in started:
        try:
            worker.stop()
        except AssertionError as error:
            problems.append(str(error))
        print(f"log of the worker for {worker.queue} (pid {worker.pid}):\n{worker.log_text[-10_000:]}")
    assert not problems, "\n".join(problems)


@pytest.fixture
def in_env(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Sets variables for a test: `in_env(REWARDQ_DEVICE="cpu")`."""

    def set_all(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


MAX_AWAITED_CHECKED = 300
"""With more the invariants are not asserted: they look at everything."""


@pytest.fixture(autouse=True)
def checked_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine in this process asserts its invariants after each event."""
    apply = EngineState.apply

    def checked(self: EngineState, event: Any, now: float) -> Any:
        actions = apply(self, event, now)
        if len(self.core.awaited) <= MAX_AWAITED_CHECKED:
            self.check()
        return actions

    monkeypatch.setattr(EngineState, "apply", checked)
