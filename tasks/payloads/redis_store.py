"""Payloads in a Redis."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from tasks import keys
from tasks.media.arrays import flat
from tasks.payloads.buffers import Buffers
from tasks.payloads.names import num_parts, run_of
from tasks.payloads.store import Data
from tasks.servers.connections import (
    DEFAULT_SENTINELS,
    check_eviction,
    check_reachable,
    connect_for_media,
    maxmemory_of,
    most_value_bytes,
)
from tasks.settings import Sentinels

KEYS_A_CALL = 1000
"""Payloads renewed or dropped in one call of a script; more go in several, so that Redis serves others between them."""

ASK_CAPACITY_EVERY_S = 60.0
"""How long a server's `maxmemory` is remembered, which an operator may raise."""


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
    """Payloads as Redis strings with an expiry, counted in a ledger that forgets what expired.

    They are read into memory that was read into before (`Buffers`).
    """

    def __init__(self, url: str, sentinels: Sentinels = DEFAULT_SENTINELS) -> None:
        self._url = url
        self._buffers = Buffers()
        self._redis = connect_for_media(url, sentinels, self._buffers.take)
        self._capacity_bytes: int | None = None
        self._ask_capacity_at = 0.0

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
        whole: dict[str, Any] = {}
        for name, data in payloads.items():
            own = _keys_of(name)
            if len(own) == 1:
                whole[own[0]] = data
            else:
                self._put_in_parts(own, flat(data), ttl_ms)
        self._put(whole, ttl_ms)

    def _put(self, data_of: Mapping[str, Any], ttl_ms: int) -> None:
        with self._redis.pipeline(transaction=False) as pipe:
            for key, data in data_of.items():
                # redis-py takes neither arrays nor views of another shape.
                pipe.set(key, flat(data), px=ttl_ms)
            for batch in _in_batches(list(data_of)):
                self._count(pipe, batch, ttl_ms)
            pipe.execute()

    def _put_in_parts(self, own: Sequence[str], data: Any, ttl_ms: int) -> None:
        """Each part in a call of its own: the server takes the next only when it has the last."""
        size = -(-len(data) // len(own))
        for number, key in enumerate(own):
            part = data[number * size : (number + 1) * size]
            self._put({key: part}, ttl_ms)

    def get(self, names: Sequence[str]) -> list[Data | None]:
        own = {name: _keys_of(name) for name in names}
        whole = [name for name in own if len(own[name]) == 1]
        found: dict[str, Data | None] = {}
        if whole:
            # A pipeline and no MGET, whose one reply the server would put together in memory.
            with self._redis.pipeline(transaction=False) as pipe:
                for name in whole:
                    pipe.get(own[name][0])
                found.update(zip(whole, pipe.execute(), strict=True))
        for name in own.keys() - found.keys():
            found[name] = self._get_in_parts(own[name])
        return [found[name] for name in names]

    def _get_in_parts(self, own: Sequence[str]) -> bytearray | None:
        """Part after part, each into its place: in memory is the payload, and one part of it."""
        with self._redis.pipeline(transaction=False) as pipe:
            for key in own:
                pipe.strlen(key)
            sizes = pipe.execute()
        if not all(sizes):  # no part is empty
            return None
        data, end = self._buffers.take(sum(sizes)), 0
        for key, size in zip(own, sizes, strict=True):
            part = cast(bytes | None, self._redis.get(key))
            if part is None or len(part) != size:
                return None
            data[end : end + size] = part
            end += size
            del part  # else its buffer were not used for the next part
        return data

    def renew(self, names: Sequence[str], ttl_s: float) -> list[str]:
        ttl_ms = round(1000 * ttl_s)
        name_of = {key: name for name in names for key in _keys_of(name)}
        gone: dict[str, None] = {}
        for batch in _in_batches(list(name_of)):
            _, indices = self._count(self._redis, batch, ttl_ms)
            gone.update((name_of[batch[i]], None) for i in indices)
        return list(gone)

    def free(self, names: Sequence[str]) -> None:
        own = [key for name in names for key in _keys_of(name)]
        for batch in _in_batches(own):
            self._count(self._redis, batch, 0)

    def bytes_in_use(self) -> int:
        return int(self._count(self._redis, (), 0)[0])

    def bytes_by_run(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        prefix, first = len(keys.payload("")), 0
        while members := self._redis.zrangebyscore(
            keys.PAYLOAD_LEDGER, "-inf", "+inf", first, KEYS_A_CALL
        ):
            first += len(members)
            for member in cast(list[bytes], members):
                num_bytes, _, key = member.decode().partition("|")
                found[run_of(key[prefix:])] += int(num_bytes)
        return dict(found)

    def value_bytes(self) -> int:
        return most_value_bytes(self._redis)

    def capacity_bytes(self) -> int | None:
        if time.monotonic() >= self._ask_capacity_at:
            self._capacity_bytes = maxmemory_of(self._redis)
            self._ask_capacity_at = time.monotonic() + ASK_CAPACITY_EVERY_S
        return self._capacity_bytes

    def check(self) -> None:
        check_reachable(self._redis, self._url, "Redis for payloads")
        check_eviction(self._redis, self._url)

    def close(self) -> None:
        self._redis.close()

    @staticmethod
    def _count(client: Any, payload_keys: Sequence[str], ttl_ms: int) -> Any:
        """Let payloads live on and be counted; 0 drops them. Returns the script's answer, or a pipeline to execute."""
        own = [keys.PAYLOAD_LEDGER, keys.PAYLOAD_BYTES, *payload_keys]
        # The script itself and not its hash, which redis-py would ask for before each pipeline.
        return client.eval(_LEDGER, len(own), *own, ttl_ms)


def _keys_of(name: str) -> list[str]:
    """Where the parts of a payload are; of one part the payload's own key."""
    num = num_parts(name)
    if num == 1:
        return [keys.payload(name)]
    return [f"{keys.payload(name)}.{number}" for number in range(num)]


def _in_batches(payload_keys: Sequence[str]) -> Iterable[Sequence[str]]:
    """The keys in batches of `KEYS_A_CALL`."""
    return (
        payload_keys[start : start + KEYS_A_CALL]
        for start in range(0, len(payload_keys), KEYS_A_CALL)
    )
