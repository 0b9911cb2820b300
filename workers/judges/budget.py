"""How many requests all workers together may have in flight at one endpoint: leases in Redis, on its clock.

A lease is kept alive by its process and released when its request ends; that of a worker that died runs out.
"""

from __future__ import annotations

import logging
import threading
import uuid
from typing import Any

from tasks import keys
from tasks.servers.connections import LOST
from workers.remote.network import Once

log = logging.getLogger(__name__)

RENEWALS_A_TTL = 4
"""So many times within its life a lease is renewed."""

_CLOCK = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
"""

_ACQUIRE = (
    _CLOCK
    + """
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], now_ms + ARGV[3], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""
)
"""KEYS: the endpoint's leases. ARGV: lease, most leases, ms. Whether there was room; may be repeated."""

_RENEW = (
    _CLOCK
    + """
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], now_ms + ARGV[1], ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""
)
"""KEYS: the endpoint's leases. ARGV: ms, then leases. One that ran out is entered again: its request is in flight."""

_COUNT = f"{_CLOCK} return redis.call('ZCARD', KEYS[1])"
"""KEYS: the endpoint's leases. How many there are."""


class FleetBudget:
    """Leases of this process and their renewal. Safe between threads.

    Args:
        redis: The result backend's client.
        ttl_s: How long a lease lives without its process.
    """

    def __init__(self, redis: Any, ttl_s: float) -> None:
        self._ttl_s, self._ttl_ms = ttl_s, round(1000 * ttl_s)
        self._acquire = redis.register_script(_ACQUIRE)
        self._renew = redis.register_script(_RENEW)
        self._count = redis.register_script(_COUNT)
        self._redis = redis
        self._lock = threading.Lock()
        self._held: dict[str, str] = {}
        self._has_leases = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._keep_alive, name="rewardq-leases", daemon=True
        )
        self._thread.start()

    def acquire(self, endpoint: str, most: int) -> str | None:
        """A lease for one request at `endpoint`, or None if all workers together have `most` of them."""
        lease = uuid.uuid4().hex
        if not self._acquire(
            keys=[keys.judge_leases(endpoint)], args=[lease, most, self._ttl_ms]
        ):
            return None
        with self._lock:
            self._held[lease] = endpoint
        self._has_leases.set()
        return lease

    def release(self, lease: str) -> None:
        """Give a lease back; if Redis is away it runs out by itself."""
        with self._lock:
            endpoint = self._held.pop(lease)
        try:
            self._redis.zrem(keys.judge_leases(endpoint), lease)
        except LOST as error:
            log.warning("lease not released error=%s", type(error).__name__)

    def has_room(self, endpoint: str, most: int) -> bool:
        """Whether a lease could be had now."""
        return int(self._count(keys=[keys.judge_leases(endpoint)])) < most

    def close(self) -> None:
        """Renew nothing any more."""
        with self._lock:  # else the thread may forget at this moment that there is something to wake up for
            self._ended.set()
            self._has_leases.set()
        self._thread.join()

    def _keep_alive(self) -> None:
        while self._has_leases.wait() and not self._ended.wait(
            self._ttl_s / RENEWALS_A_TTL
        ):
            with self._lock:
                held = dict(self._held)
                if not held and not self._ended.is_set():
                    self._has_leases.clear()
            try:
                for endpoint in set(held.values()):
                    leases = [lease for lease, at in held.items() if at == endpoint]
                    self._renew(
                        keys=[keys.judge_leases(endpoint)], args=[self._ttl_ms, *leases]
                    )
                    self._drop_released(endpoint, leases)
            except LOST as error:
                log.warning("leases not renewed error=%s", type(error).__name__)
            except Exception:  # without this thread every lease runs out, and the budget bounds nothing any more
                log.exception("leases not renewed")

    def _drop_released(self, endpoint: str, leases: list[str]) -> None:
        """What was released while it was renewed is gone for good."""
        with self._lock:
            released = [lease for lease in leases if lease not in self._held]
        if released:
            self._redis.zrem(keys.judge_leases(endpoint), *released)


@Once
def fleet_budget() -> FleetBudget:
    """The budget of this process, in the result backend of its Celery app."""
    from tasks import app

    return FleetBudget(app.backend.client, app.settings.claim_ttl_s)
