"""Advantages from rewards: normalised within the groups of a prompt, masked where there is no reward, exact over ranks.

`weighted_sum` and `gdpo` are functions of arrays; `advantages_of` takes a `RewardBatch`. Both follow Flow-Factory's
formulas and equal its results where every sample has its rewards: standard deviations divide by the number of members
(ddof 0) and are at least `STD_FLOOR`. All sums are in float64.

- A sample without a reward (NaN, infinite, beyond float32, or not `valid`) is masked: it changes no mean and no
  deviation, and its advantage is 0.
- A group with fewer than two members that vote says nothing: its advantages are 0.
- A reward that differs within a group by rounding only (`max - min <= RELATIVE_NOISE * max(abs)`) counts as constant
  there. Divided by its own deviation, rounding would look like a reward of full size. `noise_floor=False` counts every
  difference, as Flow-Factory does.

Over several ranks, pass `gather`: it takes this rank's object and returns the objects of all ranks, in the same order
on each. The object is plain data, so that any way of sending it will do. A function that only sums arrays is not
enough: a group may have members on several ranks, and its id is not a number, so ranks cannot agree on an index for it.
`gather` is called exactly once, also on a rank whose arguments are wrong, and then all ranks raise; so no rank waits
for a rank that has left. A method of your own may call `gather` as often as it likes; it is called once more when the
method ends.

On one rank a group id is any hashable object. Several ranks compare ids by value, so there an id is text, bytes, a
number, None, or a tuple or frozenset of these.

    def gather(mine):                                    # torch.distributed
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        return everyone

    def gather(mine):                                    # accelerate
        return accelerate.utils.gather_object([mine])
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tasks.rewards import RewardSpec
from trainer_client.advantages.arrays import Bools, Floats
from trainer_client.advantages.custom_method import Aggregation, apply_custom
from trainer_client.advantages.exchange import Gather, exchange
from trainer_client.advantages.global_batch import (
    GlobalBatch,
    LocalBatch,
    gather_batch,
)
from trainer_client.advantages.group_ids import hashable_ids
from trainer_client.results import RewardBatch

STD_FLOOR = 1e-6
"""Standard deviations are at least this, as in Flow-Factory."""

RELATIVE_NOISE = 2.0**-20
"""Eight times the relative spacing of float32, in which rewards travel."""

Advantages = npt.NDArray[np.float32]

Method = Literal["gdpo", "sum"] | Aggregation

OnCounts = Callable[[int, int], None]
"""Takes the number of samples and the number of groups."""


def weighted_sum(  # noqa: PLR0913  (public API)
    rewards: Mapping[str, Any],
    groups: Sequence[Hashable],
    weights: Mapping[str, float],
    *,
    global_std: bool = True,
    valid: Mapping[str, Any] | None = None,
    gather: Gather | None = None,
    noise_floor: bool = True,
) -> Advantages:
    """The weighted sum of a sample's rewards, minus its group's mean, over a standard deviation.

    A sample votes if it has all its rewards with a weight other than 0.

    Args:
        rewards: By name, `(N,)` numbers: arrays, tensors or lists; NaN or None where there is no reward.
        groups: `N` group ids, see the module. Samples are compared within a group; None is an id like any other.
        weights: By name, a finite number for each of `rewards`.
        global_std: Divide by the deviation of the sums of all voting samples, else by the deviation within each group.
        valid: By name, `(N,)` booleans: which samples vote for a reward; unless given, every sample whose reward is
            finite.
        gather: See the module; needed where groups or statistics span ranks.
        noise_floor: Count a reward that differs in a group by rounding only as constant.

    Returns:
        float32 `(N,)`, always finite.

    Raises:
        ValueError: Lengths differ, a weight is missing, unknown or not finite, a group id is not hashable or cannot be
            compared between ranks, or ranks have other rewards or weights. With `gather`, on all ranks.
    """
    batch = gather_batch(rewards, groups, weights, valid, gather)
    return _weighted_sum(batch, global_std, noise_floor)


def _weighted_sum(
    batch: GlobalBatch, global_std: bool, noise_floor: bool
) -> Advantages:
    votes: Bools = np.asarray(np.isfinite(batch.rewards).all(axis=1))
    deviations, totals = np.zeros(len(batch)), np.zeros(len(batch))
    for weight, column in zip(batch.weights, batch.rewards.T, strict=True):
        compared = _compare(column, votes, batch, noise_floor)
        deviations += weight * np.where(compared.differs, compared.deviations, 0.0)
        totals += weight * np.where(votes, column, 0.0)

    if global_std:
        return _of_rank(deviations / _std(totals[votes]), batch)

    num_votes = np.maximum(batch.sum_in_groups(votes), 1)
    group_std = np.sqrt(batch.sum_in_groups(deviations**2) / num_votes)
    return _of_rank(deviations / np.maximum(group_std, STD_FLOOR)[batch.groups], batch)


def gdpo(
    rewards: Mapping[str, Any],
    groups: Sequence[Hashable],
    weights: Mapping[str, float],
    *,
    valid: Mapping[str, Any] | None = None,
    gather: Gather | None = None,
    noise_floor: bool = True,
) -> Advantages:
    """Each reward normalised in its group, times its weight, summed, then normalised over the batch.

    A sample votes for each reward that it has. It takes part in the last step if it has any of its rewards with a
    weight other than 0. From GDPO: Group reward-Decoupled Normalization Policy Optimization. Arguments, result and
    errors are those of `weighted_sum`.
    """
    batch = gather_batch(rewards, groups, weights, valid, gather)
    return _gdpo(batch, noise_floor)


def _gdpo(batch: GlobalBatch, noise_floor: bool) -> Advantages:
    combined, differs = np.zeros(len(batch)), np.zeros(len(batch), bool)
    for weight, column in zip(batch.weights, batch.rewards.T, strict=True):
        compared = _compare(column, np.isfinite(column), batch, noise_floor)
        normalised = compared.deviations / compared.std
        combined += weight * np.where(compared.differs, normalised, 0.0)
        differs |= compared.differs

    voting = combined[np.isfinite(batch.rewards).any(axis=1)]
    mean = float(np.mean(voting)) if len(voting) else 0.0
    return _of_rank(np.where(differs, (combined - mean) / _std(voting), 0.0), batch)


def advantages_of(  # noqa: PLR0913  (public API)
    batch: RewardBatch,
    weights: Mapping[str, float] | Iterable[RewardSpec] | None = None,
    method: Method = "gdpo",
    *,
    global_std: bool = True,
    gather: Gather | None = None,
    noise_floor: bool = True,
    on_counts: OnCounts = lambda num_samples, num_groups: None,
) -> Advantages:
    """The advantages of a batch, float32 `(N,)` in its order, always finite.

    A sample that failed is masked, unless its reward says `on_failure: {value: x}`: then the sample votes with `x`, as
    asked.

    Args:
        weights: By reward name, or the rewards as configured; those of the batch unless given.
        method: `gdpo`, `sum` (`weighted_sum`), or a function called as these: `(rewards, groups, weights, gather=)`.
        global_std: For `sum`.
        gather: As for `weighted_sum`.
        noise_floor: As for `weighted_sum`; a function of your own does not get it.
        on_counts: Called with the number of samples and of groups, over all ranks; for a function of your own only
            on a single rank, since what such a function gathers is unknown.

    Raises:
        ValueError: As `weighted_sum`; or the method is unknown; or a function of your own returns another shape, NaN
            or infinity. With `gather`, any error of such a function becomes a `ValueError` on all ranks, which says
            what was raised and where.
    """
    by_name = _weights_by_name(batch.weights if weights is None else weights)
    if method == "gdpo" or method == "sum":
        everyone = gather_batch(batch.rewards, batch.groups, by_name, None, gather)
        on_counts(len(everyone), everyone.num_groups)
        if method == "gdpo":
            return _gdpo(everyone, noise_floor)
        return _weighted_sum(everyone, global_std, noise_floor)

    if not callable(method):
        # Through an exchange, since other ranks may know their method and gather.
        exchange(LocalBatch, lambda: _refuse(method), gather)
    if gather is None:
        on_counts(len(batch), len(set(hashable_ids(batch.groups))))
    return apply_custom(method, batch, by_name, gather)


def _weights_by_name(
    weights: Mapping[str, float] | Iterable[RewardSpec],
) -> Mapping[str, float]:
    if isinstance(weights, Mapping):
        return weights
    return {spec.name: spec.weight for spec in weights}


def _refuse(method: Any) -> LocalBatch:
    raise ValueError(
        f"the advantage method must be 'gdpo', 'sum' or a function, found {method!r}"
    )


@dataclass(frozen=True, slots=True)
class _Compared:
    """One reward of each sample against its group, `(N,)` each."""

    deviations: Floats
    std: Floats
    """Of the sample's group, at least `STD_FLOOR`."""
    differs: Bools
    """Whether the sample votes in a group of at least two voting members whose rewards differ (with a noise floor: by
    more than rounding)."""


