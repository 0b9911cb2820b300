"""A batch as numbers for a logger, named as Flow-Factory logs them where it has them; failures by group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.errors import FAILURE_KINDS
from trainer_client.results import RewardBatch
from trainer_client.table import (
    Floats,
    Gather,
    Ints,
    exchange,
    floats_of,
    ids,
    ids_of,
    number,
    plain_of_ids,
    to_float64,
)

ZERO_STD = 1e-6
"""A group whose standard deviation is below this counts as having none, as in Flow-Factory."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one rank has to tell."""

    groups: tuple[Hashable, ...]
    rewards: Mapping[str, Floats]
    """By name, `(N,)`; NaN where there is none."""
    latency_s: Mapping[str, Floats]
    failures: Counter[tuple[str, str]]
    """By reward and kind."""
    num_hits: Mapping[str, int]
    advantages: Floats

    def to_plain(self) -> list[Any]:
        """As it goes to other ranks."""
        return [
            plain_of_ids(self.groups),
            {name: values.tobytes() for name, values in self.rewards.items()},
            {name: values.tobytes() for name, values in self.latency_s.items()},
            [[*which, count] for which, count in self.failures.items()],
            {name: int(hits) for name, hits in self.num_hits.items()},
            self.advantages.tobytes(),
        ]

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> _Seen:
        """As it comes from other ranks."""
        groups, rewards, latency_s, failures, num_hits, advantages = plain
        return cls(
            groups=ids_of(groups),
            rewards={name: floats_of(values) for name, values in rewards.items()},
            latency_s={name: floats_of(values) for name, values in latency_s.items()},
            failures=Counter({(name, kind): count for name, kind, count in failures}),
            num_hits=num_hits,
            advantages=floats_of(advantages),
        )


@dataclass(frozen=True, slots=True)
class _Failures:
    """How many samples of each group a rank has, and how many without each reward."""

    names: tuple[str, ...]
    sizes: Counter[Hashable]
    failed: Counter[tuple[Hashable, str]]

    def to_plain(self) -> list[Any]:
        """As it goes to other ranks."""
        groups, places = plain_of_ids(self.sizes), {group: place for place, group in enumerate(self.sizes)}
        failed = [[places[group], name, count] for (group, name), count in self.failed.items()]
        return [list(self.names), groups, list(self.sizes.values()), failed]

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> _Failures:
        """As it comes from other ranks."""
        names, groups, sizes, failed = plain
        found = ids_of(groups)
        return cls(
            names=tuple(names),
            sizes=Counter(dict(zip(found, sizes, strict=True))),
            failed=Counter({(found[place], name): count for place, name, count in failed}),
        )


def metrics(
    batch: RewardBatch, advantages: Any = None, *, prefix: str | None = None, gather: Gather | None = None
) -> dict[str, float]:
    """A flat dict for a logger. What has no value (the mean of no rewards) has no key.

    For each reward, over the samples that have it (a constant from `on_failure` is none), under
    `<prefix>/reward_<name>_`: `mean`, `std`, `min`, `max`; of the standard deviations within groups `group_std_mean`,
    `group_std_min`, `group_std_max`; `group_mean_std`; `zero_std_ratio`, the share of groups whose members do not
    differ; `failure_rate`, `failure_rate_<kind>`, and `failure_rate_group_max`, that of the group that fails most;
    `latency_p50_s`, `latency_p95_s` from `submit()` to the outcome; `cache_hits`, answered without being sent.

    The same of the weighted sum under `<prefix>/reward_`, as far as it applies: `mean`, `std`, `group_std_mean`,
    `group_std_max`, `group_mean_std`, `zero_std_ratio`. Of all: `<prefix>/failure_rate`, `<prefix>/adv_min`, `adv_max`,
    `adv_abs_mean`.

    Args:
        advantages: `(N,)`, to be logged too.
        prefix: The batch's split unless given.
        gather: As for `advantages.weighted_sum`: the numbers are those of all ranks. Call it on all of them.

    Raises:
        ValueError: `advantages` has another shape, or ranks have other rewards. With `gather`, on all ranks.
    """
    ranks, _ = exchange(_Seen, lambda: _look(batch, advantages), gather)
    seen = _join(ranks)
    groups, num_groups = number(seen.groups)
    found: dict[str, float] = {}
    for name in sorted(seen.rewards):
        of_reward = {
            **_spread(seen.rewards[name]),
            **_group_spread(seen.rewards[name], groups, num_groups),
            **_failure_rates(name, seen, groups, num_groups),
            **_latency(seen.latency_s.get(name)),
            "cache_hits": float(seen.num_hits.get(name, 0)),
        }
        found |= {f"reward_{name}_{key}": value for key, value in of_reward.items()}
    found |= {f"reward_{key}": value for key, value in _weighted(seen, batch.weights, groups, num_groups)}
    num_pairs = len(seen.groups) * len(seen.rewards)
    if num_pairs:
        found["failure_rate"] = seen.failures.total() / num_pairs
    if len(seen.advantages):
        found["adv_min"], found["adv_max"] = float(seen.advantages.min()), float(seen.advantages.max())
        found["adv_abs_mean"] = float(np.abs(seen.advantages).mean())
    return {f"{prefix or batch.split}/{key}": value for key, value in found.items()}


