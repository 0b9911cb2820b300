"""What a worker's terminal shows beside its models' lines: ready, a line a minute, Redis gone, Redis back.

At Celery's default level too, which is WARNING. No prompts, no media, no keys; URLs without their passwords.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import redis

from tasks.servers.connections import LOST, why_away
from tasks.servers.refusals import Server, servers_of, words_for
from tasks.settings import Settings, without_password
from workers.scoring.tally import Tally

log = logging.getLogger(__name__)

SAY_SCORES_EVERY_S = 60.0

NO_PASSWORD = "://:**@"
"""What kombu writes where a URL has neither user nor password."""


class RedisLog:
    """Says that Redis is gone, once, and that it is back, once, whoever of a worker's threads notices first.

    It is back when all that missed it have it again. Safe between threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._without: set[str] = set()
        self.refusal: BaseException | None = None
        """What the broker last refused the consumer with, that waiting may not mend."""
        self._since = 0.0

    def gone(self, who: str, error: BaseException) -> None:
        """A part of the worker cannot reach a Redis, or is refused for now."""
        with self._lock:
            if not self._without:
                self._since = time.monotonic()
                log.warning("worker waits: %s", why_away(error))
            self._without.add(who)

    def back(self, who: str) -> None:
        """A part of the worker has what it needs of Redis."""
        with self._lock:
            if who not in self._without:
                return
            self._without.remove(who)
            if not self._without:
                log.warning(
                    "Redis is back after %.0f s, the worker serves on",
                    time.monotonic() - self._since,
                )

    @property
    def is_gone(self) -> bool:
        """Whether a part of the worker is without Redis."""
        return bool(self._without)


class ScoreLog(threading.Thread):
    """Says once a minute what was scored and what failed in it, if anything, and at the end what is left."""

    def __init__(self, tally: Tally, every_s: float = SAY_SCORES_EVERY_S) -> None:
        super().__init__(name="rewardq-score-log", daemon=True)
        self._tally, self._every_s = tally, every_s
        self._said_at = time.monotonic()
        self._ended = threading.Event()

    def run(self) -> None:
        """Say it until `end`."""
        while not self._ended.wait(self._every_s):
            self._say()

    def end(self) -> None:
        """Say what was counted since the last line."""
        self._ended.set()
        self._say()

    def _say(self) -> None:
        now = time.monotonic()
        words = self._tally.take()
        if words:
            log.info("in %.0f s: %s", now - self._said_at, words)
        self._said_at = now


def say_ready(
    settings: Settings, queues: Sequence[str], models: Sequence[str], threads: int
) -> None:
    """One line when a worker begins to take tasks."""
    results = (
        f", results {without_password(settings.results)}" if settings.result_url else ""
    )
    log.info(
        "ready: queues %s (%d at once); models %s; Redis %s%s; payloads %s",
        ", ".join(queues),
        threads,
        ", ".join(models) or "are loaded when they are asked for",
        without_password(settings.broker_url),
        results,
        without_password(settings.payloads),
    )


def quiet_celery(redis_log: RedisLog, settings: Settings) -> None:
    """Let our own lines stand for Celery's on lost connections, and show URLs as they are written."""
    has_password = without_password(settings.broker_url) != settings.broker_url
    for name in ("celery.worker.consumer.consumer", "celery.bootsteps"):
        logging.getLogger(name).addFilter(
            _LostConnections(redis_log, servers_of(settings)[0])
        )
    if not has_password:
        for name in (
            "celery.worker.consumer.connection",
            "celery.worker.consumer.consumer",
        ):
            logging.getLogger(name).addFilter(_without_marks)


def show_urls_as_written(worker: Any, settings: Settings) -> None:
    """In Celery's banner."""
    startup_info = worker.startup_info

    def shown(artlines: bool = True) -> str:
        text: str = startup_info(artlines=artlines)
        transport, results = (
            worker.app.connection().as_uri(),
            worker.app.backend.as_uri(),
        )
        text = text.replace(
            f"transport:   {transport}",
            f"transport:   {without_password(settings.broker_url)}",
        )
        return text.replace(
            f"results:     {results}",
            f"results:     {without_password(settings.results)}",
        )

    worker.startup_info = shown


class _LostConnections(logging.Filter):
    """Drops what Celery says of a connection that is lost or cannot be made: `RedisLog` says it, once."""

    def __init__(self, redis_log: RedisLog, broker: Server) -> None:
        super().__init__()
        self._redis_log, self._broker = redis_log, broker

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown; one of restarts that are frequent is shown without its traceback."""
        text = record.getMessage()
        if "Connection to broker lost" in text or "Cannot connect to" in text:
            return self._is_another(record)
        is_without = self._redis_log.is_gone or self._redis_log.refusal is not None
        if (
            text.startswith("Error on ") and is_without
        ):  # a step that cannot say goodbye to a server
            return False
        if "Frequent restarts detected" in text:
            record.exc_info = None
        return True

    def _is_another(self, record: logging.LogRecord) -> bool:
        """Whether a record is about something else than a server that is lost or refuses; that one is said."""
        errors = [arg for arg in record.args or () if isinstance(arg, BaseException)]
        for error in errors:
            for one in (error, error.__cause__):
                is_answer = isinstance(
                    one, redis.ResponseError | redis.AuthenticationError
                )
                if (
                    one is not None
                    and is_answer
                    and words_for(one, self._broker) is not None
                ):
                    self._redis_log.refusal = one
                    return False
            if isinstance(error, LOST) or isinstance(error.__cause__, LOST):
                self._redis_log.gone("consumer", error)
                return False
        return True


def _without_marks(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(
            a.replace(NO_PASSWORD, "://") if isinstance(a, str) else a
            for a in record.args
        )
    return True
