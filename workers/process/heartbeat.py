"""A worker's threads that keep its claims alive and say what the worker serves."""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import redis

from tasks.messages import WIRE_VERSION, Heartbeat
from tasks.outcomes import WorkerOutcomes
from tasks.payloads import PayloadStore
from tasks.servers.connections import LOST
from workers.loading.cache import ModelCache
from workers.process.terminal import RedisLog
from workers.scoring.held_claims import EXTENSIONS_A_TTL, HeldClaims

log = logging.getLogger(__name__)

REDIS_ERRORS = (redis.RedisError, OSError)
"""What a server raises that is away, full, or forbids something. The next beat may succeed."""

LOG_EVERY_S = 60.0
"""How often the log says that a server forbids something; that it is away is said once, by `RedisLog`."""

LAST_BEAT_S = 5.0
"""How long the end waits for a beat under way."""


@dataclass(slots=True)
class WorkerState:
    """What a heartbeat says of a worker, beside its models. Written by the worker's start, read by the heartbeat."""

    node: str
    queues: tuple[str, ...]
    is_preloading: bool = False
    """Whether the worker takes no tasks yet, since it loads what it was told to."""
    unanswered: tuple[str, ...] = ()
    """Which rewards wait for a server that has not answered yet."""
    stuck: str = ""
    """Why the worker takes no message although it could; empty if it does."""


class HeartbeatThread(threading.Thread):
    """Extends the claims that tasks hold, and writes this worker's heartbeat. Lives as long as its process.

    A second thread writes the heartbeat: it asks the payload store for its identity, and a store that hangs must not
    keep claims from being extended.

    Args:
        state: What the heartbeat says, beside the models.
        claims: What to extend.
        outcomes: Where the heartbeat is written.
        store: Whose identity the heartbeat says.
        models: What the heartbeat says of the models.
        ttl_s: The life of a claim, and of a heartbeat.
        redis_log: Says that Redis is away.
        refusal: Why this process ends, if an error says that a Redis will not serve it any more; else empty.
    """

    def __init__(  # noqa: PLR0913  (wires parts)
        self,
        state: WorkerState,
        claims: HeldClaims,
        outcomes: WorkerOutcomes,
        store: PayloadStore,
        models: ModelCache,
        ttl_s: float,
        redis_log: RedisLog | None = None,
        refusal: Callable[[BaseException], str] = lambda _error: "",
    ) -> None:
        super().__init__(name="rewardq-claims", daemon=True)
        self.state = state
        self._claims, self._outcomes, self._store = claims, outcomes, store
        self._models, self._ttl_s = models, ttl_s
        self._redis_log = redis_log or RedisLog()
        self._refusal = refusal
        self._ended = threading.Event()
        self._beating = threading.Thread(
            target=self._keep_beating, name="rewardq-heartbeat", daemon=True
        )

    def start(self) -> None:
        """Start both threads."""
        super().start()
        self._beating.start()

    def run(self) -> None:
        """Extend claims until `end`."""
        self._repeat(self._claims.extend, "claims not extended")

    def _keep_beating(self) -> None:
        self._repeat(self._beat, "heartbeat failed")

    def _repeat(self, call: Callable[[], None], event: str) -> None:
        """Call `call` until `end`, whatever it raises; `event` is what the log says then."""
        log_from_s = 0.0
        while True:
            started_s = time.monotonic()
            try:
                call()
                self._redis_log.back(event)
            except REDIS_ERRORS as error:
                if self._should_log(event, error) and started_s >= log_from_s:
                    log.warning("%s error=%s", event, error)
                    log_from_s = started_s + LOG_EVERY_S
            except Exception:  # without this thread others would take what is being scored here, or find no worker
                log.exception("%s", event)
            pause_s = self._ttl_s / EXTENSIONS_A_TTL - (time.monotonic() - started_s)
            if self._ended.wait(max(0.1, pause_s)):
                return

    def _should_log(self, event: str, error: BaseException) -> bool:
        """Whether an error of Redis is to be logged here: neither is the process ended by it nor is Redis away."""
        if self._refusal(error):
            return False
        if isinstance(error, LOST):
            self._redis_log.gone(event, error)
            return False
        return True

    def end(self) -> None:
        """Take this worker off the list and stop."""
        self._ended.set()
        if self._beating.is_alive():
            # A beat under way would put the worker on the list again.
            self._beating.join(timeout=LAST_BEAT_S)
        try:
            self._outcomes.end_beat(self.state.node)
        except REDIS_ERRORS as error:
            is_known = self._redis_log.is_gone or bool(self._refusal(error))
            if not is_known:
                log.warning("heartbeat not ended error=%s", error)

    def _beat(self) -> None:
        state, loading = self.state, self._models.loading
        is_loading = bool(loading) or state.is_preloading
        heartbeat = Heartbeat(
            wire=WIRE_VERSION,
            node=state.node,
            queues=state.queues,
            host=platform.node(),
            pid=os.getpid(),
            store=self._store.identity(),
            state="loading" if is_loading else "ready",
            loading=loading,
            loaded=self._models.loaded,
            models=self._models.names,
            unanswered=state.unanswered,
            stuck=state.stuck,
        )
        self._outcomes.beat(heartbeat, self._ttl_s)
