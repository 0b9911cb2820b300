"""The rank lock: one live trainer process for each (run, launch, rank), so that two never mix their steps."""

from __future__ import annotations

import os
import platform
import secrets
import time
from typing import Any

from tasks import keys
from tasks.errors import RankTakenError

LOCK_TTL_S = 10.0
"""After a trainer is killed, its successor waits at most this long for the lock."""

EXTEND_EVERY_S = LOCK_TTL_S / 4
"""How often the holder extends its lock."""

TRY_EVERY_S = 0.25
"""How often a process that waits for the lock tries to get it."""

_ACQUIRE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {holder, redis.call('PTTL', KEYS[1])} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return false
"""
"""KEYS: the lock. ARGV: this process, ms. Nothing if the lock is ours now, else its holder and the ms it has left."""

_RELEASE = (
    "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"
)


class RankLock:
    """The lock of one rank. A forked child holds its parent's; only the process that made it may release it."""

    def __init__(self, redis: Any, run: str, launch: str, rank: int) -> None:
        self._key = keys.trainer(run, launch, rank)
        self._rank_text = f"run {run!r}, launch {launch!r}, rank {rank}"
        self._pid = os.getpid()
        self._holder = (
            f"process {self._pid} on {platform.node()} ({secrets.token_hex(4)})"
        )
        self._acquire_script = redis.register_script(_ACQUIRE)
        self._release_script = redis.register_script(_RELEASE)

    def acquire(self) -> None:
        """Get the lock, waiting until the lock of a process that is gone has expired.

        Raises:
            RankTakenError: The holder lives: it extended its lock while we waited. Names its host and process.
        """
        last_left_ms: int | None = None
        while (held := self._try()) is not None:
            holder, left_ms = held
            # Only a live process makes the time to live grow.
            if last_left_ms is not None and left_ms > last_left_ms:
                raise RankTakenError(self._rank_text, holder)
            last_left_ms = left_ms
            time.sleep(TRY_EVERY_S)

    def extend(self) -> None:
        """Extend the lock. A lock that was lost (a Redis that was emptied) is acquired again unless another has it.

        Raises:
            RankTakenError: Another process has it: this one was stopped, or away from Redis, for too long.
        """
        held = self._try()
        if held is not None:
            raise RankTakenError(self._rank_text, held[0])

    def release(self) -> None:
        """Give the lock back, if this process is the one that made it."""
        if self._pid == os.getpid():
            self._release_script(keys=[self._key], args=[self._holder])

    def _try(self) -> tuple[str, int] | None:
        """None if the lock is ours now, else its holder and the milliseconds it has left."""
        ttl_ms = round(1000 * LOCK_TTL_S)
        held = self._acquire_script(keys=[self._key], args=[self._holder, ttl_ms])
        return (held[0].decode(), int(held[1])) if held else None
