"""What workers and clients both do with outcomes: look them up, and see which are claimed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tasks import keys
from tasks.errors import WireError
from tasks.messages import Outcome, pack_outcome, unpack_outcome
from tasks.outcomes.addresses import redis_keys_of
from tasks.outcomes.scripts import WRITE

KEYS_A_CALL = 1000
"""Keys asked for in one MGET. More keys go in several calls, so that Redis serves others between them."""

USUAL_STARTS = 2
"""A sample that is found with so many starts and no answer is a suspect: it may be what ended the processes that
started on it."""


class SharedOutcomes:
    """The outcomes and claims in one Redis, as both sides may see them.

    Args:
        redis: The result backend's client.
        result_ttl_s: Seconds for which an outcome lives.
    """

    def __init__(self, redis: Any, result_ttl_s: float) -> None:
        self.redis = redis
        self._result_ms = round(1000 * result_ttl_s)
        self._write = redis.register_script(WRITE)

    def look_up(self, addresses: Sequence[str]) -> list[Outcome | None]:
        """The outcomes in order; None where there is none, or one of a wire version that this side cannot read."""
        found = self._mget([keys.outcome(a) for a in addresses])
        return [_readable(value) for value in found]

    def claimed(self, addresses: Sequence[str]) -> list[bool]:
        """Which addresses some task is scoring now, in order."""
        found = self._mget([keys.claim(a) for a in addresses])
        return [token is not None for token in found]

    def _write_each(
        self, outcomes: Mapping[str, Outcome], token: str, *, only_claimed: bool
    ) -> int:
        """Write each outcome unless a better one is there; returns how many were new."""
        args = [token, self._result_ms, int(only_claimed)]
        args += map(pack_outcome, outcomes.values())
        return int(self._write(keys=redis_keys_of(outcomes), args=args))

    def _mget(self, names: Sequence[str]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for start in range(0, len(names), KEYS_A_CALL):
            found += self.redis.mget(names[start : start + KEYS_A_CALL])
        return found


def _readable(value: bytes | None) -> Outcome | None:
    if value is None:
        return None

    try:
        return unpack_outcome(value)
    except WireError:
        return None
