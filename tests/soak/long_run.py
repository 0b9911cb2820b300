"""A long run: memory of the trainer, its workers and Redis while samples pass, and the keys that are left of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

import redis

from tasks import keys
from tasks.settings import Settings
from tests.delivery.processes import TrainerProcess
from tests.servers import RedisServer, WorkerProcess
from tests.soak.trainer import resident_MB
from trainer_client.runs.registry import LIVES_LONGER

RESULT_TTL_S = 30
PAYLOAD_TTL_S = 30
"""Short, so that the run sees them pass many times."""

TTLS = {"REWARDQ_RESULT_TTL_S": f"{RESULT_TTL_S}", "REWARDQ_PAYLOAD_TTL_S": f"{PAYLOAD_TTL_S}"}

NO_POOLS = {"MALLOC_MMAP_THRESHOLD_": f"{1 << 20}", "PILLOW_BLOCKS_MAX": "0"}
"""Memory of large media goes back to the system at once. By default glibc and Pillow keep it for the next media, up to
what two threads decode at once; a leak of a few images would not be seen beside that."""

FREED_S = 10.0
"""How long the store may take to be empty of payloads after the client is closed; less than their TTL."""

EXPIRED_S = 30.0
"""How long after its TTL a key may still be counted: Redis looks for expired keys now and then."""

DATABASES = 2
"""Of a Redis: the broker's, which has the results too, and the payloads' beside it."""

NUM_POINTS = 100
"""How often memory is measured."""

LINE_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Load:
    """What passes through: images of `side` x `side`, a step of `step_size` of them after another.

    Attributes:
        has_pools: Whether glibc and Pillow keep memory for the next media, as they do by default.
    """

    name: str
    num_samples: int
    side: int
    step_size: int
    has_pools: bool = True
    model: str = "PixelCode"

    @property
    def env(self) -> dict[str, str]:
        """Variables of the trainer and the workers."""
        return dict(TTLS) if self.has_pools else {**TTLS, **NO_POOLS}

    @property
    def sample_MB(self) -> float:  # noqa: N802
        """Bytes of one image."""
        return self.side * self.side * 3 / 2**20


@dataclass(frozen=True)
class Point:
    """What was seen after `done` samples."""

    done: int
    at_s: float
    trainer_MB: float  # noqa: N815
    workers_MB: tuple[float, ...]  # noqa: N815
    redis_MB: float  # noqa: N815
    payload_MB: float  # noqa: N815
    num_keys: int


@dataclass(frozen=True)
class LongRun:
    """What a long run came to.

    Attributes:
        wrong: Rewards of another number than their sample's.
        lost: Samples that ended without a reward.
        took_s: Seconds from the first point to the last.
        payload_keys: Keys of the payload store `FREED_S` after the client was closed.
        keys_left: Keys that are left after the TTLs and were not there without a TTL after the first step.
        keys_that_stay: Keys that are left and were: a few for each queue, however many samples pass.
    """

    load: Load
    points: tuple[Point, ...]
    wrong: int
    lost: int
    took_s: float
    payload_keys: tuple[str, ...]
    keys_left: tuple[str, ...]
    keys_that_stay: tuple[str, ...]

    def as_data(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> LongRun:
        """From what `as_data` gave, also by way of JSON."""
        points = tuple(Point(**{**point, "workers_MB": tuple(point["workers_MB"])}) for point in data["points"])
        names = {name: tuple(data[name]) for name in ("payload_keys", "keys_left", "keys_that_stay")}
        return cls(**{**data, **names, "load": Load(**data["load"]), "points": points})


class LongRunner:
    """Drives one trainer and watches it, its workers and its Redis.

    Args:
        start_trainer: As the fixture `trainers`.
    """

    def __init__(
        self,
        settings: Settings,
        server: RedisServer,
        workers: list[WorkerProcess],
        start_trainer: Callable[..., TrainerProcess],
    ) -> None:
        self._settings, self._server, self._workers = settings, server, workers
        self._start_trainer = start_trainer
        self._databases = [server.client(number) for number in range(DATABASES)]
        self._store = redis.Redis.from_url(settings.payloads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in (*self._databases, self._store):
            client.close()

    def run(self, load: Load) -> LongRun:
        """Let all samples of `load` pass; stops the workers before it looks at what is left."""
        say_every = max(load.step_size, load.num_samples // NUM_POINTS)
        script = (
            "from tests.soak.trainer import train\n"
            f"train({load.model!r}, {load.num_samples}, {load.step_size}, {load.side}, {say_every})\n"
        )
        trainer = self._start_trainer(script, settings=self._settings, env=load.env)
        points = [self._point(trainer)]
        of_every_pipeline = self._keys_without_ttl()
        while points[-1].done < load.num_samples:
            points.append(self._point(trainer))
        closed = trainer.line()
        payload_keys = self._payload_keys()

        for worker in self._workers:
            worker.ask_to_stop()
        left = self._keys_after_ttls()
        return LongRun(
            load=load,
            points=tuple(points),
            wrong=closed["wrong"],
            lost=closed["lost"],
            took_s=points[-1].at_s - points[0].at_s,
            payload_keys=payload_keys,
            keys_left=tuple(sorted(left - of_every_pipeline)),
            keys_that_stay=tuple(sorted(left & of_every_pipeline)),
        )

    def _point(self, trainer: TrainerProcess) -> Point:
        said = trainer.line(LINE_TIMEOUT_S)
        return Point(
            done=said["done"],
            at_s=round(time.monotonic(), 3),
            trainer_MB=said["memory_MB"],
            workers_MB=tuple(resident_MB(worker.pid) for worker in self._workers),
            redis_MB=self._databases[0].info("memory")["used_memory"] / 2**20,
            payload_MB=self._payload_bytes() / 2**20,
            num_keys=sum(database.dbsize() for database in self._databases),
        )

    def _payload_bytes(self) -> int:
        names = list(self._store.scan_iter(keys.payload("*"), count=1000))
        with self._store.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.strlen(name)
            return sum(pipe.execute())

    def _payload_keys(self) -> tuple[str, ...]:
        """Names of payloads and requests that are still there when the store had time to free them."""
        left = self._store.keys(keys.payload("*"))
        deadline = time.monotonic() + FREED_S
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            left = self._store.keys(keys.payload("*"))
        return tuple(sorted(name.decode() for name in left))

    def _keys_without_ttl(self) -> set[str]:
        found = set()
        for number, database in enumerate(self._databases):
            found |= {f"{number}/{key.decode()}" for key in database.scan_iter() if database.ttl(key) == -1}
        return found

    def _keys_after_ttls(self) -> set[str]:
        """The keys that are left when nothing with a TTL is, or when every TTL has passed long ago."""
        deadline = time.monotonic() + LIVES_LONGER * RESULT_TTL_S + EXPIRED_S
        while time.monotonic() < deadline:
            if sum(database.dbsize() for database in self._databases) == len(self._keys_without_ttl()):
                break
            time.sleep(1)
        return {
            f"{number}/{key.decode()}"
            for number, database in enumerate(self._databases)
            for key in database.scan_iter()
        }
