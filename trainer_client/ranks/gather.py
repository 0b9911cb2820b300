"""Gathers one object of each rank through Redis; all ranks return the same objects, or all raise."""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from tasks import keys
from tasks.errors import RanksMissingError
from tasks.servers.connections import LOST
from trainer_client.ranks.rank_lock import LOCK_TTL_S

POLL_EVERY_S = 0.05
"""How often a rank looks whether the others have answered."""

ANSWER_TTL_S = 3600
"""An answer lives so long: a rank that is restarted alone finds the answers of the others."""

_ANSWER = """
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2]) end
"""
"""KEYS: an answer, the decision of its round. ARGV: the answer, seconds. A decided round takes no answer any more."""

_FORGET = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"
"""KEYS: a decision. ARGV: what it was when read; a newer decision stays."""

IsRetried = Callable[[list[Any]], bool]

OnWaiting = Callable[[list[int]], None]
"""Called again and again with the ranks that are waited for."""


@dataclass(frozen=True, slots=True)
class _RoundKeys:
    """The keys of one round: all ranks, once, about one topic."""

    topic: str
    locks: list[str]
    """By rank."""
    answers: list[str]
    """By rank."""
    decision: str


@dataclass(frozen=True, slots=True)
class _Round:
    """What Redis has of one round."""

    holders: list[str | None]
    """The live process of each rank: the holder of its lock."""
    answers: list[list[Any] | None]
    """Of each rank: the process that answered, its object packed, the reason if it could not be packed."""
    decision: bytes | None
    """Once it is decided, packed: the ranks that had not answered, and the holders as they were then."""

    @property
    def missing(self) -> list[int]:
        """Ranks without an answer of their live process; the answer of a process that is gone does not count."""
        missing = []
        pairs = zip(self.holders, self.answers, strict=True)
        for rank, (holder, answer) in enumerate(pairs):
            if answer is None or answer[0] != holder:
                missing.append(rank)
        return missing

    @property
    def decided(self) -> tuple[list[int], list[str | None]]:
        """The decision: the ranks that had not answered, and the holders of all ranks."""
        missing, holders = msgpack.unpackb(self.decision)
        return missing, holders


class _Standing(enum.Enum):
    """How this process stands to a decided round."""

    TOOK_PART = enum.auto()
    CAME_LATER = enum.auto()
    """The round was decided before this process was there, and a rank that took part in it lives."""
    OBSOLETE = enum.auto()
    """No process that took part in it is left: the round is of an earlier start of the job."""
    UNKNOWN = enum.auto()
    """A rank that took part holds its lock still, and may be dead: its lock has not expired yet."""


