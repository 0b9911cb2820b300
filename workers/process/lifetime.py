"""When a worker begins to take tasks, and how it ends: what its Redis must be like, and what it gives back."""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from celery import bootsteps
from celery.exceptions import CPendingDeprecationWarning, WorkerShutdown
from celery.signals import worker_shutting_down
from celery.worker import state as worker_state
from celery.worker.consumer.connection import Connection
from celery.worker.state import maybe_shutdown

from tasks.errors import EvictionError, RedisRefusalError, StaleCodeError
from tasks.servers.connections import LOST
from tasks.servers.needs import ask
from tasks.servers.refusals import may_be_for_good, servers_of, words_for
from tasks.settings import Settings
from workers.process.terminal import RedisLog
from workers.process.watchdog import EXIT_HUNG

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 2.0
"""Pauses between looks whether a Redis is back, or has room again."""

ASK_EVERY_S = 5.0
"""How often at most servers are asked again for what was refused."""

HAND_BACK_S = 1.5
"""How long a worker that must end tries to give back what it has in hand; a Redis that hangs is not waited for.
With the 8 s of REWARDQ_STOP_GRACE_S it fits into the 10 s that a container's stop takes by default."""


class AwaitRedis(bootsteps.StartStopStep):  # type: ignore[misc]
    """What a worker's consumer does first, at its start and whenever it was disconnected: wait for its Redis.

    Celery would wait up to 30 s between two looks at one that is away, and try several times a second, with a traceback
    each, at one that is full, since its consumer writes to it while it starts. One that drops keys, or will not serve
    us however long we wait, is refused: the process ends with status EX_CONFIG.
    """

    _has_served = False

    def include(self, parent: Any) -> bool:
        """Before any step that connects."""
        self.obj = self
        parent.steps.insert(0, self)
        return True

    def start(self, parent: Any) -> None:
        """Return once the broker takes writes.

        Raises:
            WorkerShutdown: A Redis drops keys or will not serve us, or the worker was asked to stop meanwhile.
        """
        redis_log: RedisLog = parent.app.redis_log
        settings: Settings = parent.app.settings
        pause_s = FIRST_PAUSE_S
        while True:
            maybe_shutdown()
            _end_if_refused(parent.app)
            try:
                _look(settings, tuple(parent.app.amqp.queues.consume_from))
            except (EvictionError, RedisRefusalError) as error:
                parent.app.refusals.end(str(error), self._has_served)
                raise WorkerShutdown(os.EX_CONFIG) from None
            except (*LOST, *parent.connection_errors) as error:
                redis_log.gone("consumer", error)
            else:
                self._has_served = True
                return redis_log.back("consumer")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def stop(self, parent: Any) -> None:
        """Nothing is held open."""


def _end_if_refused(app: Any) -> None:
    """Raises `WorkerShutdown` for what the broker refused Celery's consumer with, which would ask for ever."""
    refusal, app.redis_log.refusal = app.redis_log.refusal, None
    broker = servers_of(app.settings)[0]
    words = words_for(refusal, broker) if refusal is not None else None
    if words is not None:
        app.refusals.end(broker.says(words))
        raise WorkerShutdown(os.EX_CONFIG)


def _look(settings: Settings, queues: Sequence[str]) -> None:
    for server in servers_of(settings):
        ask(server, settings.sentinels, "worker", queues)


