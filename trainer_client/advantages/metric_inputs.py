"""What metrics are computed from: the numbers of one rank's samples as they go to other ranks, and their sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer_client.advantages.arrays import Floats, floats_of_bytes, to_float64
from trainer_client.advantages.group_ids import (
    hashable_ids,
    ids_of_plain,
    ids_to_plain,
)
from trainer_client.results import RewardBatch

TIMES = ("submit_s", "wait_s", "ranks_s", "span_s", "hidden_s")
"""The caller's part of `RewardBatch.timings`; the rest are seconds of background threads."""


@dataclass(frozen=True, slots=True)
class RewardInputs:
    """What the metrics of one reward are computed from, of one rank's samples or of all ranks'."""

    rewards: Floats
    """`(N,)`; NaN where there is none."""
    latency_s: Floats
    """`(N,)`; empty where a batch has none."""
    failures: Counter[str]
    """By kind."""
    num_hits: int
    num_rescored: int

    def to_plain(self) -> list[Any]:
        """As it goes to other ranks."""
        return [
            self.rewards.tobytes(),
            self.latency_s.tobytes(),
            dict(self.failures),
            self.num_hits,
            self.num_rescored,
        ]

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> RewardInputs:
        """As it comes from other ranks."""
        rewards, latency_s, failures, num_hits, num_rescored = plain
        return cls(
            floats_of_bytes(rewards),
            floats_of_bytes(latency_s),
            Counter(failures),
            num_hits,
            num_rescored,
        )

    @classmethod
    def joined(cls, ranks: Sequence[RewardInputs]) -> RewardInputs:
        """Those of all ranks, one rank's samples after another's."""
        rewards, latency_s = [], []
        failures: Counter[str] = Counter()
        num_hits = num_rescored = 0
        for rank in ranks:
            rewards.append(rank.rewards)
            latency_s.append(rank.latency_s)
            failures.update(rank.failures)
            num_hits += rank.num_hits
            num_rescored += rank.num_rescored
        return cls(
            np.concatenate(rewards),
            np.concatenate(latency_s),
            failures,
            num_hits,
            num_rescored,
        )


@dataclass(frozen=True, slots=True)
class MetricInputs:
    """What metrics are computed from, of one rank's samples or of all ranks'."""

    groups: tuple[Hashable, ...]
    rewards: Mapping[str, RewardInputs]
    """By name."""
    times: Mapping[str, float]
    advantages: Floats
    """`(N,)`; empty where a rank gives none."""
    has_advantages: bool

    def to_plain(self) -> list[Any]:
        """As it goes to other ranks."""
        return [
            ids_to_plain(self.groups),
            {name: reward.to_plain() for name, reward in self.rewards.items()},
            dict(self.times),
            self.advantages.tobytes(),
            self.has_advantages,
        ]

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> MetricInputs:
        """As it comes from other ranks."""
        groups, plain_rewards, times, advantages, has_advantages = plain
        rewards = {}
        for name, plain_reward in plain_rewards.items():
            rewards[name] = RewardInputs.of_plain(plain_reward)
        return cls(
            ids_of_plain(groups),
            rewards,
            times,
            floats_of_bytes(advantages),
            has_advantages,
        )


@dataclass(frozen=True, slots=True)
class GroupFailures:
    """How many samples of each group a rank has, and how many of them lack each reward."""

    names: tuple[str, ...]
    """Of the rewards, sorted."""
    sizes: Counter[Hashable]
    """By group."""
    failed: Counter[tuple[Hashable, str]]
    """By group and reward."""

    def to_plain(self) -> list[Any]:
        """As it goes to other ranks; an id goes once, and failures name it by its index."""
        indices = {group: i for i, group in enumerate(self.sizes)}
        failed = []
        for (group, name), count in self.failed.items():
            failed.append([indices[group], name, count])
        sizes = list(self.sizes.values())
        return [list(self.names), ids_to_plain(self.sizes), sizes, failed]

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> GroupFailures:
        """As it comes from other ranks."""
        names, plain_ids, sizes, plain_failed = plain
        groups = ids_of_plain(plain_ids)
        failed: Counter[tuple[Hashable, str]] = Counter()
        for index, name, count in plain_failed:
            failed[groups[index], name] = count
        return cls(
            names=tuple(names),
            sizes=Counter(dict(zip(groups, sizes, strict=True))),
            failed=failed,
        )


def group_failures(batch: RewardBatch) -> GroupFailures:
    """What this rank contributes to the failure rates of groups."""
    groups = hashable_ids(batch.groups)
    failed: Counter[tuple[Hashable, str]] = Counter()
    for failure in batch.failures:
        failed[groups[failure.sample], failure.reward] += 1
    return GroupFailures(tuple(sorted(batch.rewards)), Counter(groups), failed)


def check_names(names_of_ranks: Sequence[Sequence[str]]) -> None:
    """Raises ValueError unless all ranks have rewards of the same names."""
    first = names_of_ranks[0]
    if any(names != first for names in names_of_ranks):
        raise ValueError(
            f"ranks must have the same rewards, found {list(map(list, names_of_ranks))}"
        )


def inputs_of(batch: RewardBatch, advantages: Any) -> MetricInputs:
    """What this rank contributes.

    Raises:
        ValueError: `advantages` has another shape than `(N,)`.
    """
    values = to_float64([] if advantages is None else advantages)
    if advantages is not None and values.shape != (len(batch),):
        raise ValueError(
            f"advantages must have the shape ({len(batch)},), found {values.shape}"
        )
    times = {}
    for name in TIMES:
        if name in batch.timings:
            times[name] = float(batch.timings[name])
    return MetricInputs(
        groups=hashable_ids(batch.groups),
        rewards={name: _reward_inputs(batch, name) for name in batch.rewards},
        times=times,
        advantages=values,
        has_advantages=advantages is not None,
    )


def _reward_inputs(batch: RewardBatch, name: str) -> RewardInputs:
    failures: Counter[str] = Counter()
    for failure in batch.failures:
        if failure.reward == name:
            failures[str(failure.kind)] += 1
    rewards = to_float64(batch.rewards[name])
    return RewardInputs(
        rewards=np.where(batch.valid[name], rewards, np.nan),
        latency_s=to_float64(batch.latency_s.get(name, ())),
        failures=failures,
        num_hits=int(batch.num_hits.get(name, 0)),
        num_rescored=int(batch.num_rescored.get(name, 0)),
    )


def joined_inputs(ranks: Sequence[MetricInputs]) -> MetricInputs:
    """The inputs of all ranks."""
    check_names([sorted(rank.rewards) for rank in ranks])
    groups: list[Hashable] = []
    advantages, times = [], []
    for rank in ranks:
        groups += rank.groups
        advantages.append(rank.advantages)
        times.append(rank.times)
    rewards = {}
    for name in ranks[0].rewards:
        rewards[name] = RewardInputs.joined([rank.rewards[name] for rank in ranks])
    return MetricInputs(
        groups=tuple(groups),
        rewards=rewards,
        times=_joined_times(times),
        advantages=np.concatenate(advantages),
        has_advantages=all(rank.has_advantages for rank in ranks),
    )


def _joined_times(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Times of the rank with the most, but of `hidden_s` the least: all ranks wait for the slowest rank."""
    joined = {}
    for name in TIMES:
        known = [of_rank[name] for of_rank in times if name in of_rank]
        if known:
            joined[name] = min(known) if name == "hidden_s" else max(known)
    return joined
