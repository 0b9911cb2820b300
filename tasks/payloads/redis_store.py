"""Payloads in a Redis."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from tasks import keys
from tasks.servers.connections import (
    DEFAULT_SENTINELS,
    check_eviction,
    check_reachable,
    connect_for_media,
)
from tasks.settings import Sentinels

NAMES_A_CALL = 1000
"""Payloads renewed or dropped in one call of a script; more go in several, so that Redis serves others between them."""


_LEDGER = """
local ledger, sum, ttl_ms = KEYS[1], KEYS[2], tonumber(ARGV[1])
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local function forget(member)
  if redis.call('ZREM', ledger, member) == 1 then redis.call('DECRBY', sum, string.match(member, '^(%d+)|')) end
end
local gone = {}
for i = 3, #KEYS do
  local member = redis.call('STRLEN', KEYS[i]) .. '|' .. KEYS[i]
  if ttl_ms == 0 then
    redis.call('UNLINK', KEYS[i])
    forget(member)
  elseif redis.call('PEXPIRE', KEYS[i], ttl_ms) == 0 then
    gone[#gone + 1] = i - 3
  elseif redis.call('ZADD', ledger, now_ms + ttl_ms, member) == 1 then
    redis.call('INCRBY', sum, string.match(member, '^(%d+)|'))
  end
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', ledger, '-inf', now_ms, 'LIMIT', 0, 1000)) do forget(member) end
if redis.call('EXISTS', ledger) < redis.call('EXISTS', sum) then redis.call('DEL', sum) end
if ttl_ms > 0 then
  for i = 1, 2 do
    if redis.call('PTTL', KEYS[i]) < ttl_ms then redis.call('PEXPIRE', KEYS[i], ttl_ms) end
  end
end
return {tonumber(redis.call('GET', sum) or '0'), gone}
"""
"""KEYS: ledger, sum, then payloads, which live `ARGV[1]` ms from now and are counted so long; 0 drops them. Returns the
sum, and the indices of the payloads that are gone.

The script asks for the sizes itself: whoever renews or drops a payload need not have stored it. A server that is full
refuses writes that need room, but none once a script has begun to write: no such write comes first here, so that the
sum stays the ledger's."""


class RedisStore:
    """Payloads as Redis strings with an expiry, counted in a ledger that forgets what expired."""

    def __init__(self, url: str, sentinels: Sentinels = DEFAULT_SENTINELS) -> None:
        self._url = url
        self._redis = connect_for_media(url, sentinels)

    def identity(self) -> str:
        known = cast(bytes | None, self._redis.get(keys.STORE_IDENTITY))
        if known is None:  # read first: a server that is full refuses each write
            with self._redis.pipeline(transaction=False) as pipe:
                pipe.set(keys.STORE_IDENTITY, secrets.token_hex(8), nx=True)
                pipe.get(keys.STORE_IDENTITY)
                known = pipe.execute()[1]
        return known.decode()

    def put(self, payloads: Mapping[str, Any], ttl_s: float) -> None:
        ttl_ms = round(1000 * ttl_s)
        with self._redis.pipeline(transaction=False) as pipe:
            for name, data in payloads.items():
                pipe.set(keys.payload(name), _flat(data), px=ttl_ms)
            for batch in _in_batches(list(payloads)):
                self._count(pipe, batch, ttl_ms)
            pipe.execute()

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        if not names:
            return []
        # A pipeline and no MGET, whose one reply the server would put together in memory.
        with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.get(keys.payload(name))
            return cast(list[bytes | None], pipe.execute())

    def renew(self, names: Sequence[str], ttl_s: float) -> list[str]:
        ttl_ms = round(1000 * ttl_s)
        gone: list[str] = []
        for batch in _in_batches(names):
            _, indices = self._count(self._redis, batch, ttl_ms)
            gone += [batch[i] for i in indices]
        return gone

    def free(self, names: Sequence[str]) -> None:
        for batch in _in_batches(names):
            self._count(self._redis, batch, 0)

    def bytes_in_use(self) -> int:
        return int(self._count(self._redis, (), 0)[0])

    def check(self) -> None:
        check_reachable(self._redis, self._url, "Redis for payloads")
        check_eviction(self._redis, self._url)

    def close(self) -> None:
        self._redis.close()

    @staticmethod
    def _count(client: Any, names: Sequence[str], ttl_ms: int) -> Any:
        """Let payloads live on and be counted; 0 drops them. Returns the script's answer, or a pipeline to execute."""
        own = [keys.PAYLOAD_LEDGER, keys.PAYLOAD_BYTES, *map(keys.payload, names)]
        # The script itself and not its hash, which redis-py would ask for before each pipeline.
        return client.eval(_LEDGER, len(own), *own, ttl_ms)


def _in_batches(names: Sequence[str]) -> Iterable[Sequence[str]]:
    """The names in batches of `NAMES_A_CALL`."""
    return (
        names[start : start + NAMES_A_CALL]
        for start in range(0, len(names), NAMES_A_CALL)
    )


def _flat(data: Any) -> Any:
    """Bytes-like data as plain bytes in a row; redis-py takes neither arrays nor views of another shape."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else b""
