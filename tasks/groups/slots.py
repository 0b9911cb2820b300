"""The slots of groups that several trainer ranks fill together, in Redis: a full group is sealed under its digest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tasks import keys
from tasks.messages import SampleRequest, pack, unpack

_REGISTER = """
local slot, key, size, outcomes = ARGV[1], ARGV[2], tonumber(ARGV[4]), ARGV[6]
local other = redis.call('HGET', KEYS[1], 'size')
if other and other ~= ARGV[4] then return {'size', '', tonumber(other), 0} end
local old = redis.call('HGET', KEYS[1], 'k' .. slot)
local sealed = redis.call('HGET', KEYS[1], 'digest')
if old and old ~= key then
  if sealed and redis.call('EXISTS', outcomes .. sealed) == 1 then return {'scored', sealed, 0, 0} end
  redis.call('HDEL', KEYS[1], 'digest', 'number', 'attempt')
elseif not old and sealed then
  return {'full', sealed, 0, 0}
end
redis.call('HSET', KEYS[1], 'k' .. slot, key, 'b' .. slot, ARGV[3], 'size', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
local slots = {}
for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.sub(name, 1, 1) == 'k' then slots[#slots + 1] = name end
end
if #slots > size then
  redis.call('HDEL', KEYS[1], 'k' .. slot, 'b' .. slot)
  return {'full', '', #slots - 1, 0}
end
if #slots < size then return {'open', '', #slots, 0} end
local found = redis.call('HGET', KEYS[1], 'digest')
if found then return {'sealed', found, #slots, 0} end
table.sort(slots)
found = redis.sha1hex(table.concat(redis.call('HMGET', KEYS[1], unpack(slots))))
redis.call('HSET', KEYS[1], 'digest', found)
return {'sealed', found, #slots, 1}
"""
"""KEYS: the group. ARGV: slot, member's key, member, group size, ms, prefix of outcomes. Returns what became of it
(open, sealed, full, scored, size), the digest, how many slots there are, and whether this call completed the group."""

_ASK = """
local digest, attempt, first = ARGV[2], ARGV[4], ARGV[6]
local sealed, asked = redis.call('HGET', KEYS[1], 'digest'), redis.call('HGET', KEYS[1], 'attempt')
if sealed ~= digest and (sealed or not asked) then return {tonumber(first), 0} end
local asker, mine = 'asked' .. ARGV[1], ARGV[3] .. ' ' .. digest .. ' '
local told = redis.call('HGET', KEYS[1], asker) or ''
local was_told_before = asked and string.sub(told, 1, #mine + #asked + 1) == mine .. asked .. ' '
local is_same_question = told == mine .. (asked or '') .. ' ' .. ARGV[5]
if not asked or (was_told_before and not is_same_question) then
  asked = asked and attempt or first
  redis.call('HSET', KEYS[1], 'attempt', asked)
  redis.call('HDEL', KEYS[1], 'number')
end
redis.call('HSET', KEYS[1], asker, mine .. asked .. ' ' .. ARGV[5])
return {tonumber(asked), tonumber(redis.call('HGET', KEYS[1], 'number') or 0)}
"""
"""KEYS: the group. ARGV: rank, digest, client, attempt, question, first attempt. Returns the attempt that this rank
asks for and the number of the message sent for it (0: none)."""


@dataclass(frozen=True, slots=True)
class Registered:
    """What became of registering a member.

    `open`: others are missing. `sealed`: the group is complete under `digest`; `is_completed_now` for one caller.
    `full`: there are `group_size` other members. `scored`: another sample was in this slot when the group was scored.
    `size`: another rank said that the group has `num_members`.
    """

    state: Literal["open", "sealed", "full", "scored", "size"]
    digest: str
    num_members: int
    is_completed_now: bool


class GroupSlots:
    """The slots of groups that several trainer ranks fill together, in Redis."""

    def __init__(self, redis: Any, run: str, launch: str, ttl_s: float) -> None:
        self._redis, self._run, self._launch = redis, run, launch
        self._ttl_ms = round(1000 * ttl_s)
        self._register = redis.register_script(_REGISTER)
        self._ask = redis.register_script(_ASK)

    def key(self, split: str, step: int, fingerprint: str, group: str) -> str:
        """The Redis key of a group's slots."""
        return keys.group(self._run, self._launch, split, step, fingerprint, group)

    def register(
        self,
        key: str,
        slot: tuple[int, int],
        member_key: str,
        member: SampleRequest,
        size: int,
        fingerprint: str,
    ) -> Registered:
        """Put a member into its slot; the last member seals the group. To put the same member again changes nothing."""
        outcomes = keys.outcome(f"{self._run}:{fingerprint}:")
        member_args = [_slot_name(slot), member_key, pack(member)]
        state, found, num_members, is_now = self._register(
            keys=[key], args=[*member_args, size, self._ttl_ms, outcomes]
        )
        return Registered(
            state.decode(), found.decode(), int(num_members), bool(is_now)
        )

    def ask(  # noqa: PLR0913  (one question, told in parts)
        self,
        key: str,
        digest: str,
        rank: int,
        client: str,
        attempt: int,
        question: str,
        first: int | None = None,
    ) -> tuple[int, int]:
        """Which attempt of a sealed group's outcome this rank asks for, and the number of its message (0: none yet).

        It is the attempt that another rank asked for before, so that a group has one outcome on all ranks also where
        a part of it failed. It is `attempt` where this client has had the other rank's already, `first` where no rank
        has asked.

        Args:
            first: `attempt`, if it is not given. Less where the outcome of these very slots is there, and who had asked
                for it was forgotten with an emptied Redis.
            question: A name that this client gives to no other question. Where the reply is lost, the same question is
                asked again, and must not count as one of a client that has had the attempt.
        """
        args = [rank, digest, client, attempt, question, first or attempt]
        found = self._ask(keys=[key], args=args)
        return int(found[0]), int(found[1])

    def put_back(
        self, key: str, digest: str, rank: int, client: str, attempt: int
    ) -> None:
        """Note in an emptied Redis that this rank has had this attempt; its members are registered anew after it."""
        told = f"{client} {digest} {attempt} "
        fields = {"attempt": attempt, f"asked{rank}": told}
        with self._redis.pipeline() as pipe:
            pipe.hset(key, mapping=fields).pexpire(key, self._ttl_ms)
            pipe.execute()

    def digests(self, group_keys: Sequence[str]) -> list[str]:
        """Of each group its digest; empty while it is open."""
        with self._redis.pipeline(transaction=False) as pipe:
            for key in group_keys:
                pipe.hget(key, "digest")
            return [(found or b"").decode() for found in pipe.execute()]

    def filled_slots(self, group_keys: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Of each group the slots (rank, index) that are filled, in order."""
        with self._redis.pipeline(transaction=False) as pipe:
            for key in group_keys:
                pipe.hkeys(key)
            return [_slots_among(names) for names in pipe.execute()]

    def set_number(self, key: str, number: int) -> None:
        """Tell the other ranks which message was sent for the group."""
        # With a TTL: in a Redis that was emptied meanwhile, this field makes the key anew, and would stay for ever.
        with self._redis.pipeline() as pipe:
            pipe.hset(key, "number", number).pexpire(key, self._ttl_ms)
            pipe.execute()

    def members(self, key: str) -> dict[tuple[int, int], tuple[str, SampleRequest]]:
        """The members in slot order, with their keys."""
        found = self._redis.hgetall(key)
        members: dict[tuple[int, int], tuple[str, SampleRequest]] = {}
        for slot in _slots_among(found):
            name = _slot_name(slot).encode()
            member = unpack(SampleRequest, found[b"b" + name])
            members[slot] = (found[b"k" + name].decode(), member)
        return members


def _slot_name(slot: tuple[int, int]) -> str:
    """A name whose order as text is the order of slots."""
    rank, index = slot
    return f"{rank:08d}:{index:010d}"


def _slots_among(names: Iterable[bytes]) -> list[tuple[int, int]]:
    """The slots that have a member, in order, of the fields of a group's hash (`k<slot>` is a member's key)."""
    return sorted(_slot_of(name[1:]) for name in names if name[:1] == b"k")


def _slot_of(name: bytes) -> tuple[int, int]:
    rank, _, index = name.decode().partition(":")
    return int(rank), int(index)
