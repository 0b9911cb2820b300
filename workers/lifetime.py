"""When a worker begins to take tasks, and how it ends: what its Redis must be like, and what it gives back."""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import redis
from celery import bootsteps
from celery.exceptions import CPendingDeprecationWarning, WorkerShutdown
from celery.signals import worker_shutting_down
from celery.worker.state import maybe_shutdown

from tasks import keys
from tasks.celery_app import outcomes_of
from tasks.connections import FULL, LOST, check_eviction
from tasks.errors import EvictionError

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 2.0
"""Pauses between looks whether a Redis that is full has room again."""

SAY_EVERY_S = 60.0
"""How often the log says that this is waited for."""


class AwaitRedis(bootsteps.StartStopStep):  # type: ignore[misc]
    """What a worker's consumer does first, at its start and whenever it was disconnected.

    A Redis that drops keys is refused: the process ends with status EX_CONFIG. One that is full is waited for: Celery's
    consumer writes to it while it starts, and would try several times a second, with a traceback each. One that is
    away is left to Celery, which waits for it.
    """

    def include(self, parent: Any) -> bool:
        """Before any step that connects."""
        self.obj = self
        parent.steps.insert(0, self)
        return True

    def start(self, parent: Any) -> None:
        """Return once the broker takes writes.

        Raises:
            WorkerShutdown: A Redis drops keys.
        """
        settings = parent.app.settings
        try:
            with parent.app.connection_for_write() as connection:
                broker = connection.default_channel.client
                check_eviction(broker, settings.broker_url)
                check_eviction(outcomes_of(parent.app).redis, settings.results)
                _wait_for_room(broker)
        except EvictionError as error:
            log.critical("worker refuses to start: %s", error)
            raise WorkerShutdown(os.EX_CONFIG) from None
        except (*LOST, *parent.connection_errors):
            return

    def stop(self, parent: Any) -> None:
        """Nothing is held open."""


class TakeForGood(bootsteps.StartStopStep):  # type: ignore[misc]
    """A message that was taken stays taken when the connection breaks or the worker stops.

    Kombu would put it back, while its task goes on or has ended: clients send again what is missing, and nothing else.
    It would also fail at that, and end the worker, while Redis is away (kombu 5.7: its channel has no connection left).
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        """Set it for the channel that tasks come by."""
        parent.task_consumer.channel.qos.restore_at_shutdown = False

    def stop(self, parent: Any) -> None:
        """Nothing is held open."""


def _wait_for_room(client: Any) -> None:
    pause_s, say_at = FIRST_PAUSE_S, 0.0
    while True:
        maybe_shutdown()
        try:
            client.set(keys.ROOM, b"", px=1000)
            return
        except redis.OutOfMemoryError:
            if time.monotonic() > say_at:
                log.warning("worker waits: %s", FULL)
                say_at = time.monotonic() + SAY_EVERY_S
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LAST_PAUSE_S)


def hush_known_warnings() -> None:
    """Running tasks go on when the connection to the broker is lost, whatever Celery 6 will do; claims guard them."""
    warnings.filterwarnings("ignore", r"\s*In Celery 5.1 we introduced an optional", CPendingDeprecationWarning)


def end_in_time(hand_back: Callable[[], None], grace_s: float) -> None:
    """From now on a worker that is asked to stop (SIGTERM) ends within `grace_s`, whatever its tasks do.

    What they have not finished by then is given back for others. Without this a container's stop would end in SIGKILL,
    and its samples would wait for their claims to expire.
    """

    def end() -> None:
        try:
            hand_back()
        finally:
            log.warning("worker ends with tasks unfinished after grace_s=%g", grace_s)
            os._exit(os.EX_OK)

    def begin(**_: Any) -> None:
        timer = threading.Timer(grace_s, end)
        timer.daemon = True
        timer.start()

    worker_shutting_down.connect(begin, weak=False)
