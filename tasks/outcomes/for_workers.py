"""The outcomes as a worker uses them: it claims samples, writes outcomes once, and says that it lives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tasks import keys
from tasks.messages import Heartbeat, Note, Outcome, pack
from tasks.outcomes import scripts
from tasks.outcomes.addresses import redis_keys_of
from tasks.outcomes.shared import SharedOutcomes

ClaimState = Literal["claimed", "answered", "claimed by another"]


@dataclass(frozen=True, slots=True)
class Claim:
    """What became of claiming one address: it is ours (for the n-th start), answered already, or another task's."""

    state: ClaimState
    starts: int = 0


class WorkerOutcomes(SharedOutcomes):
    """The outcomes, claims and heartbeats in one Redis, for a worker.

    Args:
        redis: The result backend's client.
        claim_ttl_s: Seconds for which a claim lives without its worker's heartbeat.
        result_ttl_s: Seconds for which an outcome lives.
    """

    def __init__(self, redis: Any, claim_ttl_s: float, result_ttl_s: float) -> None:
        super().__init__(redis, result_ttl_s)
        self._claim_ms = round(1000 * claim_ttl_s)
        self._claim = redis.register_script(scripts.CLAIM)
        self._release = redis.register_script(scripts.RELEASE)
        self._start_alone = redis.register_script(scripts.START_ALONE)
        self._extend = redis.register_script(scripts.EXTEND)
        self._take = redis.register_script(scripts.TAKE)
        self._beat = redis.register_script(scripts.BEAT)

    def claim(
        self,
        addresses: Sequence[str],
        attempts: Sequence[int],
        token: str,
        deadline_ms: int,
    ) -> list[Claim] | None:
        """Claim each sample that has no answer and no claim; None if the deadline (Redis's clock) has passed.

        May be called again with the same token after a lost connection: a claim that it has stays its own, and is no
        further start.
        """
        args = [token, self._claim_ms, self._result_ms, deadline_ms, *attempts]
        found = self._claim(keys=redis_keys_of(addresses), args=args)
        if not isinstance(found, list):
            return None
        return [_claim_of(number) for number in found]

    def write(
        self, outcomes: Mapping[str, Outcome], token: str, *, only_claimed: bool = False
    ) -> int:
        """Write each outcome unless a better one is there, and end the claims; returns how many were new.

        `only_claimed` leaves out the outcomes whose claim this token has lost.
        """
        if not outcomes:
            return 0
        return self._write_each(outcomes, token, only_claimed=only_claimed)

    def start_alone(self, address: str, most: int, token: str) -> tuple[int, float]:
        """Count a suspect's start alone unless there were `most`; returns how many earlier, and seconds since then.

        May be called again with the same token after a lost connection: it counts once.
        """
        args = [most, token, self._result_ms]
        earlier, since_ms = self._start_alone(keys=[keys.starts(address)], args=args)
        return int(earlier), int(since_ms) / 1000

    def release(self, addresses: Iterable[str], token: str) -> None:
        """Give claims back without an answer; their starts do not count."""
        pairs: list[str] = []
        for address in addresses:
            pairs += (keys.claim(address), keys.starts(address))

        if pairs:
            self._release(keys=pairs, args=[token])

    def extend(self, tokens: Mapping[str, str]) -> int:
        """Keep claims (address to token) alive, and take back those that expired; returns how many are ours."""
        pairs: list[str] = []
        for address in tokens:
            pairs += (keys.claim(address), keys.outcome(address))

        if not pairs:
            return 0
        return int(self._extend(keys=pairs, args=[self._claim_ms, *tokens.values()]))

    def take(self, queue: str, number: int) -> int:
        """Move the consumed offset of a queue up to the number of a message; returns Redis's clock in ms.

        A number above the queue's counter is no client's, and moves nothing.
        """
        names = [keys.consumed_offset(queue), keys.sent_number(queue)]
        return int(self._take(keys=names, args=[number]))

    def leave_note(self, request_id: str, note: Note) -> None:
        """Tell the client why a request could not be read."""
        self.redis.set(keys.note(request_id), pack(note), px=self._result_ms)

    def beat(self, heartbeat: Heartbeat, ttl_s: float) -> None:
        """Say that a worker lives, for `ttl_s` seconds."""
        names = [keys.WORKERS, keys.worker(heartbeat.node)]
        args = [heartbeat.node, pack(heartbeat), round(1000 * ttl_s)]
        self._beat(keys=names, args=args)

    def end_beat(self, node: str) -> None:
        """Say that a worker has stopped."""
        with self.redis.pipeline(transaction=False) as pipe:
            pipe.zrem(keys.WORKERS, node)
            pipe.delete(keys.worker(node))
            pipe.execute()


def _claim_of(number: int) -> Claim:
    """What the script's number for one address means."""
    if number > 0:
        return Claim("claimed", starts=number)
    return Claim("claimed by another" if number == 0 else "answered")
