"""The samples of all ranks as one batch: groups as numbers, rewards as columns, NaN where a reward does not vote."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer_client.advantages.arrays import (
    Floats,
    Ints,
    floats_of_bytes,
    to_float64,
)
from trainer_client.advantages.exchange import Gather, exchange
from trainer_client.advantages.group_ids import (
    hashable_ids,
    ids_of_plain,
    ids_to_plain,
    number_groups,
)

LARGEST = float(np.finfo(np.float32).max)
"""Rewards travel as float32; a larger number counts as infinite."""


@dataclass(frozen=True, slots=True)
class LocalBatch:
    """The samples of one rank; rewards with a weight of 0 are left out."""

    names: tuple[str, ...]
    """Of the `K` rewards, sorted."""
    weights: tuple[float, ...]
    groups: tuple[Hashable, ...]
    rewards: Floats
    """`(N, K)`."""

    def to_plain(self) -> list[Any]:
        """As it goes to other ranks."""
        return [
            list(self.names),
            list(self.weights),
            ids_to_plain(self.groups),
            self.rewards.tobytes(),
        ]

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> LocalBatch:
        """As it comes from other ranks."""
        names, weights, groups, rewards = plain
        values = floats_of_bytes(rewards).reshape(len(groups), len(names))
        return cls(tuple(names), tuple(weights), ids_of_plain(groups), values)


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The samples of all ranks."""

    weights: tuple[float, ...]
    rewards: Floats
    """`(N, K)`."""
    groups: Ints
    """`(N,)`, in `range(num_groups)`."""
    num_groups: int
    own: slice
    """The samples of this rank."""

    def __len__(self) -> int:
        return len(self.groups)

    def sum_in_groups(self, values: Any) -> Floats:
        """`(num_groups,)` sums of `(N,)` values."""
        return np.asarray(
            np.bincount(self.groups, weights=values, minlength=self.num_groups),
            dtype=np.float64,
        )


def gather_batch(
    rewards: Mapping[str, Any],
    groups: Sequence[Hashable],
    weights: Mapping[str, float],
    valid: Mapping[str, Any] | None,
    gather: Gather | None,
) -> GlobalBatch:
    """The samples of all ranks; arguments and errors are those of `formulas.weighted_sum`."""
    batches, own_index = exchange(
        LocalBatch, lambda: _local_batch(rewards, groups, weights, valid), gather
    )
    _check_same_rewards(batches)

    ids: list[Hashable] = []
    for batch in batches:
        ids += batch.groups
    group_numbers, num_groups = number_groups(ids)

    start = sum(len(batch.groups) for batch in batches[:own_index])
    return GlobalBatch(
        weights=batches[0].weights,
        rewards=np.concatenate([batch.rewards for batch in batches]),
        groups=group_numbers,
        num_groups=num_groups,
        own=slice(start, start + len(batches[own_index].groups)),
    )


def _check_same_rewards(batches: Sequence[LocalBatch]) -> None:
    first = batches[0]
    for batch in batches:
        if (batch.names, batch.weights) != (first.names, first.weights):
            raise ValueError(
                "ranks must have the same rewards and weights, found "
                f"{dict(zip(first.names, first.weights, strict=True))} and "
                f"{dict(zip(batch.names, batch.weights, strict=True))}"
            )


def _local_batch(
    rewards: Mapping[str, Any],
    groups: Sequence[Hashable],
    weights: Mapping[str, float],
    valid: Mapping[str, Any] | None,
) -> LocalBatch:
    ids = hashable_ids(groups)
    _check_weights(rewards, weights)
    masks = valid or {}
    unknown = sorted(set(masks) - set(rewards))
    if unknown:
        raise ValueError(
            f"valid has {', '.join(unknown)}, rewards are {', '.join(sorted(rewards))}"
        )

    names = [name for name in sorted(weights) if weights[name] != 0]
    columns = np.full((len(ids), len(names)), np.nan)
    for k, name in enumerate(names):
        columns[:, k] = _votes(name, rewards[name], masks.get(name), len(ids))
    return LocalBatch(
        names=tuple(names),
        weights=tuple(float(weights[name]) for name in names),
        groups=ids,
        rewards=columns,
    )


def _check_weights(rewards: Mapping[str, Any], weights: Mapping[str, float]) -> None:
    if set(rewards) != set(weights):
        raise ValueError(
            f"each reward needs its weight: rewards are {', '.join(sorted(rewards)) or 'none'}, "
            f"weights are for {', '.join(sorted(weights)) or 'none'}"
        )
    for name, weight in weights.items():
        is_finite = abs(weight) <= LARGEST  # False for NaN
        if not is_finite:
            raise ValueError(
                f"the weight of {name!r} must be a finite number, found {weight}"
            )


def _votes(name: str, values: Any, valid: Any, num_samples: int) -> Floats:
    """One reward as `(N,)`, NaN where it does not vote."""
    column = to_float64(values)
    if column.shape != (num_samples,):
        raise ValueError(
            f"the reward {name!r} must have the shape ({num_samples},), found {column.shape}"
        )

    votes = np.abs(column) <= LARGEST  # False for NaN
    if valid is not None:
        mask = np.asarray(valid.detach().cpu() if hasattr(valid, "detach") else valid)
        # An empty list has no dtype of its own: numpy makes float64 of it.
        is_bool = mask.dtype == np.bool_ or not mask.size
        if mask.shape != column.shape or not is_bool:
            raise ValueError(
                f"valid[{name!r}] must be bool ({num_samples},), found {mask.dtype} {mask.shape}"
            )
        votes &= mask.astype(bool)
    return np.where(votes, column, np.nan)