class RankGather:
    """Gathers one object of each rank, as `torch.distributed.all_gather_object` does, but through Redis and in bounds.

    All ranks must gather about the same topics in the same order; each time is a round of its topic. Whether all have
    answered is decided once a round, in Redis: the first rank whose deadline passes decides for all. Were each rank to
    decide by its own clock, one might return where another raises.

    A process counts the rounds of a topic by itself, so a process that is restarted alone (the same launch) begins
    with the first. In a round that was decided before it came, it takes the answers that the others went on with, and
    its own; it leaves out a round that all were to repeat. The answer of a process that is gone does not count for a
    round that is not decided, nor if the processes of all ranks are new. Rounds are counted anew by each process, so
    topics name their step.

    Limits: answers live for `ANSWER_TTL_S`. A process that came later does not trust the answers of ranks that have
    ended. A job that starts anew under an old launch within seconds may find an answer of a process whose rank lock has
    not expired: give the job a new launch.
    """

    def __init__(
        self, redis: Any, run: str, launch: str, rank: int, world_size: int
    ) -> None:
        self._redis, self.rank, self._world_size = redis, rank, world_size
        self._run, self._launch = run, launch
        self._counts: Counter[str] = Counter()
        """How many rounds of each topic this process has gathered."""
        self._started = time.monotonic()
        self._own_process: str | None = None
        """As the rank lock names this process, once it was seen there."""
        self._answer_script = redis.register_script(_ANSWER)
        self._forget_script = redis.register_script(_FORGET)

    def close(self) -> None:
        """Give back the connections."""
        self._redis.close()

    def gather(
        self,
        topic: str,
        mine: Any,
        deadline: float,
        is_retried: IsRetried = lambda answers: False,
        on_waiting: OnWaiting = lambda missing: None,
    ) -> list[Any]:
        """The objects of all ranks, in the order of ranks.

        Args:
            topic: What it is about: a step, and what of it. Gathering again about the same topic is its next round.
            mine: Plain data (numbers, text, lists, mappings by text).
            deadline: On `time.monotonic()`.
            is_retried: Whether all ranks gather again after such answers.
            on_waiting: Called with the ranks that have not answered, while that is so.

        Raises:
            RanksMissingError: Names the ranks that had not answered at the deadline.
            ValueError: An object is not plain data; on all ranks.
        """
        own = _pack(mine)
        while True:
            count = self._counts[topic]
            self._counts[topic] += 1
            found, has_come_later = self._wait_for_decision(
                self._keys_of(topic, count), own, deadline, on_waiting
            )

            answers = list(found.answers)
            answers[self.rank] = [self._own_process, *own]
            missing = found.decided[0] or _ranks_without(answers)
            if not missing:
                objects = _objects_of(answers)
                if not (has_come_later and is_retried(objects)):
                    return objects
            elif not has_come_later:
                raise RanksMissingError(topic, missing)

    def gatherer(self, topic: str, timeout_s: float) -> Callable[[Any], list[Any]]:
        """`gather` as advantages and metrics take it."""
        return lambda mine: self.gather(topic, mine, time.monotonic() + timeout_s)

    def _keys_of(self, topic: str, count: int) -> _RoundKeys:
        locks, answers = [], []
        for rank in range(self._world_size):
            locks.append(keys.trainer(self._run, self._launch, rank))
            answers.append(keys.answer(self._run, self._launch, topic, count, rank))
        decision = keys.answer(self._run, self._launch, topic, count, -1)
        return _RoundKeys(topic, locks, answers, decision)

    def _wait_for_decision(
        self,
        round_keys: _RoundKeys,
        own: tuple[bytes, str],
        deadline: float,
        on_waiting: OnWaiting,
    ) -> tuple[_Round, bool]:
        """A round once it is decided, and whether that was before this process came."""
        while True:
            is_late = time.monotonic() > deadline
            missing = [self.rank]
            try:
                found = self._read(round_keys)
                missing = found.missing
                if self._own_process is None:
                    pass  # the rank lock was lost with what Redis had; it is being acquired again
                elif found.decision is None:
                    missing = self._answer(round_keys, found, own)
                    if is_late or not missing:
                        self._decide(round_keys, missing, found.holders)
                        continue
                else:
                    standing = self._standing(round_keys, found)
                    if standing is _Standing.OBSOLETE:
                        self._forget_script(
                            keys=[round_keys.decision], args=[found.decision]
                        )
                        continue
                    if standing is not _Standing.UNKNOWN:
                        return found, standing is _Standing.CAME_LATER
            except LOST:
                pass  # Redis is away; it may be back before the deadline

            if is_late:
                raise RanksMissingError(round_keys.topic, missing)
            on_waiting(missing)
            time.sleep(POLL_EVERY_S)

    def _read(self, round_keys: _RoundKeys) -> _Round:
        """What Redis has of a round, in one round trip."""
        values = self._redis.mget(
            *round_keys.locks, *round_keys.answers, round_keys.decision
        )
        *per_rank, decision = values
        locks, answers = per_rank[: self._world_size], per_rank[self._world_size :]

        found = _Round(
            holders=[lock and lock.decode() for lock in locks],
            answers=[answer and msgpack.unpackb(answer) for answer in answers],
            decision=decision,
        )
        self._own_process = self._own_process or found.holders[self.rank]
        return found

    def _answer(
        self, round_keys: _RoundKeys, found: _Round, own: tuple[bytes, str]
    ) -> list[int]:
        """Answer an undecided round unless that is done; returns the ranks that have not answered."""
        missing = found.missing
        if self.rank in missing:
            answer = msgpack.packb([self._own_process, *own])
            self._answer_script(
                keys=[round_keys.answers[self.rank], round_keys.decision],
                args=[answer, ANSWER_TTL_S],
            )
            missing.remove(self.rank)
        return missing

    def _decide(
        self, round_keys: _RoundKeys, missing: list[int], holders: list[str | None]
    ) -> None:
        """Decide a round for all ranks, unless another rank has decided it."""
        decision = msgpack.packb([missing, holders])
        self._redis.set(round_keys.decision, decision, ex=ANSWER_TTL_S, nx=True)

    def _standing(self, round_keys: _RoundKeys, found: _Round) -> _Standing:
        missing, holders = found.decided
        if holders[self.rank] == self._own_process:
            return _Standing.TOOK_PART

        # Other ranks that took part in the decision and whose locks are still held by the same processes.
        witnesses = []
        for rank, holder in enumerate(holders):
            has_answered = rank != self.rank and rank not in missing
            if has_answered and holder and found.holders[rank] == holder:
                witnesses.append(rank)
        if not witnesses:
            return _Standing.OBSOLETE
        if any(self._has_lived(round_keys.locks[rank]) for rank in witnesses):
            return _Standing.CAME_LATER
        return _Standing.UNKNOWN

    def _has_lived(self, lock: str) -> bool:
        """Whether the holder of a rank lock has extended it since this process came."""
        age_s = time.monotonic() - self._started
        return int(self._redis.pttl(lock)) > 1000 * (LOCK_TTL_S - age_s)


def _pack(mine: Any) -> tuple[bytes, str]:
    """The object packed, and the reason if it could not be packed: other ranks must hear of that."""
    try:
        return msgpack.packb(mine), ""
    except (TypeError, ValueError, OverflowError) as error:
        return (
            b"",
            f"what it gathers is not plain data (numbers, text, bytes, lists, mappings by text): {error}",
        )


def _ranks_without(answers: Sequence[list[Any] | None]) -> list[int]:
    return [rank for rank, answer in enumerate(answers) if answer is None]


def _objects_of(answers: Sequence[Any]) -> list[Any]:
    """The objects in the answers of all ranks. Raises ValueError if a rank could not pack its object."""
    problems = []
    for rank, (_, _, problem) in enumerate(answers):
        if problem:
            problems.append(f"rank {rank}: {problem}")
    if problems:
        raise ValueError("; ".join(problems))
    return [msgpack.unpackb(packed, strict_map_key=False) for _, packed, _ in answers]