def failure_rate_by_group(batch: RewardBatch, *, gather: Gather | None = None) -> dict[Hashable, dict[str, float]]:
    """For each group, by reward name, the share of its samples without that reward, in [0, 1].

    Advantages leave such samples out. If one kind of prompt fails again and again, nothing is learned from it, and
    only here is it seen.

    Args:
        gather: As for `metrics`: the groups are those of all ranks.
    """
    ranks, _ = exchange(_Failures, lambda: _failures(batch), gather)
    _check_names([rank.names for rank in ranks])
    sizes, failed = sum((rank.sizes for rank in ranks), Counter()), sum((rank.failed for rank in ranks), Counter())
    return {group: {name: failed[group, name] / size for name in batch.rewards} for group, size in sizes.items()}


def _failures(batch: RewardBatch) -> _Failures:
    groups = ids(batch.groups)
    return _Failures(
        names=tuple(sorted(batch.rewards)),
        sizes=Counter(groups),
        failed=Counter((groups[failure.sample], failure.reward) for failure in batch.failures),
    )


def _check_names(ranks: Sequence[Sequence[str]]) -> None:
    if any(names != ranks[0] for names in ranks):
        raise ValueError(f"ranks must have the same rewards, found {[list(names) for names in ranks]}")


def _look(batch: RewardBatch, advantages: Any) -> _Seen:
    values = to_float64([] if advantages is None else advantages)
    if advantages is not None and values.shape != (len(batch),):
        raise ValueError(f"advantages must have the shape ({len(batch)},), found {values.shape}")
    return _Seen(
        groups=ids(batch.groups),
        rewards={n: np.where(batch.valid[n], to_float64(v), np.nan) for n, v in batch.rewards.items()},
        latency_s={n: to_float64(v) for n, v in batch.latency_s.items()},
        failures=Counter((failure.reward, str(failure.kind)) for failure in batch.failures),
        num_hits=dict(batch.num_hits),
        advantages=values,
    )


def _join(ranks: list[_Seen]) -> _Seen:
    _check_names([sorted(rank.rewards) for rank in ranks])
    return _Seen(
        groups=tuple(group for rank in ranks for group in rank.groups),
        rewards={n: np.concatenate([rank.rewards[n] for rank in ranks]) for n in ranks[0].rewards},
        latency_s={
            n: np.concatenate([rank.latency_s[n] for rank in ranks if n in rank.latency_s]) for n in ranks[0].latency_s
        },
        failures=sum((rank.failures for rank in ranks), Counter()),
        num_hits={n: sum(rank.num_hits.get(n, 0) for rank in ranks) for n in ranks[0].rewards},
        advantages=np.concatenate([rank.advantages for rank in ranks]),
    )


def _spread(values: Floats) -> dict[str, float]:
    there = values[np.isfinite(values)]
    if not len(there):
        return {}
    return {
        "mean": float(there.mean()),
        "std": float(there.std()),
        "min": float(there.min()),
        "max": float(there.max()),
    }


def _group_spread(values: Floats, groups: Ints, num_groups: int) -> dict[str, float]:
    """Of the groups with at least one reward."""
    votes = np.isfinite(values)
    if not votes.any():
        return {}
    counts = np.bincount(groups[votes], minlength=num_groups)
    means = np.bincount(groups[votes], weights=values[votes], minlength=num_groups) / np.maximum(counts, 1)
    away = values[votes] - means[groups[votes]]
    stds = np.sqrt(np.bincount(groups[votes], weights=away**2, minlength=num_groups) / np.maximum(counts, 1))
    means, stds = means[counts > 0], stds[counts > 0]
    return {
        "group_std_mean": float(stds.mean()),
        "group_std_min": float(stds.min()),
        "group_std_max": float(stds.max()),
        "group_mean_std": float(means.std()),
        "zero_std_ratio": float((stds < ZERO_STD).mean()),
    }


def _failure_rates(name: str, seen: _Seen, groups: Ints, num_groups: int) -> dict[str, float]:
    num_samples = len(groups)
    if not num_samples:
        return {}
    by_kind = {kind: seen.failures[name, kind] / num_samples for kind in FAILURE_KINDS}
    missing = np.bincount(groups, weights=np.isnan(seen.rewards[name]), minlength=num_groups)
    return {
        "failure_rate": sum(by_kind.values()),
        **{f"failure_rate_{kind}": rate for kind, rate in by_kind.items()},
        "failure_rate_group_max": float((missing / np.bincount(groups, minlength=num_groups)).max()),
    }


def _latency(latency_s: Floats | None) -> dict[str, float]:
    there = latency_s[np.isfinite(latency_s)] if latency_s is not None else np.zeros(0)
    if not len(there):
        return {}
    return {"latency_p50_s": float(np.percentile(there, 50)), "latency_p95_s": float(np.percentile(there, 95))}


def _weighted(seen: _Seen, weights: Mapping[str, float], groups: Ints, num_groups: int) -> Iterator[tuple[str, float]]:
    """Of the weighted sum, over the samples that have every weighted reward; nothing where weights are unknown."""
    if not seen.rewards or set(weights) != set(seen.rewards):
        return
    totals = np.zeros(len(seen.groups))
    for name, weight in weights.items():
        if weight != 0:
            totals += weight * seen.rewards[name]
    spread, by_group = _spread(totals), _group_spread(totals, groups, num_groups)
    for key in ("mean", "std"):
        if key in spread:
            yield key, spread[key]
    for key in ("group_std_mean", "group_std_max", "group_mean_std", "zero_std_ratio"):
        if key in by_group:
            yield key, by_group[key]
