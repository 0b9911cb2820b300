"""Outcomes in Redis: look up, claim, write once, poll. The heart of delivery.

An outcome lives under its address (run, reward fingerprint, sample key). Whoever is about to score claims the address
first, so that a message may arrive twice, late, regrouped or never: the answer is one.

* A reward stays for good (its TTL): no later twin replaces it. It replaces a failure.
* A failure carries its attempt number and answers requests up to that attempt.
* A claim holds a task's token and lives `claim_ttl_s` on Redis's clock unless it is extended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgpack

from tasks import keys
from tasks.errors import WireError
from tasks.messages import (
    Heartbeat,
    Note,
    Outcome,
    pack,
    pack_outcome,
    unpack,
    unpack_outcome,
)

KEYS_A_CALL = 1000
"""Keys asked for in one MGET; more go in several, so that Redis serves others between them."""

USUAL_STARTS = 2
"""A sample found with so many starts and no answer is a suspect: it may be what ended those processes."""

_ANSWERS = """
local function answers(header, attempt)
  if string.sub(header, 1, 1) == 'R' then return true end
  local failed = tonumber(string.match(header, '^F(%d+);'))
  return failed ~= nil and failed >= attempt
end
local function header(key) return redis.call('GETRANGE', key, 0, 15) end
"""

_CLAIM = (
    _ANSWERS
    + """
local token, claim_ms, starts_ms, deadline_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) > deadline_ms then return 'expired' end
local found = {}
for i = 1, #KEYS / 3 do
  local outcome, claim, starts = KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i]
  if answers(header(outcome), tonumber(ARGV[4 + i])) then
    found[i] = -1
  elseif redis.call('SET', claim, token, 'NX', 'PX', claim_ms) then
    found[i] = redis.call('HINCRBY', starts, 'starts', 1)
    redis.call('PEXPIRE', starts, starts_ms)
  elseif redis.call('GET', claim) == token then
    found[i] = tonumber(redis.call('HGET', starts, 'starts') or '1')
  else
    found[i] = 0
  end
end
return found
"""
)
"""KEYS: outcome, claim, starts for each sample. ARGV: token, claim ms, starts ms, deadline ms, attempt of each sample.
For each: -1 answered, 0 claimed by another, n claimed by us for the n-th start."""

_WRITE = (
    _ANSWERS
    + """
local token, ttl_ms, only_claimed = ARGV[1], ARGV[2], ARGV[3] == '1'
local written = 0
for i = 1, #KEYS / 3 do
  local outcome, claim, starts, value = KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i], ARGV[3 + i]
  local is_ours = redis.call('GET', claim) == token
  if is_ours or not only_claimed then
    local new = string.sub(value, 1, 16)
    local old = header(outcome)
    local attempt = tonumber(string.match(new, '^F(%d+);'))
    local keep = string.sub(old, 1, 1) == 'R' or (attempt ~= nil and answers(old, attempt))
    if not keep then
      redis.call('SET', outcome, value, 'PX', ttl_ms)
      written = written + 1
    end
    if is_ours then redis.call('DEL', claim) end
    redis.call('DEL', starts)
  end
end
return written
"""
)
"""KEYS as for a claim. ARGV: token, outcome ms, 1 to pass over what the token does not claim, outcome of each sample.
Returns how many were new."""

_RELEASE = """
for i = 1, #KEYS / 2 do
  local claim, starts = KEYS[2 * i - 1], KEYS[2 * i]
  if redis.call('GET', claim) == ARGV[1] then
    redis.call('DEL', claim)
    if redis.call('HGET', starts, 'alone_by') == ARGV[1] then
      redis.call('HDEL', starts, 'alone_by')
      redis.call('HINCRBY', starts, 'alone', -1)
    end
    if redis.call('HINCRBY', starts, 'starts', -1) <= 0 then redis.call('DEL', starts) end
  end
