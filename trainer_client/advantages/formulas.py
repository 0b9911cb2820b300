"""Advantages from rewards: normalised within the groups of a prompt, masked where there is no reward, exact over ranks.

`weighted_sum` and `gdpo` are functions of arrays; `advantages_of` takes a `RewardBatch`. Both follow Flow-Factory's
formulas and equal its results where every sample has its rewards: standard deviations divide by the number of members
(ddof 0) and are at least `STD_FLOOR`. All sums are in float64.

- A sample without a reward (NaN, infinite, beyond float32, or not `valid`) is masked: it changes no mean and no
  deviation, and its advantage is 0.
- A group with fewer than two members that vote says nothing: zeros.
- A reward that differs within a group by rounding only (`max - min <= RELATIVE_NOISE * max(abs)`) counts as constant
  there; divided by its own deviation, rounding would look like a reward of full size. `noise_floor=False` takes every
  difference at its word, as Flow-Factory does.

Over several ranks, pass `gather`: it takes this rank's object and returns those of all ranks, in the same order on
each. The object is plain data, so that any way of sending it will do. A function that only sums arrays could not do
this work: a group may have members on several ranks, and its id is no number, so that ranks cannot agree on places in
an array. It is called exactly once, also on a rank whose arguments are wrong, and then all ranks raise; so no rank
waits for one that has left. A method of one's own may call it as it likes; it is called once more when that ends.

Group ids are anything hashable on one rank. Several compare them by value, so there they are text, bytes, numbers,
None, or tuples and frozensets of these.

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
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tasks.rewards import RewardSpec
from trainer_client.advantages.exchange import (
    Columns,
    Floats,
    Gather,
    Table,
    exchange,
    exchange_plain,
    ids,
    tabulate,
    to_float64,
)
from trainer_client.results import RewardBatch

STD_FLOOR = 1e-6
"""Standard deviations are at least this, as in Flow-Factory."""

RELATIVE_NOISE = 2.0**-20
"""Eight times the relative spacing of float32, in which rewards travel."""

Advantages = npt.NDArray[np.float32]
_Bools = npt.NDArray[np.bool_]


class Aggregation(Protocol):
    """A method of one's own: called as `weighted_sum` and `gdpo` are, returns `(N,)` finite numbers."""

    def __call__(
        self,
        rewards: Mapping[str, Any],
        groups: Sequence[Hashable],
        weights: Mapping[str, float],
        *,
        gather: Gather | None = None,
    ) -> Any:
        """The advantages of this rank's samples."""


Method = Literal["gdpo", "sum"] | Aggregation

Look = Callable[[int, int], None]
"""Takes how many samples and how many groups there are."""


