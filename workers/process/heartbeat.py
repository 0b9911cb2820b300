"""A worker's thread that keeps its claims alive and says what the worker serves."""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Callable

import redis

from tasks.messages import WIRE_VERSION, Heartbeat
from tasks.outcomes import WorkerOutcomes
from tasks.payloads import PayloadStore
from tasks.servers.connections import LOST
from workers.loading.cache import ModelCache
from workers.process.terminal import RedisLog
from workers.scoring.held_claims import HeldClaims

log = logging.getLogger(__name__)

TROUBLE = (redis.RedisError, OSError)
"""What a server that is away, full or forbids something raises; the next beat may do better."""

BEATS_A_TTL = 4
"""So many times within the life of a claim it is extended: a few lost packets do not lose it."""


SAY_EVERY_S = 60.0
"""How often the log says that a server forbids something; that it is away is said once, by `RedisLog`."""

LAST_BEAT_S = 5.0
"""How long the end waits for a beat under way."""


class HeartbeatThread(threading.Thread):
    """Extends the claims that tasks hold, and writes this worker's heartbeat. Lives as long as its process.

    A second thread writes the heartbeat: it asks the payload store for its identity, and a store that hangs must not
    keep claims from being extended.
    """

    def __init__(  # noqa: PLR0913  (wires parts)
        self,
        node: str,
        queues: tuple[str, ...],
        outcomes: WorkerOutcomes,
        claims: HeldClaims,
        store: PayloadStore,
        models: ModelCache,
        claim_ttl_s: float,
        redis_log: RedisLog | None = None,
        refusal: Callable[[BaseException], str] = lambda _error: "",
    ) -> None:
        super().__init__(name="rewardq-heartbeat", daemon=True)
        self._node, self._queues, self._outcomes = node, queues, outcomes
        self._claims = claims
        self._store, self._models, self._ttl_s = store, models, claim_ttl_s
        self._redis_log = redis_log or RedisLog()
        self._refusal = refusal
        self.is_preloading = False
        """Whether the worker takes no tasks yet, since it loads what it was told to."""
        self.unanswered: tuple[str, ...] = ()
        """Which rewards wait for a server that has not answered yet."""
        self._ended = threading.Event()
        self._speaker = threading.Thread(
            target=self._speak, name="rewardq-speaker", daemon=True
        )

    def start(self) -> None:
        """Start both threads."""
        super().start()
        self._speaker.start()

    def run(self) -> None:
        """Extend claims until `end`."""
        self._repeat(self._claims.extend, "claims not extended")

    def _speak(self) -> None:
        self._repeat(self._beat, "heartbeat failed")

    def _repeat(self, call: Callable[[], None], failed: str) -> None:
        say_at = 0.0
        while True:
            started = time.monotonic()
            try:
                call()
                self._redis_log.back(failed)
            except LOST as error:
                if not self._refusal(error):
                    self._redis_log.gone(failed, error)
            except TROUBLE as error:
                if not self._refusal(error) and started >= say_at:
                    log.warning("%s error=%s", failed, error)
                    say_at = started + SAY_EVERY_S
            except Exception:  # without this thread others would take what is being scored here, or find no worker
                log.exception("%s", failed)
            pause_s = self._ttl_s / BEATS_A_TTL - (time.monotonic() - started)
            if self._ended.wait(max(0.1, pause_s)):
                return

    def end(self) -> None:
        """Take this worker off the list and stop."""
        self._ended.set()
        if self._speaker.is_alive():
            self._speaker.join(
                timeout=LAST_BEAT_S
            )  # a beat under way would put it on the list again
        try:
            self._outcomes.end_beat(self._node)
        except TROUBLE as error:
            if not self._redis_log.is_gone and not self._refusal(
                error
            ):  # else it is said already
                log.warning("heartbeat not ended error=%s", error)

    def _beat(self) -> None:
        loading = self._models.loading
        heartbeat = Heartbeat(
            wire=WIRE_VERSION,
            node=self._node,
            queues=self._queues,
            host=platform.node(),
            pid=os.getpid(),
            store=self._store.identity(),
            state="loading" if loading or self.is_preloading else "ready",
            loading=loading,
            loaded=self._models.loaded,
            models=self._models.names,
            unanswered=self.unanswered,
        )
        self._outcomes.beat(heartbeat, self._ttl_s)
