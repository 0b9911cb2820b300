"""What Redis keeps of a run besides its outcomes: its rewards by fingerprint, and the code that answered each first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from tasks import keys
from tasks.errors import ConfigError
from tasks.rewards import RewardConfig, RewardSpec
from tasks.source.code import Code, changed_files

LIVES_LONGER = 2
"""A run is known for so many times the life of an outcome after its last client renewed it: workers may write an
outcome late, and it lives after that."""

REWARD_FIELD, CODE_FIELD = "reward:", "code:"
"""Fields of a run's hash, each followed by a fingerprint: the reward; the code version that answered it first."""


@dataclass(frozen=True, slots=True)
class RegisteredReward:
    """A reward of a run.

    Attributes:
        fingerprints: Its own; of a ranking, also that of the reward whose scores it ranks.
    """

    name: str
    model: str
    fingerprints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CodeVersion:
    """The code that answered a reward, and the worker that had it."""

    code: str
    worker: str


@dataclass(frozen=True, slots=True)
class _RankCode:
    """What one rank has read of the user's code."""

    lock_holder: bytes
    """The process that wrote this; of a process that is gone it does not count."""
    host: str
    codes: Mapping[str, Sequence[Sequence[str]]]
    """By reward model."""

    def pack(self) -> bytes:
        """As Redis has it."""
        packed: bytes = msgpack.packb([self.lock_holder, self.host, self.codes])
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> _RankCode:
        """From what Redis has."""
        return cls(*msgpack.unpackb(packed))


class RunRegistry:
    """One run in Redis.

    Args:
        redis: The result backend's client.
        ttl_s: How long an outcome lives.
    """

    def __init__(self, redis: Any, run: str, ttl_s: float) -> None:
        self._redis, self._run, self._key = redis, run, keys.run(run)
        self._ttl_ms = round(1000 * LIVES_LONGER * ttl_s)

    def register(self, config: RewardConfig) -> None:
        """Register the rewards of a client; again before the run is forgotten."""
        fields = {}
        for spec in (*config.rewards, *config.eval_rewards):
            fields[f"{REWARD_FIELD}{spec.fingerprint}"] = _pack_reward(spec)
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(self._key, mapping=fields)
            pipe.pexpire(self._key, self._ttl_ms)
            pipe.execute()

    def rewards(self) -> list[RegisteredReward]:
        """The rewards of the run, of every start of it."""
        prefix = REWARD_FIELD.encode()
        found = []
        for name, packed in sorted(self._redis.hgetall(self._key).items()):
            if name.startswith(prefix):
                found.append(_unpack_reward(packed))
        return found

    def first_code_version(self, fingerprint: str, seen: CodeVersion) -> CodeVersion:
        """The code that answered a reward of this run first, for any client; it is `seen` if none was registered."""
        field = f"{CODE_FIELD}{fingerprint}"
        packed = msgpack.packb([seen.code, seen.worker])
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hsetnx(self._key, field, packed)
            pipe.hget(self._key, field)
            pipe.pexpire(self._key, self._ttl_ms)
            _is_new, found, _ = pipe.execute()
        return CodeVersion(*msgpack.unpackb(found)) if found else seen

    def forget_code_versions(self, fingerprints: Iterable[str]) -> None:
        """Forget the code of rewards whose outcomes were dropped: the code that answers next is the first again."""
        fields = [f"{CODE_FIELD}{fingerprint}" for fingerprint in fingerprints]
        if fields:
            self._redis.hdel(self._key, *fields)

    def check_ranks(
        self, launch: str, rank: int, world_size: int, config: RewardConfig, host: str
    ) -> None:
        """Compare the code of this rank's rewards with that of the other live ranks.

        Raises:
            ConfigError: Another rank has read another source of a class of the same name.
        """
        key = keys.ranks(self._run, launch)
        own_lock = keys.trainer(self._run, launch, rank)
        own = _RankCode(self._redis.get(own_lock) or b"", host, _codes_of(config))
        locks = [keys.trainer(self._run, launch, other) for other in range(world_size)]
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(key, str(rank), own.pack())
            pipe.pexpire(key, self._ttl_ms)
            pipe.hgetall(key)
            pipe.mget(locks)
            *_, registered, holders = pipe.execute()

        for field, packed in sorted(registered.items()):
            other, found = int(field), _RankCode.unpack(packed)
            if other == rank or other >= world_size:
                continue
            is_live = holders[other] is not None and holders[other] == found.lock_holder
            if is_live:
                _check_same_code(rank, own, other, found)


def _check_same_code(rank: int, own: _RankCode, other: int, found: _RankCode) -> None:
    for model in sorted(own.codes.keys() & found.codes.keys()):
        own_code, other_code = _code(own.codes[model]), _code(found.codes[model])
        files = changed_files(own_code, other_code)
        if files and own_code and other_code:
            raise ConfigError(
                f"rank {rank} on {own.host} and rank {other} on {found.host} have different code of {model}: "
                f"{' and '.join(files)}; their groups would never meet; put the same files on both"
            )


def _codes_of(config: RewardConfig) -> dict[str, Code]:
    codes = {}
    for spec in (*config.rewards, *config.eval_rewards):
        if not spec.is_builtin:
            codes[spec.reward_model] = spec.code
    return codes


def _code(plain: Sequence[Sequence[str]]) -> Code:
    return tuple((module, digest) for module, digest in plain)


def _pack_reward(spec: RewardSpec) -> bytes:
    fingerprints = list(dict.fromkeys((spec.fingerprint, spec.part.fingerprint)))
    packed: bytes = msgpack.packb([spec.name, spec.reward_model, fingerprints])
    return packed


def _unpack_reward(packed: bytes) -> RegisteredReward:
    name, model, fingerprints = msgpack.unpackb(packed)
    return RegisteredReward(name, model, tuple(fingerprints))
