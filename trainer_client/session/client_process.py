"""This process as one rank of the trainer: its rank lock, its engine, and its way to the other ranks."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
from collections.abc import Sequence
from typing import Any

from redis import ResponseError

from tasks.celery_app import client_outcomes
from tasks.errors import ConfigError, RedisUnreachableError
from tasks.masking import without_password
from tasks.rewards import RewardConfig
from tasks.servers.connections import LOST, connect, why_away
from tasks.settings import Settings
from trainer_client.advantages.exchange import Gather
from trainer_client.engine.engine import ASK_S, Engine
from trainer_client.engine.loop import Chore
from trainer_client.engine.model import Slot
from trainer_client.ranks.gather import RankGather
from trainer_client.ranks.rank_lock import EXTEND_EVERY_S, RankLock
from trainer_client.runs.registry import RunRegistry


class ClientProcess:
    """One rank of one start of the job. Safe between threads; a forked child must call `start_fresh`.

    The constructor gets the rank lock, and compares this rank's code with that of the other ranks before they wait for
    each other.

    Args:
        app: Celery's; `app.settings` says where the servers are.

    Raises:
        RankTakenError: Another live process is this rank of this launch.
        ConfigError: Ranks have different code of a class of the user's; names the ranks, their hosts and the files.
        RedisUnreachableError: The result backend does not answer.
    """

    ranks: RankGather
    """The way to the other ranks."""
    _engine: Engine | None
    """None until it is needed, in this process."""
    _engine_lock: threading.Lock
    """Guards `_engine`. Unlike other locks it is held over a call of a server: the engine is made once in a process,
    after the rank lock, which may have to be waited for. Whoever needs the engine has nothing to do before."""

    def __init__(
        self,
        app: Any,
        config: RewardConfig,
        *,
        run: str,
        launch: str,
        rank: int,
        world_size: int,
    ) -> None:
        self.run, self.launch = run, launch
        self.rank, self.world_size = rank, world_size
        self._app, self._config = app, config
        self._settings: Settings = app.settings
        self.rank_lock = RankLock(client_outcomes(app).redis, run, launch, rank)
        self._join_ranks()
        self.start_fresh()

    def start_fresh(self) -> None:
        """As in a new process: no threads, no connections."""
        self._engine = None
        self._engine_lock = threading.Lock()
        in_bounds = {"socket_timeout": ASK_S, "socket_connect_timeout": ASK_S}
        redis = connect(self._settings.results, self._settings.sentinels, **in_bounds)
        self.ranks = RankGather(
            redis, self.run, self.launch, self.rank, self.world_size
        )

    def open_engine(self) -> Engine:
        """The engine of this process, which also extends the rank lock."""
        with self._engine_lock:
            if self._engine is None:
                self._engine = self._make_engine()
            return self._engine

    def gatherer(self, topic: str, timeout_s: float) -> Gather:
        """Gathers one object of each rank about a topic, for so long at most."""
        self.open_engine()  # it extends the rank lock, without which an answer does not count
        return self.ranks.gatherer(topic, timeout_s)

    def close(self, abandoned: Sequence[Slot] = ()) -> None:
        """End the threads and give back the rank lock and the connections.

        Args:
            abandoned: Samples that nobody can collect any more.
        """
        with self._engine_lock:
            engine, self._engine = self._engine, None
        if engine is not None and engine.pid == os.getpid():
            engine.give_up(abandoned)
            engine.close()
        # A lock that cannot be given back expires. An error here would hide what ended the `with` block of the client.
        with contextlib.suppress(*LOST, ResponseError):
            self.rank_lock.release()
        self.ranks.close()
        # Else the garbage collector may come to its sockets first, which warn. Another client may be using the rest.
        pool = client_outcomes(self._app).redis.connection_pool
        pool.disconnect(inuse_connections=False)

    def _join_ranks(self) -> None:
        try:
            self.rank_lock.acquire()
            if self.world_size > 1:
                self._check_code_of_ranks()
        except LOST as error:
            where = without_password(self._settings.results)
            raise RedisUnreachableError(f"{where}: {why_away(error)}") from None

    def _check_code_of_ranks(self) -> None:
        redis = client_outcomes(self._app).redis
        registry = RunRegistry(redis, self.run, self._settings.result_ttl_s)
        try:
            registry.check_ranks(
                self.launch, self.rank, self.world_size, self._config, platform.node()
            )
        except ConfigError:
            self.rank_lock.release()
            raise

    def _make_engine(self) -> Engine:
        with contextlib.suppress(*LOST):  # else it is acquired once Redis is back
            self.rank_lock.acquire()
        return Engine(
            self._app,
            run=self.run,
            launch=self.launch,
            rank=self.rank,
            world_size=self.world_size,
            config=self._config,
            chores=[Chore(EXTEND_EVERY_S, self.rank_lock.extend)],
        )
