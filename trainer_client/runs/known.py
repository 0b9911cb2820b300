"""What Redis keeps of a run besides its outcomes: the fingerprints of its rewards, and the code that answers them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from tasks import keys
from tasks.errors import ConfigError
from tasks.rewards import RewardConfig, RewardSpec
from tasks.source.code import Code, changed_files

LIVES_LONGER = 2
"""So many times the life of an outcome a run is known after its last client renewed it: workers may write one as late
as an outcome's life after that."""

REWARD, ANSWERED_BY = "reward:", "code:"
"""Before a fingerprint, in the hash of a run: its reward; the first code that answered it, and where."""


@dataclass(frozen=True, slots=True)
class KnownReward:
    """A reward of a run, as its clients have told.

    Attributes:
        fingerprints: Its own and, of a rank, that of the reward whose scores it ranks.
    """

    name: str
    model: str
    fingerprints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answerer:
    """The code that answered, and the worker that had it."""

    code: str
    worker: str


class Run:
    """One run in Redis.

    Args:
        redis: The result backend's client.
        ttl_s: How long an outcome lives.
    """

    def __init__(self, redis: Any, run: str, ttl_s: float) -> None:
        self._redis, self._run, self._key = redis, run, keys.run(run)
        self._ttl_ms = round(1000 * LIVES_LONGER * ttl_s)

    def tell(self, config: RewardConfig) -> None:
        """Say which rewards the run has; again before it is forgotten."""
        fields = {
            f"{REWARD}{spec.fingerprint}": _packed(spec)
            for spec in (*config.rewards, *config.eval_rewards)
        }
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(self._key, mapping=fields).pexpire(self._key, self._ttl_ms)
            pipe.execute()

    def rewards(self) -> list[KnownReward]:
        """The rewards of the run, of every start of it."""
        found = self._redis.hgetall(self._key)
        return [
            _unpacked(value)
            for name, value in sorted(found.items())
            if name.startswith(REWARD.encode())
        ]

    def first_answerer(self, fingerprint: str, answerer: Answerer) -> Answerer:
        """The code that was the first to answer a reward of this run, whichever client has seen it; `answerer` if this
        is the first."""
        name = f"{ANSWERED_BY}{fingerprint}"
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hsetnx(
                self._key, name, msgpack.packb([answerer.code, answerer.worker])
            )
            pipe.hget(self._key, name)
            pipe.pexpire(self._key, self._ttl_ms)
            _is_new, found, _ = pipe.execute()
        return Answerer(*msgpack.unpackb(found)) if found else answerer

    def forget_answerers(self, fingerprints: Iterable[str]) -> None:
        """Their outcomes were dropped: whatever answers next is the first."""
        names = [f"{ANSWERED_BY}{one}" for one in fingerprints]
        if names:
            self._redis.hdel(self._key, *names)

    def check_ranks(
        self, launch: str, rank: int, world_size: int, config: RewardConfig, host: str
    ) -> None:
        """Compare the code of this rank's rewards with that of the other ranks that live.

        Raises:
            ConfigError: One has read another source of a class of the same name.
        """
        key, mine = keys.ranks(self._run, launch), _codes_of(config)
        lease = self._redis.get(keys.trainer(self._run, launch, rank)) or b""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(key, str(rank), msgpack.packb([lease, host, mine])).pexpire(
                key, self._ttl_ms
            )
            pipe.hgetall(key)
            pipe.mget(
                [keys.trainer(self._run, launch, one) for one in range(world_size)]
            )
            *_, told, leases = pipe.execute()
        for name, value in sorted(told.items()):
            other = int(name)
            other_lease, other_host, codes = msgpack.unpackb(value)
            is_live = (
                other < world_size
                and leases[other] is not None
                and leases[other] == other_lease
            )
            if other == rank or not is_live:
                continue
            for model in sorted(mine.keys() & codes.keys()):
                files = changed_files(_code(mine[model]), _code(codes[model]))
                if files and mine[model] and codes[model]:
                    raise ConfigError(
                        f"rank {rank} on {host} and rank {other} on {other_host} have different code of {model}: "
                        f"{' and '.join(files)}; their groups would never meet; put the same files on both"
                    )


def _codes_of(config: RewardConfig) -> dict[str, Code]:
    return {
        s.reward_model: s.code
        for s in (*config.rewards, *config.eval_rewards)
        if not s.is_builtin
    }


def _code(listed: Sequence[Sequence[str]]) -> Code:
    return tuple((module, found) for module, found in listed)


def _packed(spec: RewardSpec) -> bytes:
    fingerprints = list(dict.fromkeys((spec.fingerprint, spec.part.fingerprint)))
    packed: bytes = msgpack.packb([spec.name, spec.reward_model, fingerprints])
    return packed


def _unpacked(value: bytes) -> KnownReward:
    name, model, fingerprints = msgpack.unpackb(value)
    return KnownReward(name, model, tuple(fingerprints))