def _compare(
    values: Floats, votes: Bools, batch: GlobalBatch, noise_floor: bool
) -> _Compared:
    num_votes = batch.sum_in_groups(votes)
    divisors = np.maximum(num_votes, 1)
    low, high = _extremes(values, votes, num_votes > 0, batch)

    # Measured from the group's lowest, so that equal rewards differ from their mean by exactly 0.
    above = np.where(votes, values - low[batch.groups], 0.0)
    means = batch.sum_in_groups(above) / divisors
    deviations = np.where(votes, above - means[batch.groups], 0.0)
    std = np.sqrt(batch.sum_in_groups(deviations**2) / divisors)

    differs = num_votes >= 2
    if noise_floor:
        largest = np.maximum(np.abs(low), np.abs(high))
        differs &= high - low > RELATIVE_NOISE * largest
    return _Compared(
        deviations=deviations,
        std=np.maximum(std, STD_FLOOR)[batch.groups],
        differs=votes & differs[batch.groups],
    )


def _extremes(
    values: Floats, votes: Bools, has_votes: Bools, batch: GlobalBatch
) -> tuple[Floats, Floats]:
    """The lowest and the highest value of each group's votes, `(num_groups,)` each; 0 where nobody votes."""
    low = np.full(batch.num_groups, np.inf)
    high = np.full(batch.num_groups, -np.inf)
    np.minimum.at(low, batch.groups[votes], values[votes])
    np.maximum.at(high, batch.groups[votes], values[votes])
    return np.where(has_votes, low, 0.0), np.where(has_votes, high, 0.0)


def _std(values: Floats) -> float:
    return max(float(np.std(values)), STD_FLOOR) if len(values) else STD_FLOOR


def _of_rank(values: Floats, batch: GlobalBatch) -> Advantages:
    """This rank's part of `(N,)` values."""
    return np.asarray(values[batch.own], dtype=np.float32)
