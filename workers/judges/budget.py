"""How many requests all workers together may have in flight at one endpoint: each holds a permit in Redis.

A permit is a member of a sorted set whose score is when the permit expires, on Redis's clock, since the clocks of hosts
differ. The process that holds a permit renews it, and releases it when the request ends. The permit of a process that
died expires.
"""

from __future__ import annotations

import logging
import threading
import uuid
from typing import Any

from tasks import keys
from tasks.servers.connections import LOST
from workers.network.once import Once

log = logging.getLogger(__name__)

RENEWALS_A_TTL = 4
"""How many times a permit is renewed within its life, so that a renewal or two may fail."""

_DROP_EXPIRED = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
"""

_ACQUIRE = (
    _DROP_EXPIRED
    + """
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], now_ms + ARGV[3], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""
)
"""KEYS: the endpoint's permits. ARGV: permit, most permits, ms. 1 if there was room. The call may be repeated."""

_RENEW = (
    _DROP_EXPIRED
    + """
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], now_ms + ARGV[1], ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""
)
"""KEYS: the endpoint's permits. ARGV: ms, then permits. A permit that expired is added again: its request is in flight,
so the set has to count it even if that is one too many."""

_COUNT = f"{_DROP_EXPIRED} return redis.call('ZCARD', KEYS[1])"
"""KEYS: the endpoint's permits. How many there are."""


class FleetBudget:
    """The permits of this process and their renewal. Safe between threads.

    Args:
        redis: The result backend's client.
        ttl_s: How long a permit lives without its process.
    """

    def __init__(self, redis: Any, ttl_s: float) -> None:
        self._ttl_s, self._ttl_ms = ttl_s, round(1000 * ttl_s)
        self._acquire = redis.register_script(_ACQUIRE)
        self._renew = redis.register_script(_RENEW)
        self._count = redis.register_script(_COUNT)
        self._redis = redis

        self._lock = threading.Lock()
        self._held: dict[str, str] = {}  # permit to endpoint
        self._has_permits = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._keep_alive, name="rewardq-permits", daemon=True
        )
        self._thread.start()

    def acquire(self, endpoint: str, most: int) -> str | None:
        """A permit for one request at `endpoint`, or None if all workers together hold `most` permits."""
        permit = uuid.uuid4().hex
        has_room = self._acquire(
            keys=[keys.judge_permits(endpoint)], args=[permit, most, self._ttl_ms]
        )
        if not has_room:
            return None

        with self._lock:
            self._held[permit] = endpoint
        self._has_permits.set()
        return permit

    def release(self, permit: str) -> None:
        """Give a permit back; if Redis is away the permit expires by itself."""
        with self._lock:
            endpoint = self._held.pop(permit)
        try:
            self._redis.zrem(keys.judge_permits(endpoint), permit)
        except LOST as error:
            log.warning("permit not released error=%s", type(error).__name__)

    def has_room(self, endpoint: str, most: int) -> bool:
        """Whether a permit could be had now."""
        return int(self._count(keys=[keys.judge_permits(endpoint)])) < most

    def close(self) -> None:
        """End the renewals and wait for their thread."""
        with self._lock:  # else the thread could clear the event after it is set here, and wait for ever
            self._ended.set()
            self._has_permits.set()
        self._thread.join()

    def _keep_alive(self) -> None:
        pause_s = self._ttl_s / RENEWALS_A_TTL
        while self._has_permits.wait() and not self._ended.wait(pause_s):
            held = self._held_now()
            try:
                self._renew_all(held)
            except LOST as error:
                log.warning("permits not renewed error=%s", type(error).__name__)
            except Exception:  # if this thread ended, every permit would expire and the budget would bound nothing
                log.exception("permits not renewed")

    def _held_now(self) -> dict[str, str]:
        """The endpoint of each permit that is held; if none is, the thread sleeps until the next one."""
        with self._lock:
            if not self._held and not self._ended.is_set():
                self._has_permits.clear()
            return dict(self._held)

    def _renew_all(self, held: dict[str, str]) -> None:
        permits_at: dict[str, list[str]] = {}
        for permit, endpoint in held.items():
            permits_at.setdefault(endpoint, []).append(permit)

        for endpoint, permits in permits_at.items():
            self._renew(
                keys=[keys.judge_permits(endpoint)], args=[self._ttl_ms, *permits]
            )
            self._drop_released(endpoint, permits)

    def _drop_released(self, endpoint: str, permits: list[str]) -> None:
        """Remove the permits that were released during their renewal, which has added them again."""
        with self._lock:
            released = [permit for permit in permits if permit not in self._held]
        if released:
            self._redis.zrem(keys.judge_permits(endpoint), *released)


@Once
def fleet_budget() -> FleetBudget:
    """The budget of this process, in the result backend of its Celery app."""
    from tasks import app

    return FleetBudget(app.backend.client, app.settings.claim_ttl_s)
