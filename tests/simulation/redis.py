"""Simulated servers: what the project's own classes do in Redis, without a Redis.

`Outcomes`, `PayloadStore` and `GroupSlots` have the methods of the real ones, and leave the same keys; what is packed
there is an object here. A method is atomic, as a script is. `test_conformance.py` runs the same calls on both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import redis

from tasks import keys
from tasks.groups import Registered
from tasks.messages import Heartbeat, Note, Outcome, SampleRequest
from tasks.outcomes import Ahead, Claim, QueueState

NO_TOKEN = ""

BEATS_KEPT = 60
"""The list of workers lives so many times as long as one heartbeat."""


class Keyspace:
    """The keys of one server, each with its expiry on the server's clock.

    Args:
        now_ms: The server's clock.
    """

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self.now_ms = now_ms
        self._values: dict[str, Any] = {}
        self._expires_ms: dict[str, int] = {}

    def get(self, key: str) -> Any:
        """The value of a key, or None."""
        expires_ms = self._expires_ms.get(key)
        if expires_ms is not None and expires_ms <= self.now_ms():
            self.delete(key)
            return None
        return self._values.get(key)

    def set(self, key: str, value: Any, px: int | None = None) -> None:
        """Set a key; without `px` it lives for ever."""
        self._values[key] = value
        if px is None:
            self._expires_ms.pop(key, None)
        else:
            self._expires_ms[key] = self.now_ms() + px

    def hash(self, key: str) -> dict[str, Any]:
        """The hash at a key, made if there is none; its expiry stays."""
        found = self.get(key)
        if found is None:
            found = self._values[key] = {}
        return found

    def expire(self, key: str, px: int) -> bool:
        """Let a key live for so long from now; whether it is there."""
        if self.get(key) is None:
            return False
        self._expires_ms[key] = self.now_ms() + px
        return True

    def ttl_ms(self, key: str) -> int:
        """As PTTL: -2 without a key, -1 without an expiry."""
        if self.get(key) is None:
            return -2
        expires_ms = self._expires_ms.get(key)
        return -1 if expires_ms is None else expires_ms - self.now_ms()

    def delete(self, key: str) -> None:
        """Drop a key."""
        self._values.pop(key, None)
        self._expires_ms.pop(key, None)

    def names(self) -> list[str]:
        """All keys that are there, in order."""
        return sorted(key for key in list(self._values) if self.get(key) is not None)

    def flush(self) -> None:
        """Drop everything, as FLUSHALL does."""
        self._values.clear()
        self._expires_ms.clear()


def is_answer(outcome: Outcome | None, attempt: int) -> bool:
    """As the scripts' `answers`: a reward always is, a failure from its attempt on."""
    return outcome is not None and (outcome.is_final or outcome.attempt >= attempt)