def weighted_sum(
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

    A sample votes if all its rewards with a weight other than 0 are there.

    Args:
        rewards: By name, `(N,)` numbers: arrays, tensors or lists; NaN or None where there is none.
        groups: `N` group ids, see the module. Samples are compared within a group; None is an id like any other.
        weights: By name, a finite number for each of `rewards`.
        global_std: Divide by the deviation of the sums of all voting samples, else by that of each group.
        valid: By name, `(N,)` booleans: what votes of a reward; every finite one unless given.
        gather: See the module; needed where groups or statistics span ranks.
        noise_floor: Count a reward that differs in a group by rounding only as constant.

    Returns:
        float32 `(N,)`, always finite.

    Raises:
        ValueError: Lengths differ, a weight is missing, unknown or not finite, a group id is not hashable or cannot be
            compared between ranks, or ranks have other rewards or weights. With `gather`, on all ranks.
    """
    return _weighted_sum(
        tabulate(rewards, groups, weights, valid, gather), global_std, noise_floor
    )


def _weighted_sum(table: Table, global_std: bool, noise_floor: bool) -> Advantages:
    votes: _Bools = np.asarray(np.isfinite(table.rewards).all(axis=1))
    deviations, totals = np.zeros(len(table)), np.zeros(len(table))
    for weight, column in zip(table.weights, table.rewards.T, strict=True):
        compared = _compare(column, votes, table, noise_floor)
        deviations += weight * np.where(compared.speaks, compared.deviations, 0.0)
        totals += weight * np.where(votes, column, 0.0)
    if global_std:
        std: Any = _std(totals[votes])
    else:
        num_votes = np.maximum(table.sum_in_groups(votes), 1)
        std = np.maximum(
            np.sqrt(table.sum_in_groups(deviations**2) / num_votes), STD_FLOOR
        )[table.groups]
    return _of_rank(deviations / std, table)


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

    Each reward votes where it is; a sample takes part in the last step if any of its rewards with a weight other than
    0 is there. From GDPO: Group reward-Decoupled Normalization Policy Optimization. Arguments, result and errors are
    those of `weighted_sum`.
    """
    return _gdpo(tabulate(rewards, groups, weights, valid, gather), noise_floor)


def _gdpo(table: Table, noise_floor: bool) -> Advantages:
    combined, speaks = np.zeros(len(table)), np.zeros(len(table), bool)
    for weight, column in zip(table.weights, table.rewards.T, strict=True):
        compared = _compare(column, np.isfinite(column), table, noise_floor)
        combined += weight * np.where(
            compared.speaks, compared.deviations / compared.std, 0.0
        )
        speaks |= compared.speaks
    votes = np.isfinite(table.rewards).any(axis=1)
    mean = float(np.mean(combined[votes])) if votes.any() else 0.0
    return _of_rank(
        np.where(speaks, (combined - mean) / _std(combined[votes]), 0.0), table
    )


def advantages_of(
    batch: RewardBatch,
    weights: Mapping[str, float] | Iterable[RewardSpec] | None = None,
    method: Method = "gdpo",
    *,
    global_std: bool = True,
    gather: Gather | None = None,
    noise_floor: bool = True,
    look: Look = lambda num_samples, num_groups: None,
) -> Advantages:
    """The advantages of a batch, float32 `(N,)` in its order, always finite.

    A sample that failed is masked, unless its reward says `on_failure: {value: x}`: then it votes with `x`, as asked.

    Args:
        weights: By reward name, or the rewards as configured; those of the batch unless given.
        method: `gdpo`, `sum` (`weighted_sum`), or a function called as these: `(rewards, groups, weights, gather=)`.
        global_std: For `sum`.
        gather: As for `weighted_sum`.
        noise_floor: As for `weighted_sum`; a function of one's own does not get it.
        look: Told how many samples and groups there are, over all ranks; of one's own method only on a single rank.

    Raises:
        ValueError: As `weighted_sum`; or the method is unknown; or one's own returns another shape, NaN or infinity.
            What one's own raises by itself: with `gather`, a `ValueError` on all ranks that says what and where.
    """
    chosen = batch.weights if weights is None else weights
    by_name = (
        chosen
        if isinstance(chosen, Mapping)
        else {spec.name: spec.weight for spec in chosen}
    )
    if method == "gdpo" or method == "sum":
        table = tabulate(batch.rewards, batch.groups, by_name, None, gather)
        look(len(table), table.num_groups)
        return (
            _gdpo(table, noise_floor)
            if method == "gdpo"
            else _weighted_sum(table, global_std, noise_floor)
        )
    if not callable(method):
        exchange(Columns, lambda: _refuse(method), gather)
    if gather is None:
        look(len(batch), len(set(ids(batch.groups))))
    return _by_own(method, batch, by_name, gather)


def _refuse(method: Any) -> Columns:
    raise ValueError(
        f"the advantage method must be 'gdpo', 'sum' or a function, found {method!r}"
    )


def _by_own(
    method: Aggregation,
    batch: RewardBatch,
    weights: Mapping[str, float],
    gather: Gather | None,
) -> Advantages:
    if gather is None:
        return _checked(
            method,
            method(batch.rewards, batch.groups, weights, gather=None),
            len(batch),
        )
    rounds = _Rounds(gather)
    found, failed = np.zeros(0, np.float32), None
    try:
        found = _checked(
            method,
            method(batch.rewards, batch.groups, weights, gather=rounds),
            len(batch),
        )
    except Exception as error:  # a function of the user's may raise anything, and the other ranks must hear of it
        failed = error
    rounds.end(failed)
    return found


def _checked(method: Aggregation, values: Any, num_samples: int) -> Advantages:
    found = to_float64(values).astype(np.float32)
    if found.shape != (num_samples,):
        raise ValueError(
            f"{method!r} must return ({num_samples},) advantages, found the shape {found.shape}"
        )
    if not np.isfinite(found).all():
        raise ValueError(
            f"{method!r} returned {int((~np.isfinite(found)).sum())} advantages that are NaN or infinite"
        )
    return found


class _Rounds:
    """The `gather` of a method of one's own. Ranks tell each other in each round whether their call has ended.

    So the first round in which one has, is the last for all: they have all ended well, or all raise.
    """

    def __init__(self, gather: Gather) -> None:
        self._gather = gather
        self._error: Exception | None = None
        """Raised by a round; there is no other after it."""

    def __call__(self, mine: Any) -> list[Any]:
        """What the method gathers."""
        return self._round(lambda: [False, mine])

    def end(self, failed: Exception | None) -> None:
        """The method has returned, or `failed`.

        Raises:
            ValueError: It failed on any rank, or called `gather` more often on one than on another; on all ranks.
        """
        if self._error is not None:
            raise self._error
        self._round(lambda: _ended(failed))

    def _round(self, make: Callable[[], list[Any]]) -> list[Any]:
        try:
            found, _ = exchange_plain(make, self._gather)
            if len({bool(has_ended) for has_ended, _ in found}) > 1:
                raise ValueError(
                    "an advantage method must call gather equally often on all ranks"
                )
        except Exception as error:  # to be raised again even if the method catches it
            self._error = error
            raise
        return [what for _, what in found]


def _ended(failed: Exception | None) -> list[Any]:
    if failed is not None:
        raise failed
    return [True, None]


@dataclass(frozen=True, slots=True)
class _Compared:
    """One reward of each sample against its group, `(N,)` each."""

    deviations: Floats
    std: Floats
    """Of the sample's group, at least `STD_FLOOR`."""
    speaks: _Bools
    """The sample votes, in a group of at least two that do, and they differ by more than rounding."""


def _compare(
    values: Floats, votes: _Bools, table: Table, noise_floor: bool
) -> _Compared:
    num_votes = table.sum_in_groups(votes)
    low, high = np.full(table.num_groups, np.inf), np.full(table.num_groups, -np.inf)
    np.minimum.at(low, table.groups[votes], values[votes])
    np.maximum.at(high, table.groups[votes], values[votes])
    low, high = np.where(num_votes, low, 0.0), np.where(num_votes, high, 0.0)
    above = np.where(
        votes, values - low[table.groups], 0.0
    )  # equal rewards differ from their mean by exactly 0
    means = table.sum_in_groups(above) / np.maximum(num_votes, 1)
    deviations = np.where(votes, above - means[table.groups], 0.0)
    std = np.maximum(
        np.sqrt(table.sum_in_groups(deviations**2) / np.maximum(num_votes, 1)),
        STD_FLOOR,
    )
    speaks = num_votes >= 2
    if noise_floor:
        speaks &= high - low > RELATIVE_NOISE * np.maximum(np.abs(low), np.abs(high))
    return _Compared(deviations, std[table.groups], votes & speaks[table.groups])


def _std(values: Floats) -> float:
    return max(float(np.std(values)), STD_FLOOR) if len(values) else STD_FLOOR


def _of_rank(values: Floats, table: Table) -> Advantages:
    return np.asarray(values[table.mine], dtype=np.float32)