end
"""
"""KEYS: claim, starts for each sample. ARGV: token. Gives claims back as if they had never been."""

_START_ALONE = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local earlier = tonumber(redis.call('HGET', KEYS[1], 'alone') or '0')
local since_ms = now_ms - tonumber(redis.call('HGET', KEYS[1], 'first_alone_ms') or now_ms)
if redis.call('HGET', KEYS[1], 'alone_by') == ARGV[2] then
  earlier = earlier - 1
elseif earlier < tonumber(ARGV[1]) then
  redis.call('HINCRBY', KEYS[1], 'alone', 1)
  redis.call('HSET', KEYS[1], 'alone_by', ARGV[2])
  redis.call('HSETNX', KEYS[1], 'first_alone_ms', now_ms)
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return {earlier, since_ms}
"""
"""KEYS: starts. ARGV: most starts alone, token, starts ms. Counts one, once for a token, unless there were as many;
returns the earlier ones, and ms since the first of them."""

_EXTEND = """
local kept = 0
for i = 1, #KEYS / 2 do
  local claim, outcome, token = KEYS[2 * i - 1], KEYS[2 * i], ARGV[1 + i]
  local holder = redis.call('GET', claim)
  if holder == token then
    redis.call('PEXPIRE', claim, ARGV[1])
    kept = kept + 1
  elseif not holder and redis.call('EXISTS', outcome) == 0 then
    redis.call('SET', claim, token, 'PX', ARGV[1])
    kept = kept + 1
  end
end
return kept
"""
"""KEYS: claim, outcome for each sample. ARGV: ms, then the token of each. Returns how many are ours; one that expired
while its worker could not reach Redis, or was stopped, and that nobody has taken or answered since, is ours again."""

_TAKE = """
if tonumber(redis.call('GET', KEYS[1]) or '0') < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1]) end
local time = redis.call('TIME')
return time[1] * 1000 + math.floor(time[2] / 1000)
"""
"""KEYS: the queue's taken number. ARGV: the number of a message that was taken. Returns Redis's clock in ms."""

_BEAT = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
redis.call('ZADD', KEYS[1], now_ms + ARGV[3], ARGV[1])
redis.call('PEXPIRE', KEYS[1], 60 * ARGV[3])
"""
"""KEYS: the workers, this worker. ARGV: its node name, its heartbeat, ms."""

State = Literal["claimed", "answered", "busy"]


@dataclass(frozen=True, slots=True)
class Claim:
    """What became of claiming one address: ours (for the n-th start), answered already, or another task's."""

    state: State
    starts: int = 0


@dataclass(frozen=True, slots=True)
class QueueState:
    """How far a queue's messages have come. A message is in the backlog while its number is above `taken` and
    the queue is not empty; `sent` below a number that was given out says that Redis was emptied since."""

    sent: int
    taken: int
    num_waiting: int

    def holds(self, number: int) -> bool:
        """Whether the message of this number still waits in the queue, as far as anyone can know."""
        return self.num_waiting > 0 and self.taken < number <= self.sent


def address(run: str, fingerprint: str, key: str) -> str:
    """Where the outcome of a sample for a reward lives."""
    return f"{run}:{fingerprint}:{key}"


def key_of(address: str) -> str:
    """The sample's or group's key in an address."""
    return address.rpartition(":")[2]