class Refusals:
    """Ends a worker that a Redis will not serve (any more), whichever of its threads is refused first.

    What a task was refused says little (`The user executing the script can't run this command`): the servers are asked
    again for all that we need of them, and say which right is missing. Safe between threads.
    """

    def __init__(self, settings: Settings, queues: Sequence[str]) -> None:
        self._settings, self._queues = settings, queues
        self._lock = threading.RLock()
        self._ask_from = 0.0
        self._words = ""

    def refusal(self, error: BaseException) -> str:
        """Why this process ends, if `error` is that a server will not serve it any more; else nothing."""
        if not may_be_for_good(error):
            return ""
        with self._lock:
            if not self._words and time.monotonic() >= self._ask_from:
                words = self._ask()
                self._ask_from = time.monotonic() + ASK_EVERY_S
                if words:
                    self.end(words)
            return self._words

    def end(self, words: str, has_served: bool = True) -> None:
        """Take no further task, and end; tasks in hand, which can write no outcome any more, have their grace."""
        with self._lock:
            if self._words:
                return
            self._words = words
        log.critical(
            "worker %s: %s", "ends" if has_served else "refuses to start", words
        )
        if worker_state.should_stop in (None, False):
            worker_state.should_stop = os.EX_CONFIG
        at_last = threading.Timer(self._settings.stop_grace_s, os._exit, [os.EX_CONFIG])
        at_last.daemon = True
        at_last.start()

    def _ask(self) -> str:
        try:
            _look(self._settings, self._queues)
        except (EvictionError, RedisRefusalError) as error:
            return str(error)
        except LOST:
            return ""
        return ""


def refuse_early(settings: Settings, queues: Sequence[str]) -> None:
    """End the process, as `AwaitRedis` would, before it loads models for minutes. One that is away is waited for later.

    Raises:
        SystemExit: With EX_CONFIG, if a Redis drops keys or will not serve us; the log says why.
    """
    try:
        _look(settings, queues)
    except (EvictionError, RedisRefusalError) as error:
        log.critical("worker refuses to start: %s", error)
        raise SystemExit(os.EX_CONFIG) from None
    except LOST:
        return


class KeepSecret(bootsteps.StartStopStep):  # type: ignore[misc]
    """What a worker says of its broker (`inspect stats`, Flower) leaves out how sentinels are asked: their password."""

    requires = ("celery.worker.consumer.connection:Connection",)

    def info(self, parent: Any) -> dict[str, Any]:
        """Said in the place of what Celery's own step says."""
        if not parent.connection:
            return {}
        said = next(step for step in parent.steps if isinstance(step, Connection)).info(
            parent
        )["broker"]
        options = {
            name: value
            for name, value in said["transport_options"].items()
            if name != "sentinel_kwargs"
        }
        return {"broker": {**said, "transport_options": options}}


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


def hush_known_warnings() -> None:
    """Running tasks go on when the connection to the broker is lost, whatever Celery 6 will do; claims guard them."""
    warnings.filterwarnings(
        "ignore",
        r"\s*In Celery 5.1 we introduced an optional",
        CPendingDeprecationWarning,
    )


def end_without_device(loss: RuntimeError) -> None:
    """End at once, as by `kill -9`: what is in hand counts as started, so that a sample that does it is found."""
    log.critical(
        "worker ends, its GPU is lost to it status=%d error=%s", EXIT_HUNG, loss
    )
    os._exit(EXIT_HUNG)


def end_to_start_anew(error: StaleCodeError) -> None:
    """Take no further task, finish those in hand, and end, for a supervisor to start a process with the new code."""
    if (
        worker_state.should_stop is None or worker_state.should_stop is False
    ):  # 0 is a stop that was asked for
        log.critical("worker ends, to be started again status=%d: %s", EXIT_HUNG, error)
        worker_state.should_stop = EXIT_HUNG


def end_in_time(hand_back: Callable[[], None], grace_s: float) -> None:
    """From now on a worker that is asked to stop (SIGTERM) ends within `grace_s`, whatever its tasks do.

    What they have not finished by then is given back for others. Without this a container's stop would end in SIGKILL,
    and its samples would wait for their claims to expire.
    """

    def end() -> None:
        try:
            giving_back = threading.Thread(
                target=hand_back, name="rewardq-hand-back", daemon=True
            )
            giving_back.start()
            giving_back.join(HAND_BACK_S)
        finally:
            log.warning("worker ends with tasks unfinished after grace_s=%g", grace_s)
            os._exit(os.EX_OK)

    def begin(**_: Any) -> None:
        timer = threading.Timer(grace_s, end)
        timer.daemon = True
        timer.start()

    worker_shutting_down.connect(begin, weak=False)
