"""A batch as numbers for a logger, named as Flow-Factory logs them where it has them; failures by group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from tasks.errors import FAILURE_KINDS
from trainer_client.advantages.arrays import Floats, Ints
from trainer_client.advantages.exchange import Gather, exchange
from trainer_client.advantages.group_ids import number_groups
from trainer_client.advantages.metric_inputs import (
    TIMES,
    GroupFailures,
    MetricInputs,
    RewardInputs,
    check_names,
    group_failures,
    inputs_of,
    joined_inputs,
)
from trainer_client.results import RewardBatch

NAN = float("nan")

Detail = Literal["brief", "full"]

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

WEIGHTED_SPREAD = ("mean", "std")
WEIGHTED_GROUP_SPREAD = (
    "group_std_mean",
    "group_std_max",
    "group_mean_std",
    "zero_std_ratio",
)
"""What is logged of the weighted sum."""

GROUP_SPREAD = (
    "group_std_mean",
    "group_std_min",
    "group_std_max",
    "group_mean_std",
    "zero_std_ratio",
)

ZERO_STD = 1e-6
"""A group whose standard deviation is below this counts as having none, as in Flow-Factory."""


def metrics(
    batch: RewardBatch,
    advantages: Any = None,
    *,
    prefix: str | None = None,
    detail: Detail = "full",
    gather: Gather | None = None,
) -> dict[str, float]:
    """A flat dict for a logger, with the same keys in each step; NaN where there is no value (the mean of no rewards).

    For each reward, under `<prefix>/reward_<name>_`, over the samples that have it (a constant from `on_failure` is
    not counted):

    - `mean`, `std`, `min`, `max`;
    - `group_std_mean`, `group_std_min`, `group_std_max`: of the standard deviations within groups;
    - `group_mean_std`: the standard deviation of the groups' means;
    - `zero_std_ratio`: the share of groups whose members do not differ;
    - `failure_rate`, `failure_rate_<kind>`, and `failure_rate_group_max`, the rate of the group that fails most;
    - `latency_p50_s`, `latency_p95_s`: from `submit()` to the outcome;
    - `cache_hits`: samples whose outcome was there already, and that were not sent;
    - `rescored`: samples that were sent more than once (a lost worker or message, an earlier failure).

    For the weighted sum, under `<prefix>/reward_`: `mean`, `std`, `group_std_mean`, `group_std_max`, `group_mean_std`,
    `zero_std_ratio`.

    For the whole batch, under `<prefix>/`: `failure_rate`, `cache_hits`, `rescored`; where the time went, `submit_s`,
    `wait_s`, `ranks_s`, `span_s` (of the rank with the most) and `hidden_s` (of the rank with the least), see
    `RewardBatch.timings`; with `advantages`, `adv_min`, `adv_max`, `adv_abs_mean`.

    Args:
        advantages: `(N,)`, to be logged too; over ranks, only if every rank gives them.
        prefix: The batch's split unless given.
        detail: `brief` leaves four numbers of each reward and nine of all (`BRIEF_OF_REWARD`, `BRIEF_OF_ALL`): with
            five rewards, 29 keys.
        gather: As for `advantages.weighted_sum`: the numbers are those of all ranks. Call `metrics` on all of them.

    Raises:
        ValueError: `advantages` has another shape, `detail` is unknown, or ranks have other rewards. With `gather`, on
            all ranks.
    """
    # The arguments are checked inside the exchange, so that a wrong argument on one rank is raised on all.
    ranks, _ = exchange(
        MetricInputs, lambda: _checked_inputs(batch, advantages, detail), gather
    )
    inputs = joined_inputs(ranks)
    groups, num_groups = number_groups(inputs.groups)

    found: dict[str, float] = {}
    for name in sorted(inputs.rewards):
        of_reward = _of_reward(inputs.rewards[name], groups, num_groups)
        kept = BRIEF_OF_REWARD if detail == "brief" else tuple(of_reward)
        for key in kept:
            found[f"reward_{name}_{key}"] = of_reward[key]

    of_all = {
        **_of_weighted_sum(inputs, batch.weights, groups, num_groups),
        **_of_all(inputs),
    }
    if inputs.has_advantages:
        of_all |= _of_advantages(inputs.advantages)
    for key, value in of_all.items():
        if detail == "full" or key in BRIEF_OF_ALL:
            found[key] = value

    return {f"{prefix or batch.split}/{key}": value for key, value in found.items()}


def failure_rate_by_group(
    batch: RewardBatch, *, gather: Gather | None = None
) -> dict[Hashable, dict[str, float]]:
    """For each group, by reward name, the share of its samples without that reward, in [0, 1].

    Advantages leave such samples out. If one kind of prompt fails again and again, nothing is learned from it, and
    no other number shows it.

    Args:
        gather: As for `metrics`: the groups are those of all ranks.
    """
    ranks, _ = exchange(GroupFailures, lambda: group_failures(batch), gather)
    check_names([rank.names for rank in ranks])
    sizes: Counter[Hashable] = Counter()
    failed: Counter[tuple[Hashable, str]] = Counter()
    for rank in ranks:
        sizes.update(rank.sizes)
        failed.update(rank.failed)

    rates: dict[Hashable, dict[str, float]] = {}
    for group, size in sizes.items():
        rates[group] = {name: failed[group, name] / size for name in batch.rewards}
    return rates


def _checked_inputs(batch: RewardBatch, advantages: Any, detail: str) -> MetricInputs:
    if detail not in get_args(Detail):
        raise ValueError(f"detail must be 'brief' or 'full', found {detail!r}")
    return inputs_of(batch, advantages)


def _of_reward(reward: RewardInputs, groups: Ints, num_groups: int) -> dict[str, float]:
    return {
        **_spread(reward.rewards),
        **_group_spread(reward.rewards, groups, num_groups),
        **_failure_rates(reward, groups, num_groups),
        **_latency(reward.latency_s),
        "cache_hits": float(reward.num_hits),
        "rescored": float(reward.num_rescored),
    }


def _of_all(inputs: MetricInputs) -> dict[str, float]:
    num_failed = num_hits = num_rescored = 0
    for reward in inputs.rewards.values():
        num_failed += reward.failures.total()
        num_hits += reward.num_hits
        num_rescored += reward.num_rescored
    num_pairs = len(inputs.groups) * len(inputs.rewards)
    return {
        "failure_rate": num_failed / num_pairs if num_pairs else NAN,
        "cache_hits": float(num_hits),
        "rescored": float(num_rescored),
        **{name: inputs.times.get(name, NAN) for name in TIMES},
    }


def _of_advantages(advantages: Floats) -> dict[str, float]:
    if not len(advantages):
        return dict.fromkeys(("adv_min", "adv_max", "adv_abs_mean"), NAN)
    return {
        "adv_min": float(advantages.min()),
        "adv_max": float(advantages.max()),
        "adv_abs_mean": float(np.abs(advantages).mean()),
    }


def _of_weighted_sum(
    inputs: MetricInputs, weights: Mapping[str, float], groups: Ints, num_groups: int
) -> dict[str, float]:
    """Over the samples that have every reward with a weight other than 0; nothing where weights are unknown."""
    if not inputs.rewards or set(weights) != set(inputs.rewards):
        return {}
    totals = np.zeros(len(inputs.groups))
    for name, weight in weights.items():
        if weight != 0:
            totals += weight * inputs.rewards[name].rewards

    found = {}
    spread = _spread(totals)
    for key in WEIGHTED_SPREAD:
        found[f"reward_{key}"] = spread[key]
    group_spread = _group_spread(totals, groups, num_groups)
    for key in WEIGHTED_GROUP_SPREAD:
        found[f"reward_{key}"] = group_spread[key]
    return found


def _spread(values: Floats) -> dict[str, float]:
    known = values[np.isfinite(values)]
    if not len(known):
        return dict.fromkeys(("mean", "std", "min", "max"), NAN)
    return {
        "mean": float(known.mean()),
        "std": float(known.std()),
        "min": float(known.min()),
        "max": float(known.max()),
    }


def _group_spread(values: Floats, groups: Ints, num_groups: int) -> dict[str, float]:
    """Over the groups with at least one reward."""
    votes = np.isfinite(values)
    if not votes.any():
        return dict.fromkeys(GROUP_SPREAD, NAN)
    values, groups = values[votes], groups[votes]

    counts = np.bincount(groups, minlength=num_groups)
    divisors = np.maximum(counts, 1)
    means = np.bincount(groups, weights=values, minlength=num_groups) / divisors
    squares = (values - means[groups]) ** 2
    stds = np.sqrt(
        np.bincount(groups, weights=squares, minlength=num_groups) / divisors
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
    reward: RewardInputs, groups: Ints, num_groups: int
) -> dict[str, float]:
    num_samples = len(groups)
    found = {"failure_rate": NAN}
    for kind in FAILURE_KINDS:
        rate = reward.failures[kind] / num_samples if num_samples else NAN
        found[f"failure_rate_{kind}"] = rate
    found["failure_rate_group_max"] = NAN
    if not num_samples:
        return found

    missing = np.bincount(
        groups, weights=np.isnan(reward.rewards), minlength=num_groups
    )
    sizes = np.bincount(groups, minlength=num_groups)
    found["failure_rate"] = reward.failures.total() / num_samples
    found["failure_rate_group_max"] = float((missing / sizes).max())
    return found


def _latency(latency_s: Floats) -> dict[str, float]:
    known = latency_s[np.isfinite(latency_s)]
    if not len(known):
        return dict.fromkeys(("latency_p50_s", "latency_p95_s"), NAN)
    return {
        "latency_p50_s": float(np.percentile(known, 50)),
        "latency_p95_s": float(np.percentile(known, 95)),
    }