class Outcomes:
    """`tasks.outcomes.WorkerOutcomes` and `ClientOutcomes`, of which each uses its half."""

    def __init__(self, keyspace: Keyspace, claim_ttl_s: float, result_ttl_s: float) -> None:
        self._keys = keyspace
        self._claim_ms, self._result_ms = round(1000 * claim_ttl_s), round(1000 * result_ttl_s)
        self.written_ms: dict[str, int] = {}
        """By address, when its outcome was written. This and what follows are for whoever checks a schedule."""
        self.most_starts = 0
        """Of a sample that had no answer."""

    # --- for workers -------------------------------------------------------------------------------------------------

    def claim(
        self, addresses: Sequence[str], attempts: Sequence[int], token: str, deadline_ms: int
    ) -> list[Claim] | None:
        if self._keys.now_ms() > deadline_ms:
            return None
        return [self._claim_one(a, attempt, token) for a, attempt in zip(addresses, attempts, strict=True)]

    def _claim_one(self, address: str, attempt: int, token: str) -> Claim:
        key, starts = keys.claim(address), keys.starts(address)
        if is_answer(self._keys.get(keys.outcome(address)), attempt):
            return Claim("answered")
        holder = self._keys.get(key)
        if holder is None:
            self._keys.set(key, token, self._claim_ms)
            fields = self._keys.hash(starts)
            fields["starts"] = fields.get("starts", 0) + 1
            self.most_starts = max(self.most_starts, fields["starts"])
            self._keys.expire(starts, self._result_ms)
            return Claim("claimed", fields["starts"])
        if holder == token:
            return Claim("claimed", (self._keys.get(starts) or {}).get("starts", 1))
        return Claim("claimed by another")

    def write(self, outcomes: Mapping[str, Outcome], token: str, *, only_claimed: bool = False) -> int:
        num_new = 0
        for address, outcome in outcomes.items():
            is_ours = self._keys.get(keys.claim(address)) == token
            if only_claimed and not is_ours:
                continue
            num_new += self._write_one(address, outcome)
            if is_ours:
                self._keys.delete(keys.claim(address))
            self._keys.delete(keys.starts(address))
        return num_new

    def _write_one(self, address: str, outcome: Outcome) -> bool:
        old = self._keys.get(keys.outcome(address))
        if old is not None and (old.is_final or (not outcome.is_final and old.attempt >= outcome.attempt)):
            return False
        self._keys.set(keys.outcome(address), outcome, self._result_ms)
        self.written_ms[address] = self._keys.now_ms()
        return True

    def start_alone(self, address: str, most: int, token: str) -> tuple[int, float]:
        now_ms, key = self._keys.now_ms(), keys.starts(address)
        fields = self._keys.get(key) or {}
        earlier = fields.get("alone", 0)
        since_ms = now_ms - fields.get("first_alone_ms", now_ms)
        if fields.get("alone_by") == token:
            earlier -= 1
        elif earlier < most:
            fields = self._keys.hash(key)
            fields["alone"] = earlier + 1
            fields["alone_by"] = token
            fields.setdefault("first_alone_ms", now_ms)
            self._keys.expire(key, self._result_ms)
        return earlier, since_ms / 1000

    def release(self, addresses: Iterable[str], token: str) -> None:
        for address in addresses:
            key, starts = keys.claim(address), keys.starts(address)
            if self._keys.get(key) != token:
                continue
            self._keys.delete(key)
            fields = self._keys.hash(starts)
            if fields.get("alone_by") == token:
                del fields["alone_by"]
                fields["alone"] -= 1
            fields["starts"] = fields.get("starts", 0) - 1
            if fields["starts"] <= 0:
                self._keys.delete(starts)

    def extend(self, tokens: Mapping[str, str]) -> int:
        num_ours = 0
        for address, token in tokens.items():
            key = keys.claim(address)
            holder = self._keys.get(key)
            if holder == token:
                self._keys.expire(key, self._claim_ms)
                num_ours += 1
            elif holder is None and self._keys.get(keys.outcome(address)) is None:
                self._keys.set(key, token, self._claim_ms)
                num_ours += 1
        return num_ours

    def take(self, queue: str, number: int) -> int:
        key = keys.consumed_offset(queue)
        sent, consumed = self._keys.get(keys.sent_number(queue)) or 0, self._keys.get(key) or 0
        if 0 < number <= sent and (consumed < number or consumed > sent):
            self._keys.set(key, number)
        return self._keys.now_ms()

    def leave_note(self, request_id: str, note: Note) -> None:
        self._keys.set(keys.note(request_id), note, self._result_ms)

    def beat(self, heartbeat: Heartbeat, ttl_s: float) -> None:
        ttl_ms, now_ms = round(1000 * ttl_s), self._keys.now_ms()
        self._keys.set(keys.worker(heartbeat.node), heartbeat, ttl_ms)
        nodes = self._keys.hash(keys.WORKERS)
        for node in [n for n, expires_ms in nodes.items() if expires_ms <= now_ms]:
            del nodes[node]
        nodes[heartbeat.node] = now_ms + ttl_ms
        self._keys.expire(keys.WORKERS, BEATS_KEPT * ttl_ms)

    def end_beat(self, node: str) -> None:
        nodes = self._keys.get(keys.WORKERS)
        if nodes is not None:
            nodes.pop(node, None)
            if not nodes:
                self._keys.delete(keys.WORKERS)
        self._keys.delete(keys.worker(node))

    def claimed_by(self, prefix: str) -> list[str]:
        """Claims whose token begins so; for whoever checks a schedule."""
        claims = [name for name in self._keys.names() if name.startswith(keys.claim(""))]
        return [name for name in claims if self._keys.get(name).startswith(prefix)]

    # --- for clients -------------------------------------------------------------------------------------------------

    def put_back(self, address: str, outcome: Outcome) -> None:
        self.write({address: outcome}, NO_TOKEN)

    def look_up(self, addresses: Sequence[str]) -> list[Outcome | None]:
        return [self._keys.get(keys.outcome(a)) for a in addresses]

    def are_there(self, addresses: Sequence[str]) -> list[bool]:
        return [self._keys.get(keys.outcome(a)) is not None for a in addresses]

    def notes(self, request_ids: Sequence[str]) -> list[Note | None]:
        return [self._keys.get(keys.note(i)) for i in request_ids]

    def drop_notes(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._keys.delete(keys.note(request_id))

    def claimed(self, addresses: Sequence[str]) -> list[bool]:
        return [self._keys.get(keys.claim(a)) is not None for a in addresses]

    def num_starts(self, addresses: Sequence[str]) -> list[int]:
        return [(self._keys.get(keys.starts(a)) or {}).get("starts", 0) for a in addresses]

    def queue_state(self, queue: str, num_waiting: int) -> QueueState:
        sent, taken = self._keys.get(keys.sent_number(queue)), self._keys.get(keys.consumed_offset(queue))
        return QueueState(sent or 0, taken or 0, num_waiting)

    def number(self, queue: str, num_messages: int, run: str) -> int:
        key = keys.sent_number(queue)
        before = self._keys.get(key) or 0
        self._keys.set(key, before + num_messages)
        self._note_sender(queue, before + 1, before + num_messages, run)
        return before + 1

    def _note_sender(self, queue: str, first: int, last: int, run: str) -> None:
        taken = self._keys.get(keys.consumed_offset(queue)) or 0
        senders = self._keys.hash(keys.senders(queue))
        for member in [one for one, number in senders.items() if number <= taken]:
            del senders[member]
        for member in [one for one, number in senders.items() if number == first - 1]:
            number, _, other = member.partition("|")
            if other == run:
                del senders[member]
                first = int(number)
        senders[f"{first}|{run}"] = last
        self._keys.expire(keys.senders(queue), self._result_ms)

    def ahead(self, queue: str, number: int) -> Ahead:
        taken = self._keys.get(keys.consumed_offset(queue)) or 0
        num_of: dict[str, int] = {}
        for member, last in (self._keys.get(keys.senders(queue)) or {}).items():
            first, _, run = member.partition("|")
            num = min(last, number - 1) - max(int(first), taken + 1) + 1
            if num > 0:
                num_of[run] = num_of.get(run, 0) + num
        return Ahead(taken, num_of)

    def check_room(self) -> None:
        self._keys.set(keys.ROOM, b"", 1000)

    def now_ms(self) -> int:
        return self._keys.now_ms()

    def workers(self) -> list[Heartbeat]:
        nodes = self._keys.get(keys.WORKERS) or {}
        alive = sorted((expires_ms, node) for node, expires_ms in nodes.items() if expires_ms >= self._keys.now_ms())
        found = [self._keys.get(keys.worker(node)) for _, node in alive]
        return [heartbeat for heartbeat in found if heartbeat is not None]


class PayloadStore:
    """`tasks.payloads.RedisStore`.

    Args:
        identity: Of this store, until it is emptied.
        max_bytes: A server of this size refuses more.
    """

    def __init__(self, keyspace: Keyspace, identity: str, max_bytes: float = float("inf")) -> None:
        self._keys, self._identity, self._max_bytes = keyspace, identity, max_bytes
        self._num_identities = 0

    def identity(self) -> str:
        known = self._keys.get(keys.STORE_IDENTITY)
        if known is None:
            self._num_identities += 1
            known = f"{self._identity}{self._num_identities}"
            self._keys.set(keys.STORE_IDENTITY, known)
        return known

    def put(self, payloads: Mapping[str, Any], ttl_s: float) -> None:
        ttl_ms = round(1000 * ttl_s)
        for name, data in payloads.items():
            if (self._keys.get(keys.PAYLOAD_BYTES) or 0) + len(data) > self._max_bytes:
                raise redis.OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
            self._keys.set(keys.payload(name), data, ttl_ms)
            self._count((name,), ttl_ms)

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        return [self._keys.get(keys.payload(name)) for name in names]

    def renew(self, names: Sequence[str], ttl_s: float) -> list[str]:
        return self._count(names, round(1000 * ttl_s)) if names else []

    def free(self, names: Sequence[str]) -> None:
        if names:
            self._count(names, 0)

    def bytes_in_use(self) -> int:
        self._count((), 0)
        return self._keys.get(keys.PAYLOAD_BYTES) or 0

    def names(self) -> list[str]:
        """Of the payloads and requests that are there."""
        prefix = keys.payload("")
        return [key.removeprefix(prefix) for key in self._keys.names() if key.startswith(prefix)]

    def _count(self, names: Sequence[str], ttl_ms: int) -> list[str]:
        """The script `_LEDGER`; returns the names that are gone."""
        now_ms = self._keys.now_ms()
        gone = [name for name in names if not self._count_one(keys.payload(name), ttl_ms)]
        ledger = self._keys.get(keys.PAYLOAD_LEDGER) or {}
        for member in [m for m, expires_ms in ledger.items() if expires_ms <= now_ms]:
            self._forget(member)
        if self._keys.get(keys.PAYLOAD_LEDGER) is None:
            self._keys.delete(keys.PAYLOAD_BYTES)
        self._let_ledger_live(ttl_ms)
        return gone

    def _let_ledger_live(self, ttl_ms: int) -> None:
        for key in (keys.PAYLOAD_LEDGER, keys.PAYLOAD_BYTES):
            if ttl_ms > 0 and self._keys.ttl_ms(key) < ttl_ms:
                self._keys.expire(key, ttl_ms)

    def _count_one(self, key: str, ttl_ms: int) -> bool:
        """Drop a payload, or let it live on; whether it could be."""
        data = self._keys.get(key)
        member = f"{0 if data is None else len(data)}|{key}"
        if ttl_ms == 0:
            self._keys.delete(key)
            self._forget(member)
        elif self._keys.expire(key, ttl_ms):
            self._remember(member, self._keys.now_ms() + ttl_ms)
        else:
            return False
        return True

    def _remember(self, member: str, expires_ms: int) -> None:
        ledger = self._keys.hash(keys.PAYLOAD_LEDGER)
        if member not in ledger:
            self._add(int(member.partition("|")[0]))
        ledger[member] = expires_ms

    def _forget(self, member: str) -> None:
        ledger = self._keys.get(keys.PAYLOAD_LEDGER) or {}
        if member in ledger:
            del ledger[member]
            if not ledger:
                self._keys.delete(keys.PAYLOAD_LEDGER)
            self._add(-int(member.partition("|")[0]))

    def _add(self, num_bytes: int) -> None:
        """INCRBY, which keeps the expiry."""
        before = self._keys.get(keys.PAYLOAD_BYTES) or 0
        ttl_ms = self._keys.ttl_ms(keys.PAYLOAD_BYTES)
        self._keys.set(keys.PAYLOAD_BYTES, before + num_bytes, ttl_ms if ttl_ms >= 0 else None)


class GroupSlots:
    """`tasks.groups.GroupSlots`."""

    def __init__(self, keyspace: Keyspace, run: str, launch: str, ttl_s: float) -> None:
        self._keys, self._run, self._launch = keyspace, run, launch
        self._ttl_ms = round(1000 * ttl_s)

    def key(self, split: str, step: int, fingerprint: str, group: str) -> str:
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
        name = _slot_name(slot)
        fields = self._keys.get(key) or {}
        if fields.get("size", size) != size:
            return Registered("size", "", fields["size"], False)
        old, sealed = fields.get(f"k{name}"), fields.get("digest")
        if old is not None and old != member_key:
            if sealed and self._keys.get(keys.outcome(f"{self._run}:{fingerprint}:{sealed}")) is not None:
                return Registered("scored", sealed, 0, False)
            for field in ("digest", "number", "attempt"):
                fields.pop(field, None)
        elif old is None and sealed:
            return Registered("full", sealed, 0, False)
        fields = self._keys.hash(key)
        fields[f"k{name}"], fields[f"b{name}"], fields["size"] = member_key, member, size
        self._keys.expire(key, self._ttl_ms)
        return self._seal_if_full(fields, name, size)

    @staticmethod
    def _seal_if_full(fields: dict[str, Any], name: str, size: int) -> Registered:
        slots = sorted(field for field in fields if field[0] == "k")
        if len(slots) > size:
            del fields[f"k{name}"], fields[f"b{name}"]
            return Registered("full", "", len(slots) - 1, False)
        if len(slots) < size:
            return Registered("open", "", len(slots), False)
        is_now = "digest" not in fields
        if is_now:
            fields["digest"] = hashlib.sha1("".join(fields[slot] for slot in slots).encode()).hexdigest()
        return Registered("sealed", fields["digest"], len(slots), is_now)

    def ask(
        self, key: str, digest: str, rank: int, client: str, attempt: int, question: str, first: int | None = None
    ) -> tuple[int, int]:
        first = first or attempt
        fields = self._keys.get(key) or {}
        sealed = fields.get("digest")
        if sealed != digest and (sealed or "attempt" not in fields):
            return first, 0
        asked, had = fields.get("attempt"), fields.get(f"asked{rank}")
        was_told_before = had is not None and had.startswith(f"{client} {digest} {asked} ")
        if asked is None or (was_told_before and had != f"{client} {digest} {asked} {question}"):
            fields["attempt"] = asked = first if asked is None else attempt
            fields.pop("number", None)
        fields[f"asked{rank}"] = f"{client} {digest} {asked} {question}"
        return asked, fields.get("number", 0)

    def put_back(self, key: str, digest: str, rank: int, client: str, attempt: int) -> None:
        fields = self._keys.hash(key)
        fields["attempt"], fields[f"asked{rank}"] = attempt, f"{client} {digest} {attempt} "
        self._keys.expire(key, self._ttl_ms)

    def digests(self, group_keys: Sequence[str]) -> list[str]:
        return [(self._keys.get(key) or {}).get("digest", "") for key in group_keys]

    def filled_slots(self, group_keys: Sequence[str]) -> list[list[tuple[int, int]]]:
        found = []
        for key in group_keys:
            names = self._keys.get(key) or {}
            found.append(sorted(_slot_of(name[1:]) for name in names if name[0] == "k"))
        return found

    def set_number(self, key: str, number: int) -> None:
        self._keys.hash(key)["number"] = number
        self._keys.expire(key, self._ttl_ms)

    def members(self, key: str) -> dict[tuple[int, int], tuple[str, SampleRequest]]:
        fields = self._keys.get(key) or {}
        slots = sorted(name[1:] for name in fields if name[0] == "k")
        return {_slot_of(slot): (fields[f"k{slot}"], fields[f"b{slot}"]) for slot in slots}


def _slot_name(slot: tuple[int, int]) -> str:
    rank, index = slot
    return f"{rank:08d}:{index:010d}"


def _slot_of(name: str) -> tuple[int, int]:
    rank, _, index = name.partition(":")
    return int(rank), int(index)
