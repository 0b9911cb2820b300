"""One live trainer process for each (run, launch, rank), so that two never mix their steps."""

from __future__ import annotations

import os
import platform
import secrets
import time
from typing import Any

from tasks import keys
from tasks.errors import RankTakenError

LEASE_TTL_S = 10.0
"""After a trainer is killed, its successor waits at most this long for its place."""

KEEP_EVERY_S = LEASE_TTL_S / 4
"""How often the holder extends its lease."""

LOOK_EVERY_S = 0.25

_TAKE = """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return {held, redis.call('PTTL', KEYS[1])} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return false
"""
"""KEYS: the lease. ARGV: who we are, ms. Nothing if it is ours now, else who holds it and for how long."""

_LEAVE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class Lease:
    """The place of one rank. A forked child keeps its parent's; only the process that made it gives it back."""

    def __init__(self, redis: Any, run: str, launch: str, rank: int) -> None:
        self._key = keys.trainer(run, launch, rank)
        self._words = f"run {run!r}, launch {launch!r}, rank {rank}"
        self._holder = (
            f"process {os.getpid()} on {platform.node()} ({secrets.token_hex(4)})"
        )
        self._pid = os.getpid()
        self._redis = redis
        self._take_script = redis.register_script(_TAKE)
        self._leave_script = redis.register_script(_LEAVE)

    def take(self) -> None:
        """Take the place, waiting for the lease of a process that is gone.

        Raises:
            RankTakenError: Its holder lives: it extended its lease while we looked. Names its host and process.
        """
        last_left_ms: int | None = None
        while (held := self._try()) is not None:
            holder, left_ms = held
            if last_left_ms is not None and left_ms > last_left_ms:
                raise RankTakenError(self._words, holder)
            last_left_ms = left_ms
            time.sleep(LOOK_EVERY_S)

    def keep(self) -> None:
        """Extend the lease. One that was lost (a Redis that was emptied) is taken again unless another has it.

        Raises:
            RankTakenError: Another process has it: this one was stopped, or away from Redis, for too long.
        """
        held = self._try()
        if held is not None:
            raise RankTakenError(self._words, held[0])

    def leave(self) -> None:
        """Give the place back, if this process is the one that took it."""
        if self._pid == os.getpid():
            self._leave_script(keys=[self._key], args=[self._holder])

    def _try(self) -> tuple[str, int] | None:
        held = self._take_script(
            keys=[self._key], args=[self._holder, round(1000 * LEASE_TTL_S)]
        )
        return (held[0].decode(), int(held[1])) if held else None