class Outcomes:
    """The outcomes, claims and heartbeats in one Redis.

    Args:
        redis: The result backend's client.
        claim_ttl_s: How long a claim lives without its worker's heartbeat.
        result_ttl_s: How long an outcome lives.
    """

    def __init__(self, redis: Any, claim_ttl_s: float, result_ttl_s: float) -> None:
        self.redis = redis
        self._claim_ms = round(1000 * claim_ttl_s)
        self._result_ms = round(1000 * result_ttl_s)
        self._claim = redis.register_script(_CLAIM)
        self._write = redis.register_script(_WRITE)
        self._release = redis.register_script(_RELEASE)
        self._start_alone = redis.register_script(_START_ALONE)
        self._extend = redis.register_script(_EXTEND)
        self._take = redis.register_script(_TAKE)
        self._beat = redis.register_script(_BEAT)

    # --- for workers -----------------------------------------------------------------------------

    def claim(
        self,
        addresses: Sequence[str],
        attempts: Sequence[int],
        token: str,
        deadline_ms: int,
    ) -> list[Claim] | None:
        """Claim what nobody has answered or is scoring; None if the deadline (Redis's clock) has passed.

        May be called again with the same token after a lost connection: what it claimed stays claimed once.
        """
        args = [token, self._claim_ms, self._result_ms, deadline_ms, *attempts]
        found = self._claim(keys=_keys_of(addresses), args=args)
        if not isinstance(found, list):
            return None
        return [
            Claim("claimed", n) if n > 0 else Claim("busy" if n == 0 else "answered")
            for n in found
        ]

    def write(
        self, outcomes: Mapping[str, Outcome], token: str, *, only_claimed: bool = False
    ) -> int:
        """Write each outcome unless a better one is there, and end the claims; returns how many were new.

        `only_claimed` passes over those that this token does not claim any more.
        """
        if not outcomes:
            return 0
        args = [
            token,
            self._result_ms,
            int(only_claimed),
            *map(pack_outcome, outcomes.values()),
        ]
        return int(self._write(keys=_keys_of(outcomes), args=args))

    def start_alone(self, address: str, most: int, token: str) -> tuple[int, float]:
        """Count a suspect's start alone unless there were `most`; returns how many earlier, and seconds since then.

        May be called again with the same token after a lost connection: it counts once.
        """
        earlier, since_ms = self._start_alone(
            keys=[keys.starts(address)], args=[most, token, self._result_ms]
        )
        return int(earlier), int(since_ms) / 1000

    def release(self, addresses: Iterable[str], token: str) -> None:
        """Give claims back without an answer; their starts do not count."""
        pairs = [key for a in addresses for key in (keys.claim(a), keys.starts(a))]
        if pairs:
            self._release(keys=pairs, args=[token])

    def extend(self, tokens: Mapping[str, str]) -> int:
        """Keep claims (address to token) alive, and take back those that expired; returns how many are ours."""
        if not tokens:
            return 0
        pairs = [key for a in tokens for key in (keys.claim(a), keys.outcome(a))]
        return int(self._extend(keys=pairs, args=[self._claim_ms, *tokens.values()]))

    def take(self, queue: str, number: int) -> int:
        """Record that the message of this number left its queue; returns Redis's clock in ms."""
        return int(self._take(keys=[keys.taken_number(queue)], args=[number]))

    def leave_note(self, request_id: str, note: Note) -> None:
        """Tell the client why a request could not be read."""
        self.redis.set(keys.note(request_id), pack(note), px=self._result_ms)

    def beat(self, heartbeat: Heartbeat, ttl_s: float) -> None:
        """Say that a worker lives."""
        names = [keys.WORKERS, keys.worker(heartbeat.node)]
        self._beat(
            keys=names, args=[heartbeat.node, pack(heartbeat), round(1000 * ttl_s)]
        )

    def end_beat(self, node: str) -> None:
        """Say that a worker has stopped."""
        with self.redis.pipeline(transaction=False) as pipe:
            pipe.zrem(keys.WORKERS, node)
            pipe.delete(keys.worker(node))
            pipe.execute()

    # --- for clients -----------------------------------------------------------------------------

    def look_up(self, addresses: Sequence[str]) -> list[Outcome | None]:
        """The outcomes in order, None where there is none (or one of a wire version we cannot read)."""
        return [
            _readable(value)
            for value in self._mget([keys.outcome(a) for a in addresses])
        ]

    def are_there(self, addresses: Sequence[str]) -> list[bool]:
        """Which addresses have an outcome, whatever it is."""
        with self.redis.pipeline(transaction=False) as pipe:
            for address in addresses:
                pipe.exists(keys.outcome(address))
            return [bool(found) for found in pipe.execute()]

    def notes(self, request_ids: Sequence[str]) -> list[Note | None]:
        """Notes of workers on these requests, in order."""
        found = self._mget([keys.note(i) for i in request_ids])
        return [_note(value) if value else None for value in found]

    def drop_notes(self, request_ids: Sequence[str]) -> None:
        """Forget notes that were acted upon."""
        if request_ids:
            self.redis.unlink(*(keys.note(i) for i in request_ids))

    def claimed(self, addresses: Sequence[str]) -> list[bool]:
        """Which addresses some task is scoring now."""
        return [
            value is not None
            for value in self._mget([keys.claim(a) for a in addresses])
        ]

    def num_starts(self, addresses: Sequence[str]) -> list[int]:
        """How often each was begun without an answer so far."""
        with self.redis.pipeline(transaction=False) as pipe:
            for address in addresses:
                pipe.hget(keys.starts(address), "starts")
            return [int(n or 0) for n in pipe.execute()]

    def queue_state(self, queue: str, num_waiting: int) -> QueueState:
        """How far a queue's messages have come; `num_waiting` is its length, which the broker knows."""
        sent, taken = self.redis.mget(keys.sent_number(queue), keys.taken_number(queue))
        return QueueState(int(sent or 0), int(taken or 0), num_waiting)

    def number(self, queue: str, num_messages: int) -> int:
        """Reserve numbers for messages about to be sent; returns the first."""
        return (
            int(self.redis.incrby(keys.sent_number(queue), num_messages))
            - num_messages
            + 1
        )

    def check_room(self) -> None:
        """Write something of no consequence; raises what a server that is full raises."""
        self.redis.set(keys.ROOM, b"", px=1000)

    def now_ms(self) -> int:
        """Redis's clock."""
        seconds, microseconds = self.redis.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    def workers(self) -> list[Heartbeat]:
        """Every live worker. One of another wire version is listed with its version, whatever else it says."""
        nodes = [
            n.decode()
            for n in self.redis.zrangebyscore(keys.WORKERS, self.now_ms(), "+inf")
        ]
        found = self._mget([keys.worker(n) for n in nodes])
        return [
            _heartbeat(node, value)
            for node, value in zip(nodes, found, strict=True)
            if value is not None
        ]

    def _mget(self, names: Sequence[str]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for start in range(0, len(names), KEYS_A_CALL):
            found += self.redis.mget(names[start : start + KEYS_A_CALL])
        return found


def _keys_of(addresses: Iterable[str]) -> list[str]:
    return [
        key
        for a in addresses
        for key in (keys.outcome(a), keys.claim(a), keys.starts(a))
    ]


def _readable(value: bytes | None) -> Outcome | None:
    if value is None:
        return None
    try:
        return unpack_outcome(value)
    except WireError:
        return None


def _note(value: bytes) -> Note:
    try:
        return unpack(Note, value)
    except WireError as error:
        return Note(reason="wire", worker="a worker", detail=str(error))


def _heartbeat(node: str, value: bytes) -> Heartbeat:
    try:
        return unpack(Heartbeat, value)
    except WireError:
        said = _mapping(value)
    unsaid: dict[str, Any] = {
        "wire": 0,
        "node": node,
        "queues": (),
        "host": "",
        "pid": 0,
        "store": "",
        "state": "ready",
    }
    known = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in said.items()
        if k in Heartbeat.model_fields
    }
    return Heartbeat.model_construct(**{**unsaid, **known})


def _mapping(value: bytes) -> dict[str, Any]:
    try:
        said = msgpack.unpackb(value)
    except (ValueError, msgpack.UnpackException):
        return {}
    return said if isinstance(said, dict) else {}
