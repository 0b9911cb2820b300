"""Fixtures for what goes wrong: a supervised worker, a proxy to cut, a judge, trainers to kill, what was begun."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks.settings import Settings
from tests.delivery.processes import Judge, Supervisor, TcpProxy, TrainerProcess
from tests.pipeline.conftest import clients, never_idle  # noqa: F401  (fixtures)
from tests.servers import RedisServer, WorkerProcess
from trainer_client import RewardClient

MODULES = {"REWARDQ_MODULES": "tests.reward_models,tests.delivery.models"}


class Calls:
    """What reward models noted as begun: see `tests.delivery.models.begin`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    @property
    def begun(self) -> list[int]:
        """The number of each sample that was begun, in order."""
        return [int(line.split()[0]) for line in self.path.read_text().splitlines()]

    def begun_by(self, pid: int) -> list[int]:
        """As `begun`, by one process."""
        lines = [line.split() for line in self.path.read_text().splitlines()]
        return [int(number) for number, by, _when in lines if int(by) == pid]

    @property
    def times(self) -> list[float]:
        """When each sample was begun, by the clock of who began it."""
        return [float(line.split()[2]) for line in self.path.read_text().splitlines()]

    @property
    def num_again(self) -> int:
        """How often a sample was begun that had been before."""
        return sum(times - 1 for times in Counter(self.begun).values())


@dataclass(frozen=True)
class Bench:
    """All that a fault is made with; the times are those of `settings`."""

    settings: Settings
    redis: RedisServer
    calls: Calls
    clients: Callable[..., RewardClient]
    workers: Callable[..., list[WorkerProcess]]
    supervised: Callable[..., Supervisor]
    judges: Callable[..., Judge]
    proxies: Callable[[RedisServer], TcpProxy]
    trainers: Callable[..., TrainerProcess]
    private_redis: Callable[..., RedisServer]


@pytest.fixture
def bench(
    settings: Settings,
    redis_server: RedisServer,
    calls: Calls,
    private_redis: Callable[..., RedisServer],
    proxies: Callable[[RedisServer], TcpProxy],
    judges: Callable[..., Judge],
    workers: Callable[..., list[WorkerProcess]],
    supervised: Callable[..., Supervisor],
    trainers: Callable[..., TrainerProcess],
    clients: Callable[..., RewardClient],  # noqa: F811
) -> Bench:
    def start_workers(*queues: str, env: Mapping[str, str] | None = None, **options: Any) -> list[WorkerProcess]:
        return workers(*queues, env={**MODULES, **(env or {})}, **options)

    return Bench(
        settings=settings,
        redis=redis_server,
        calls=calls,
        clients=clients,
        workers=start_workers,
        supervised=supervised,
        judges=judges,
        proxies=proxies,
        trainers=trainers,
        private_redis=private_redis,
    )


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    return Calls(tmp_path / "calls")


@pytest.fixture
def supervised(settings: Settings, tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    """Starts a worker that is started again whenever it ends: `supervised("gpu", concurrency=4)`."""
    started: list[Supervisor] = []

    def start(
        queue: str,
        *,
        settings: Settings = settings,
        concurrency: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Supervisor:
        threads = concurrency or (32 if queue == "vlm" else None)
        begin = lambda: WorkerProcess(queue, settings, tmp_path, threads, {**MODULES, **(env or {})})  # noqa: E731
        started.append(Supervisor(begin))
        return started[-1]

    yield start
    for supervisor in started:
        supervisor.stop()
        print(f"log of the supervised worker:\n{supervisor.log_text[-20_000:]}")


@pytest.fixture
def proxies() -> Iterator[Callable[[RedisServer], TcpProxy]]:
    """Puts a proxy before a Redis: `proxies(redis_server)`."""
    made: list[TcpProxy] = []

    def make(server: RedisServer) -> TcpProxy:
        made.append(TcpProxy(server.port))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


@pytest.fixture
def judges() -> Iterator[Callable[..., Judge]]:
    """Starts stand-in judges: `judges(delay_s=10)`."""
    started: list[Judge] = []

    def start(delay_s: float = 0.0) -> Judge:
        started.append(Judge(delay_s))
        return started[-1]

    yield start
    for judge in started:
        judge.close()


@pytest.fixture
def trainers(settings: Settings, tmp_path: Path) -> Iterator[Callable[..., TrainerProcess]]:
    """Starts Python scripts as trainers of their own: `trainers("print(1)")`."""
    started: list[TrainerProcess] = []

    def start(script: str, *, settings: Settings = settings, env: Mapping[str, str] | None = None) -> TrainerProcess:
        started.append(TrainerProcess(script, settings, tmp_path, env or {}))
        return started[-1]

    yield start
    for trainer in started:
        trainer.close()
