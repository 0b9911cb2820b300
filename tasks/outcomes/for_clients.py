"""The outcomes as a client uses them: it looks outcomes, notes, claims, queues and workers up, and numbers messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from tasks import keys
from tasks.errors import WireError
from tasks.messages import Heartbeat, Note, Outcome, unpack
from tasks.outcomes.scripts import NUMBER
from tasks.outcomes.shared import SharedOutcomes

NO_TOKEN = ""
"""A client claims nothing: no claim has this token."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """How far a queue's messages have come. A message is in the backlog while its number is above `consumed` and the
    queue is not empty."""

    sent: int
    """The number of the last message. Below a number that was given out, it says that Redis was emptied since."""
    consumed: int
    """The consumed offset: the highest number of a message that a worker took."""
    num_waiting: int
    """Messages in the queue."""

    def holds(self, number: int) -> bool:
        """Whether the message of this number still waits in the queue, as far as anyone can know."""
        return self.num_waiting > 0 and self.consumed < number <= self.sent


@dataclass(frozen=True, slots=True)
class Ahead:
    """What comes before a message in its queue."""

    consumed: int
    """The queue's consumed offset."""
    num_of: dict[str, int]
    """Messages by run, of those that were not taken."""


class ClientOutcomes(SharedOutcomes):
    """The outcomes, claims, notes and heartbeats in one Redis, for a client, which scores nothing.

    Args:
        redis: The result backend's client.
        result_ttl_s: Seconds for which an outcome lives.
    """

    def __init__(self, redis: Any, result_ttl_s: float) -> None:
        super().__init__(redis, result_ttl_s)
        self._number = redis.register_script(NUMBER)

    def put_back(self, address: str, outcome: Outcome) -> None:
        """Write an outcome that this client has read before into a Redis that was emptied since.

        The only outcome that a client writes. It is for a group over several ranks: another rank may not have read the
        group's outcome yet, and the group cannot be scored anew, because the ranks that have read it freed their media.
        A better outcome that is there already stays.
        """
        self._write_each({address: outcome}, NO_TOKEN, only_claimed=False)

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

    def num_starts(self, addresses: Sequence[str]) -> list[int]:
        """How often each sample was started without an answer so far."""
        with self.redis.pipeline(transaction=False) as pipe:
            for address in addresses:
                pipe.hget(keys.starts(address), "starts")
            return [int(n or 0) for n in pipe.execute()]

    def queue_state(self, queue: str, num_waiting: int) -> QueueState:
        """How far a queue's messages have come; `num_waiting` is its length, which the broker knows."""
        names = [keys.sent_number(queue), keys.consumed_offset(queue)]
        sent, consumed = self.redis.mget(names)
        return QueueState(int(sent or 0), int(consumed or 0), num_waiting)

    def number(self, queue: str, num_messages: int, run: str) -> int:
        """Reserve numbers for messages that a run is about to send; returns the first."""
        own = [
            keys.sent_number(queue),
            keys.senders(queue),
            keys.consumed_offset(queue),
        ]
        args = [num_messages, run, self._result_ms]
        return int(self._number(keys=own, args=args))

    def ahead(self, queue: str, number: int) -> Ahead:
        """What of a queue was not taken and comes before the message of this number."""
        consumed = int(self.redis.get(keys.consumed_offset(queue)) or 0)
        found = self.redis.zrangebyscore(
            keys.senders(queue), f"({consumed}", "+inf", withscores=True
        )
        num_of: Counter[str] = Counter()
        for member, last in found:
            first, _, run = member.decode().partition("|")
            start, end = max(int(first), consumed + 1), min(int(last), number - 1)
            if end >= start:
                num_of[run] += end - start + 1
        return Ahead(consumed, dict(num_of))

    def check_room(self) -> None:
        """Write a key that means nothing; raises what a server that is full raises."""
        self.redis.set(keys.ROOM, b"", px=1000)

    def now_ms(self) -> int:
        """Redis's clock."""
        seconds, microseconds = self.redis.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    def workers(self) -> list[Heartbeat]:
        """Every live worker. A worker of another wire version is listed with its version, whatever else it says."""
        alive = self.redis.zrangebyscore(keys.WORKERS, self.now_ms(), "+inf")
        nodes = [node.decode() for node in alive]

        found: list[Heartbeat] = []
        values = self._mget([keys.worker(node) for node in nodes])
        for node, value in zip(nodes, values, strict=True):
            if value is not None:
                found.append(_heartbeat(node, value))
        return found


def _note(value: bytes) -> Note:
    try:
        return unpack(Note, value)
    except WireError as error:
        return Note(reason="wire", worker="a worker", detail=str(error))


def _heartbeat(node: str, value: bytes) -> Heartbeat:
    """A worker's heartbeat, also of another wire version: then with what can be read of it."""
    try:
        return unpack(Heartbeat, value)
    except WireError:
        said = _mapping(value)

    fields: dict[str, Any] = {
        "wire": 0,
        "node": node,
        "queues": (),
        "host": "",
        "pid": 0,
        "store": "",
        "state": "ready",
    }
    for name, one in said.items():
        if name in Heartbeat.model_fields:
            fields[name] = tuple(one) if isinstance(one, list) else one
    return Heartbeat.model_construct(**fields)


def _mapping(value: bytes) -> dict[str, Any]:
    try:
        said = msgpack.unpackb(value)
    except (ValueError, msgpack.UnpackException):
        return {}
    return said if isinstance(said, dict) else {}
