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

from tasks.masking import masked, without_password
from tasks.servers.connections import LOST, why_away
from tasks.servers.refusals import ConfiguredRedis, servers_of, words_for
from tasks.settings import Settings
from workers.scoring.tally import Tally

log = logging.getLogger(__name__)

LOG_SCORES_EVERY_S = 60.0

PASSWORD_MARK = "://:**@"
"""What kombu writes where a URL has neither user nor password."""

CONSUMER = "celery.worker.consumer.consumer"
CONNECTION = "celery.worker.consumer.connection"
BOOTSTEPS = "celery.bootsteps"


class RedisLog:
    """Logs once that Redis is gone and once that it is back, whichever of a worker's threads notices first.

    Redis is back when every part of the worker that missed it has it again. Safe between threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._without: set[str] = set()
        self.refusal: BaseException | None = None
        """An error by which the broker refused the consumer, and which waiting may not mend."""
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
    """Logs once a minute what was scored and what failed in that minute, if anything, and at the end what is left."""

    def __init__(self, tally: Tally, every_s: float = LOG_SCORES_EVERY_S) -> None:
        super().__init__(name="rewardq-score-log", daemon=True)
        self._tally, self._every_s = tally, every_s
        self._logged_at_s = time.monotonic()
        self._ended = threading.Event()

    def run(self) -> None:
        """Log until `end`."""
        while not self._ended.wait(self._every_s):
            self._log_scores()

    def end(self) -> None:
        """Log what was counted since the last line."""
        self._ended.set()
        self._log_scores()

    def _log_scores(self) -> None:
        now_s = time.monotonic()
        words = self._tally.take()
        if words:
            log.info("in %.0f s: %s", now_s - self._logged_at_s, words)
        self._logged_at_s = now_s


class MaskedFormatter(logging.Formatter):
    """Masks secrets in what another formatter makes of a record, its traceback included."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """The line or lines of a record."""
        return masked(self._inner.format(record))


def mask_log(logger: logging.Logger) -> None:
    """Mask secrets in what the handlers of a logger write."""
    for handler in logger.handlers:
        if not isinstance(handler.formatter, MaskedFormatter):
            inner = handler.formatter or logging.Formatter()
            handler.setFormatter(MaskedFormatter(inner))


def say_ready(
    settings: Settings, queues: Sequence[str], models: Sequence[str], threads: int
) -> None:
    """One line when a worker begins to take tasks."""
    results = ""
    if settings.result_url:
        results = f", results {without_password(settings.results)}"
    log.info(
        "ready: queues %s (%d at once); models %s; Redis %s%s; payloads %s",
        ", ".join(queues),
        threads,
        ", ".join(models) or "are loaded when they are asked for",
        without_password(settings.broker),
        results,
        without_password(settings.payloads),
    )


def quiet_celery(redis_log: RedisLog, settings: Settings) -> None:
    """Drop Celery's lines on lost connections, for which ours stand, and show URLs as they are written."""
    broker = servers_of(settings)[0]
    for name in (CONSUMER, BOOTSTEPS):
        logging.getLogger(name).addFilter(_LostConnections(redis_log, broker))
    has_password = without_password(settings.broker) != settings.broker
    if not has_password:
        for name in (CONNECTION, CONSUMER):
            logging.getLogger(name).addFilter(_without_password_marks)


def show_urls_as_written(worker: Any, settings: Settings) -> None:
    """Show the URLs of Redis in Celery's banner as they are in the settings."""
    startup_info = worker.startup_info

    def shown(artlines: bool = True) -> str:
        text: str = startup_info(artlines=artlines)
        transport = f"transport:   {worker.app.connection().as_uri()}"
        results = f"results:     {worker.app.backend.as_uri()}"
        ours = f"transport:   {without_password(settings.broker)}"
        text = text.replace(transport, ours)
        ours = f"results:     {without_password(settings.results)}"
        return text.replace(results, ours)

    worker.startup_info = shown


class _LostConnections(logging.Filter):
    """Drops Celery's lines on a connection that is lost or cannot be made: `RedisLog` says it once."""

    def __init__(self, redis_log: RedisLog, broker: ConfiguredRedis) -> None:
        super().__init__()
        self._redis_log, self._broker = redis_log, broker

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown; one of restarts that are frequent is shown without its traceback."""
        text = record.getMessage()
        if "Connection to broker lost" in text or "Cannot connect to" in text:
            return not self._is_said_by_us(record)
        is_without_redis = (
            self._redis_log.is_gone or self._redis_log.refusal is not None
        )
        if text.startswith("Error on ") and is_without_redis:
            return False  # a step that cannot say goodbye to a server
        if "Frequent restarts detected" in text:
            record.exc_info = None
        return True

    def _is_said_by_us(self, record: logging.LogRecord) -> bool:
        """Whether a record is about a server that refuses, which is noted, or is lost, which `RedisLog` says."""
        for error in record.args or ():
            if not isinstance(error, BaseException):
                continue
            refusal = self._refusal_in(error)
            if refusal is not None:
                self._redis_log.refusal = refusal
                return True
            if isinstance(error, LOST) or isinstance(error.__cause__, LOST):
                self._redis_log.gone("consumer", error)
                return True
        return False

    def _refusal_in(self, error: BaseException) -> BaseException | None:
        """An answer by which the broker refuses us, if that is the error or its cause."""
        for one in (error, error.__cause__):
            if not isinstance(one, redis.ResponseError | redis.AuthenticationError):
                continue
            if words_for(one, self._broker) is not None:
                return one
        return None


def _without_password_marks(record: logging.LogRecord) -> bool:
    """Take kombu's marks of passwords from a record's URLs, which have none."""
    if isinstance(record.args, tuple):
        args: list[object] = []
        for arg in record.args:
            if isinstance(arg, str):
                args.append(arg.replace(PASSWORD_MARK, "://"))
            else:
                args.append(arg)
        record.args = tuple(args)
    return True
