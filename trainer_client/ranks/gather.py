"""What the ranks of one step tell each other through Redis: objects to gather, and the verdict they all come to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from tasks import keys
from tasks.errors import RanksMissingError
from tasks.servers.connections import LOST
from trainer_client.ranks.rank_lock import LEASE_TTL_S

PACE_S = 0.05
"""How often a rank looks whether the others have answered."""

TTL_S = 3600
"""An answer lives so long: a rank that is restarted alone finds those of the others."""

_TELL = """
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2]) end
"""
"""KEYS: an answer, the decision of its round. ARGV: the answer, seconds. What is decided stays as it is."""

_FORGET = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"

IsRetried = Callable[[list[Any]], bool]
Waits = Callable[[list[int]], None]
"""Told again and again which ranks are waited for."""


@dataclass(frozen=True, slots=True)
class _Round:
    """What Redis says of one round: all ranks, once, about one topic."""

    holders: list[str | None]
    """The live process of each rank, by its lease."""
    answers: list[list[Any] | None]
    """Of each rank: the process it is of, its object packed, why it could not be packed."""
    decision: bytes | None

    @property
    def missing(self) -> list[int]:
        """Ranks without an answer of their live process; one of a process that is gone does not count."""
        pairs = enumerate(zip(self.holders, self.answers, strict=True))
        return [
            rank
            for rank, (holder, answer) in pairs
            if answer is None or answer[0] != holder
        ]


class Ranks:
    """Gathers one object of each rank, as `torch.distributed.all_gather_object` does, but through Redis and in bounds.

    All ranks must gather about the same topics in the same order; a topic has a round for each time. Whether all have
    answered is decided once a round, in Redis: the first rank whose deadline passes decides for all, so that none
    returns where another raises.

    A process counts the rounds of a topic by itself, so one that is restarted alone (the same launch) begins with the
    first. In a round that was decided before it came it takes the answers that the others went on with, and its own;
    a round that all were to repeat it leaves out. What a process has answered that is gone counts neither for a round
    that is not decided, nor for a job of which all ranks are new. So topics name their step. Limits: answers live for
    `TTL_S`, those of ranks that have ended are not trusted by a process that came later, and a job that starts anew
    under an old launch within seconds may find an answer of a process whose lease has not lapsed: give it a new one.
    """

    def __init__(
        self, redis: Any, run: str, launch: str, rank: int, world_size: int
    ) -> None:
        self._redis, self.rank, self._world_size = redis, rank, world_size
        self._place = (run, launch)
        self._counts: Counter[str] = Counter()
        self._started = time.monotonic()
        self._me: str | None = None
        self._tell = redis.register_script(_TELL)
        self._forget = redis.register_script(_FORGET)

    def close(self) -> None:
        """Give back the connections."""
        self._redis.close()

    def gather(
        self,
        topic: str,
        mine: Any,
        deadline: float,
        is_retried: IsRetried = lambda answers: False,
        waits: Waits = lambda missing: None,
    ) -> list[Any]:
        """The objects of all ranks, in the order of ranks.

        Args:
            topic: What it is about: a step, and what of it. Gathering again about the same counts on.
            mine: Plain data (numbers, text, lists, mappings by text).
            deadline: On `time.monotonic()`.
            is_retried: Whether all ranks gather again after such answers.
            waits: Told which ranks have not answered, while that is so.

        Raises:
            RanksMissingError: Names the ranks that had not answered at the deadline.
            ValueError: An object is not plain data; on all ranks.
        """
        packed, problem = _pack(mine)
        while True:
            count = self._counts[topic]
            self._counts[topic] += 1
            seen, is_before_us = self._decide(
                topic, count, [packed, problem], deadline, waits
            )
            told: list[list[Any] | None] = [
                *seen.answers[: self.rank],
                [self._me, packed, problem],
                *seen.answers[self.rank + 1 :],
            ]
            there = [answer for answer in told if answer is not None]
            missing = msgpack.unpackb(seen.decision)[0] or [
                r for r, answer in enumerate(told) if answer is None
            ]
            if missing and is_before_us:
                continue
            if missing:
                raise RanksMissingError(topic, missing)
            problems = [
                f"rank {rank}: {why}" for rank, (_, _, why) in enumerate(there) if why
            ]
            if problems:
                raise ValueError("; ".join(problems))
            found = [msgpack.unpackb(one, strict_map_key=False) for _, one, _ in there]
            if not (is_before_us and is_retried(found)):
                return found

    def gatherer(self, topic: str, timeout_s: float) -> Callable[[Any], list[Any]]:
        """`gather` as advantages and metrics take it."""
        return lambda mine: self.gather(topic, mine, time.monotonic() + timeout_s)

    def _decide(
        self, topic: str, count: int, mine: list[Any], deadline: float, waits: Waits
    ) -> tuple[_Round, bool]:
        """A round once it is decided, and whether that was before this process came."""
        names = [
            keys.answer(*self._place, topic, count, rank)
            for rank in range(self._world_size)
        ]
        decision = keys.answer(*self._place, topic, count, -1)
        leases = [keys.trainer(*self._place, rank) for rank in range(self._world_size)]
        while True:
            is_late = time.monotonic() > deadline
            missing = [self.rank]
            try:
                seen = _round_of(self._redis.mget(*leases, *names, decision))
                self._me = self._me or seen.holders[self.rank]
                missing = seen.missing
                if self._me is None:
                    pass  # the lease was lost with what Redis had; it is taken again
                elif seen.decision is not None:
                    if msgpack.unpackb(seen.decision)[1][self.rank] == self._me:
                        return seen, False
                    witnesses = self._witnesses(seen)
                    if any(self._has_lived(leases[rank]) for rank in witnesses):
                        return seen, True
                    if not witnesses:  # of an earlier start of the job
                        self._forget(keys=[decision], args=[seen.decision])
                        continue
                else:
                    if self.rank in missing:
                        self._tell(
                            keys=[names[self.rank], decision],
                            args=[msgpack.packb([self._me, *mine]), TTL_S],
                        )
                        missing = [rank for rank in missing if rank != self.rank]
                    if is_late or not missing:
                        self._redis.set(
                            decision,
                            msgpack.packb([missing, seen.holders]),
                            ex=TTL_S,
                            nx=True,
                        )
                        continue
            except LOST:
                pass
            if is_late:
                raise RanksMissingError(topic, missing)
            waits(missing)
            time.sleep(PACE_S)

    def _witnesses(self, seen: _Round) -> list[int]:
        """Other ranks that took part in what was decided and seem to live."""
        missing, holders = msgpack.unpackb(seen.decision)
        others = (
            rank
            for rank in range(self._world_size)
            if rank != self.rank and rank not in missing
        )
        return [
            rank
            for rank in others
            if holders[rank] is not None and seen.holders[rank] == holders[rank]
        ]

    def _has_lived(self, lease: str) -> bool:
        """Whether the holder of a lease has extended it since this process came."""
        age_s = time.monotonic() - self._started
        return int(self._redis.pttl(lease)) > 1000 * (LEASE_TTL_S - age_s)


def _pack(mine: Any) -> tuple[bytes, str]:
    try:
        return msgpack.packb(mine), ""
    except (TypeError, ValueError, OverflowError) as error:
        return (
            b"",
            f"what it gathers is not plain data (numbers, text, bytes, lists, mappings by text): {error}",
        )


def _round_of(found: Sequence[bytes | None]) -> _Round:
    *rest, decision = found
    leases, answers = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    return _Round(
        holders=[None if lease is None else lease.decode() for lease in leases],
        answers=[
            None if answer is None else msgpack.unpackb(answer) for answer in answers
        ],
        decision=decision,
    )
