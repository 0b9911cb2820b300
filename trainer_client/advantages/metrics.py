"""A batch as numbers for a logger, named as Flow-Factory logs them where it has them; failures by group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from tasks.errors import FAILURE_KINDS
from trainer_client.advantages.exchange import (
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
from trainer_client.results import RewardBatch

NAN = float("nan")

Detail = Literal["brief", "full"]

TIMES = ("submit_s", "wait_s", "ranks_s", "span_s", "hidden_s")
"""Of `RewardBatch.timings`, those of the caller; the rest are those of background threads."""

BRIEF_OF_REWARD = ("mean", "std", "zero_std_ratio", "failure_rate")
BRIEF_OF_ALL = (
    "reward_mean",
    "reward_std",
    "reward_zero_std_ratio",
    "failure_rate",
    "wait_s",
    "hidden_s",
    "cache_hits",
    "rescored",
    "adv_abs_mean",
)

GROUP_SPREAD = (
    "group_std_mean",
    "group_std_min",
    "group_std_max",
    "group_mean_std",
    "zero_std_ratio",
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
    num_rescored: Mapping[str, int]
    times: Mapping[str, float]
    advantages: Floats
    has_advantages: bool

    def to_plain(self) -> list[Any]:
        """As it goes to other ranks."""
        return [
            plain_of_ids(self.groups),
            {name: values.tobytes() for name, values in self.rewards.items()},
            {name: values.tobytes() for name, values in self.latency_s.items()},
            [[*which, count] for which, count in self.failures.items()],
            {name: int(hits) for name, hits in self.num_hits.items()},
            {name: int(rescored) for name, rescored in self.num_rescored.items()},
            {name: float(seconds) for name, seconds in self.times.items()},
            self.advantages.tobytes(),
            self.has_advantages,
        ]

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> _Seen:
        """As it comes from other ranks."""
        (
            groups,
            rewards,
            latency_s,
            failures,
            num_hits,
            num_rescored,
            times,
            advantages,
            has_advantages,
        ) = plain
        return cls(
            groups=ids_of(groups),
            rewards={name: floats_of(values) for name, values in rewards.items()},
            latency_s={name: floats_of(values) for name, values in latency_s.items()},
            failures=Counter({(name, kind): count for name, kind, count in failures}),
            num_hits=num_hits,
            num_rescored=num_rescored,
            times=times,
            advantages=floats_of(advantages),
            has_advantages=has_advantages,
        )


@dataclass(frozen=True, slots=True)
class _Failures:
    """How many samples of each group a rank has, and how many without each reward."""

    names: tuple[str, ...]
    sizes: Counter[Hashable]
    failed: Counter[tuple[Hashable, str]]

    def to_plain(self) -> list[Any]:
        """As it goes to other ranks."""
        groups, places = (
            plain_of_ids(self.sizes),
            {group: place for place, group in enumerate(self.sizes)},
        )
        failed = [
            [places[group], name, count] for (group, name), count in self.failed.items()
        ]
        return [list(self.names), groups, list(self.sizes.values()), failed]

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> _Failures:
        """As it comes from other ranks."""
        names, groups, sizes, failed = plain
        found = ids_of(groups)
        return cls(
            names=tuple(names),
            sizes=Counter(dict(zip(found, sizes, strict=True))),
            failed=Counter(
                {(found[place], name): count for place, name, count in failed}
            ),
        )


def metrics(
    batch: RewardBatch,
    advantages: Any = None,
    *,
    prefix: str | None = None,
    detail: Detail = "full",
    gather: Gather | None = None,
) -> dict[str, float]:
    """A flat dict for a logger, with the same keys in each step; NaN where there is no value (the mean of no rewards).

    For each reward, over the samples that have it (a constant from `on_failure` is none), under
    `<prefix>/reward_<name>_`: `mean`, `std`, `min`, `max`; of the standard deviations within groups `group_std_mean`,
    `group_std_min`, `group_std_max`; `group_mean_std`; `zero_std_ratio`, the share of groups whose members do not
    differ; `failure_rate`, `failure_rate_<kind>`, and `failure_rate_group_max`, that of the group that fails most;
    `latency_p50_s`, `latency_p95_s` from `submit()` to the outcome; `cache_hits`, answered from what was there;
    `rescored`, sent more than once (a lost worker or message, an earlier failure).

    The same of the weighted sum under `<prefix>/reward_`, as far as it applies: `mean`, `std`, `group_std_mean`,
    `group_std_max`, `group_mean_std`, `zero_std_ratio`. Of all: `<prefix>/failure_rate`, `cache_hits`, `rescored`;
    where the time went, `submit_s`, `wait_s`, `ranks_s`, `span_s` (of the rank with the most) and `hidden_s` (of that
    with the least), see `RewardBatch.timings`; with `advantages`, `adv_min`, `adv_max`, `adv_abs_mean`.

    Args:
        advantages: `(N,)`, to be logged too; over ranks, where each gives them.
        prefix: The batch's split unless given.
        detail: `brief` leaves four numbers of each reward and nine of all (`BRIEF_OF_REWARD`, `BRIEF_OF_ALL`): with
            five rewards, 29 keys.
        gather: As for `advantages.weighted_sum`: the numbers are those of all ranks. Call it on all of them.

    Raises:
        ValueError: `advantages` has another shape, `detail` is unknown, or ranks have other rewards. With `gather`, on
            all ranks.
    """
    ranks, _ = exchange(_Seen, lambda: _look(batch, advantages, detail), gather)
    seen = _join(ranks)
    groups, num_groups = number(seen.groups)
    found: dict[str, float] = {}
    for name in sorted(seen.rewards):
        of_reward = _of_reward(name, seen, groups, num_groups)
        kept = BRIEF_OF_REWARD if detail == "brief" else tuple(of_reward)
        found |= {f"reward_{name}_{key}": of_reward[key] for key in kept}
    of_all = {
        **{
            f"reward_{key}": value
            for key, value in _weighted(seen, batch.weights, groups, num_groups)
        },
        **_of_all(seen),
    }
    found |= {
        key: value
        for key, value in of_all.items()
        if detail == "full" or key in BRIEF_OF_ALL
    }
    if seen.has_advantages:
        of_advantages = _of_advantages(seen.advantages)
        found |= {
            key: value
            for key, value in of_advantages.items()
            if detail == "full" or key in BRIEF_OF_ALL
        }
    return {f"{prefix or batch.split}/{key}": value for key, value in found.items()}


def failure_rate_by_group(
    batch: RewardBatch, *, gather: Gather | None = None
) -> dict[Hashable, dict[str, float]]:
    """For each group, by reward name, the share of its samples without that reward, in [0, 1].

    Advantages leave such samples out. If one kind of prompt fails again and again, nothing is learned from it, and
    only here is it seen.

    Args:
        gather: As for `metrics`: the groups are those of all ranks.
    """
    ranks, _ = exchange(_Failures, lambda: _failures(batch), gather)
    _check_names([rank.names for rank in ranks])
    sizes, failed = (
        sum((rank.sizes for rank in ranks), Counter()),
        sum((rank.failed for rank in ranks), Counter()),
    )
    return {
        group: {name: failed[group, name] / size for name in batch.rewards}
        for group, size in sizes.items()
    }


def _failures(batch: RewardBatch) -> _Failures:
    groups = ids(batch.groups)
    return _Failures(
        names=tuple(sorted(batch.rewards)),
        sizes=Counter(groups),
        failed=Counter(
            (groups[failure.sample], failure.reward) for failure in batch.failures
        ),
    )


def _check_names(ranks: Sequence[Sequence[str]]) -> None:
    if any(names != ranks[0] for names in ranks):
        raise ValueError(
            f"ranks must have the same rewards, found {[list(names) for names in ranks]}"
        )


def _look(batch: RewardBatch, advantages: Any, detail: str) -> _Seen:
    if detail not in get_args(Detail):
        raise ValueError(f"detail must be 'brief' or 'full', found {detail!r}")
    values = to_float64([] if advantages is None else advantages)
    if advantages is not None and values.shape != (len(batch),):
        raise ValueError(
            f"advantages must have the shape ({len(batch)},), found {values.shape}"
        )
    return _Seen(
        groups=ids(batch.groups),
        rewards={
            n: np.where(batch.valid[n], to_float64(v), np.nan)
            for n, v in batch.rewards.items()
        },
        latency_s={n: to_float64(v) for n, v in batch.latency_s.items()},
        failures=Counter(
            (failure.reward, str(failure.kind)) for failure in batch.failures
        ),
        num_hits=dict(batch.num_hits),
        num_rescored=dict(batch.num_rescored),
        times={name: batch.timings[name] for name in TIMES if name in batch.timings},
        advantages=values,
        has_advantages=advantages is not None,
    )


def _join(ranks: list[_Seen]) -> _Seen:
    _check_names([sorted(rank.rewards) for rank in ranks])
    return _Seen(
        groups=tuple(group for rank in ranks for group in rank.groups),
        rewards={
            n: np.concatenate([rank.rewards[n] for rank in ranks])
            for n in ranks[0].rewards
        },
        latency_s={
            n: np.concatenate(
                [rank.latency_s[n] for rank in ranks if n in rank.latency_s]
            )
            for n in ranks[0].latency_s
        },
        failures=sum((rank.failures for rank in ranks), Counter()),
        num_hits={
            n: sum(rank.num_hits.get(n, 0) for rank in ranks) for n in ranks[0].rewards
        },
        num_rescored={
            n: sum(rank.num_rescored.get(n, 0) for rank in ranks)
            for n in ranks[0].rewards
        },
        times=_join_times([rank.times for rank in ranks]),
        advantages=np.concatenate([rank.advantages for rank in ranks]),
        has_advantages=all(rank.has_advantages for rank in ranks),
    )


def _join_times(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """All ranks wait for the one that waits longest, and it hides least."""
    joined = {}
    for name in TIMES:
        there = [of_rank[name] for of_rank in times if name in of_rank]
        if there:
            joined[name] = min(there) if name == "hidden_s" else max(there)
    return joined


def _of_reward(
    name: str, seen: _Seen, groups: Ints, num_groups: int
) -> dict[str, float]:
    return {
        **_spread(seen.rewards[name]),
        **_group_spread(seen.rewards[name], groups, num_groups),
        **_failure_rates(name, seen, groups, num_groups),
        **_latency(seen.latency_s.get(name)),
        "cache_hits": float(seen.num_hits.get(name, 0)),
        "rescored": float(seen.num_rescored.get(name, 0)),
    }


def _of_all(seen: _Seen) -> dict[str, float]:
    num_pairs = len(seen.groups) * len(seen.rewards)
    return {
        "failure_rate": seen.failures.total() / num_pairs if num_pairs else NAN,
        "cache_hits": float(sum(seen.num_hits.values())),
        "rescored": float(sum(seen.num_rescored.values())),
        **{name: float(seen.times.get(name, NAN)) for name in TIMES},
    }


def _of_advantages(advantages: Floats) -> dict[str, float]:
    if not len(advantages):
        return dict.fromkeys(("adv_min", "adv_max", "adv_abs_mean"), NAN)
    return {
        "adv_min": float(advantages.min()),
        "adv_max": float(advantages.max()),
        "adv_abs_mean": float(np.abs(advantages).mean()),
    }


def _spread(values: Floats) -> dict[str, float]:
    there = values[np.isfinite(values)]
    if not len(there):
        return dict.fromkeys(("mean", "std", "min", "max"), NAN)
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
        return dict.fromkeys(GROUP_SPREAD, NAN)
    counts = np.bincount(groups[votes], minlength=num_groups)
    means = np.bincount(
        groups[votes], weights=values[votes], minlength=num_groups
    ) / np.maximum(counts, 1)
    away = values[votes] - means[groups[votes]]
    stds = np.sqrt(
        np.bincount(groups[votes], weights=away**2, minlength=num_groups)
        / np.maximum(counts, 1)
    )
    means, stds = means[counts > 0], stds[counts > 0]
    return {
        "group_std_mean": float(stds.mean()),
        "group_std_min": float(stds.min()),
        "group_std_max": float(stds.max()),
        "group_mean_std": float(means.std()),
        "zero_std_ratio": float((stds < ZERO_STD).mean()),
    }


def _failure_rates(
    name: str, seen: _Seen, groups: Ints, num_groups: int
) -> dict[str, float]:
    num_samples = len(groups)
    if not num_samples:
        kinds = [f"failure_rate_{kind}" for kind in FAILURE_KINDS]
        return dict.fromkeys(("failure_rate", *kinds, "failure_rate_group_max"), NAN)
    by_kind = {kind: seen.failures[name, kind] / num_samples for kind in FAILURE_KINDS}
    missing = np.bincount(
        groups, weights=np.isnan(seen.rewards[name]), minlength=num_groups
    )
    return {
        "failure_rate": sum(by_kind.values()),
        **{f"failure_rate_{kind}": rate for kind, rate in by_kind.items()},
        "failure_rate_group_max": float(
            (missing / np.bincount(groups, minlength=num_groups)).max()
        ),
    }


def _latency(latency_s: Floats | None) -> dict[str, float]:
    there = latency_s[np.isfinite(latency_s)] if latency_s is not None else np.zeros(0)
    if not len(there):
        return dict.fromkeys(("latency_p50_s", "latency_p95_s"), NAN)
    return {
        "latency_p50_s": float(np.percentile(there, 50)),
        "latency_p95_s": float(np.percentile(there, 95)),
    }


def _weighted(
    seen: _Seen, weights: Mapping[str, float], groups: Ints, num_groups: int
) -> Iterator[tuple[str, float]]:
    """Of the weighted sum, over the samples that have every weighted reward; nothing where weights are unknown."""
    if not seen.rewards or set(weights) != set(seen.rewards):
        return
    totals = np.zeros(len(seen.groups))
    for name, weight in weights.items():
        if weight != 0:
            totals += weight * seen.rewards[name]
    spread, by_group = _spread(totals), _group_spread(totals, groups, num_groups)
    for key in ("mean", "std"):
        yield key, spread[key]
    for key in ("group_std_mean", "group_std_max", "group_mean_std", "zero_std_ratio"):
        yield key, by_group[key]
