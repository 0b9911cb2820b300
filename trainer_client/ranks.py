"""What the ranks of one step tell each other through Redis: objects to gather, and the verdict they all come to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgpack

from tasks import keys
from tasks.connections import LOST
from tasks.errors import RanksMissingError

PACE_S = 0.05
"""How often a rank looks whether the others have answered."""

TTL_S = 3600
"""An answer lives so long: a rank that is restarted within the step finds those of the others."""


class Ranks:
    """Gathers one object of each rank, as `torch.distributed.all_gather_object` does, but through Redis and in bounds.

    All ranks must gather about the same topics in the same order. Whether all have answered is decided once, in Redis:
    the first rank whose deadline passes decides for all, so that none returns where another raises.
    """

    def __init__(self, redis: Any, run: str, launch: str, rank: int, world_size: int) -> None:
        self._redis, self.rank, self._world_size = redis, rank, world_size
        self._place = (run, launch)
        self._counts: Counter[str] = Counter()

    def gather(self, topic: str, mine: Any, deadline: float) -> list[Any]:
        """The objects of all ranks, in the order of ranks.

        Args:
            topic: What it is about: a step, and what of it. Gathering again about the same counts on.
            mine: Plain data (numbers, text, lists, mappings by text).
            deadline: On `time.monotonic()`.

        Raises:
            RanksMissingError: Names the ranks that had not answered at the deadline.
        """
        count = self._counts[topic]
        self._counts[topic] += 1
        names = [keys.answer(*self._place, topic, count, rank) for rank in range(self._world_size)]
        decision = keys.answer(*self._place, topic, count, -1)
        packed = msgpack.packb(mine)
        found: list[Any] = [None] * self._world_size
        while True:
            is_late = time.monotonic() > deadline
            try:
                if found[self.rank] is None:  # not told yet, or Redis was emptied
                    self._redis.set(names[self.rank], packed, ex=TTL_S)
                *found, decided = self._redis.mget(*names, decision)
                missing = [rank for rank, f in enumerate(found) if f is None]
                if decided is None and (is_late or not missing):
                    self._redis.set(decision, msgpack.packb(missing), ex=TTL_S, nx=True)
                    decided = self._redis.get(decision)
                if decided is not None and missing:  # the last of them may have answered, and decided, meanwhile
                    found = self._redis.mget(names)
            except LOST:
                found, decided, missing = [None] * self._world_size, None, [self.rank]
            if decided is not None:
                missing = msgpack.unpackb(decided) or [rank for rank, f in enumerate(found) if f is None]
                if missing:
                    raise RanksMissingError(topic, missing)
                return [msgpack.unpackb(f, strict_map_key=False) for f in found]
            if is_late:
                raise RanksMissingError(topic, missing)
            time.sleep(PACE_S)

    def gatherer(self, topic: str, timeout_s: float) -> Callable[[Any], list[Any]]:
        """`gather` as advantages and metrics take it."""
        return lambda mine: self.gather(topic, mine, time.monotonic() + timeout_s)
