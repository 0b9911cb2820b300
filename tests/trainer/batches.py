"""Batches of rewards for tests of advantages: their formulas in plain Python, strategies, simulated ranks."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import strategies as st

from trainer_client.advantages.formulas import gdpo, weighted_sum
from trainer_client.failure_reasons import Failed
from trainer_client.results import RewardBatch

NAN = math.nan
Numbers = Sequence[float]
METHODS: list[Callable[..., Any]] = [
    weighted_sum,
    lambda *args, **kwargs: weighted_sum(*args, global_std=False, **kwargs),
    gdpo,
]
IDS = ["sum", "sum by group", "gdpo"]
every_method = pytest.mark.parametrize("method", METHODS, ids=IDS)


def mean_of(values: Numbers) -> float:
    return float(sum(Fraction(v) for v in values) / len(values))


def std_of(values: Numbers) -> float:
    mean = mean_of(values)
    return max(math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)), 1e-6)


def members_of(groups: Sequence[Hashable]) -> list[list[int]]:
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    return list(members.values())


def expected_sum(
    rewards: Mapping[str, Numbers], groups: Sequence[Hashable], weights: Mapping[str, float], global_std: bool = True
) -> list[float]:
    """By the formula; a sample with a NaN is masked."""
    totals = [math.fsum(weights[name] * values[i] for name, values in rewards.items()) for i in range(len(groups))]
    result = [0.0] * len(groups)
    voting = [total for total in totals if not math.isnan(total)]
    for members in members_of(groups):
        there = [i for i in members if not math.isnan(totals[i])]
        if len(there) >= 2:
            mean = mean_of([totals[i] for i in there])
            std = std_of(voting if global_std else [totals[i] for i in there])
            for i in there:
                result[i] = (totals[i] - mean) / std
    return result


def expected_gdpo(
    rewards: Mapping[str, Numbers], groups: Sequence[Hashable], weights: Mapping[str, float]
) -> list[float]:
    """By the formula; a NaN is no vote."""
    sums = [0.0] * len(groups)
    compared = [False] * len(groups)
    for name, values in rewards.items():
        for members in members_of(groups):
            there = [i for i in members if not math.isnan(values[i])]
            if len(there) >= 2:
                mean, std = mean_of([values[i] for i in there]), std_of([values[i] for i in there])
                for i in there:
                    sums[i] += weights[name] * (values[i] - mean) / std
                    compared[i] = True
    voting = [sums[i] for i in range(len(groups)) if any(not math.isnan(v[i]) for v in rewards.values())]
    if not voting:
        return [0.0] * len(groups)
    mean, std = mean_of(voting), std_of(voting)
    return [(sums[i] - mean) / std if compared[i] else 0.0 for i in range(len(groups))]


@st.composite
def batches(draw: st.DrawFn, max_missing: float = 0.5) -> tuple[dict[str, Any], list[Hashable], dict[str, float]]:
    """Rewards with some NaN, groups of 1 to 9 in any order, and weights.

    Rewards differ by nothing or by far more than rounding.
    """
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    groups: list[Hashable] = [g for g, size in enumerate(sizes) for _ in range(size)]
    rng.shuffle(groups)
    rewards, weights = {}, {}
    for k in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["normal", "binary", "constant", "by group"]))
        center, scale = draw(st.sampled_from([0.0, 0.5, -20.0])), draw(st.sampled_from([2**-6, 1.0, 32.0]))
        values = {
            "normal": center + scale * np.round(64 * rng.normal(size=len(groups))) / 64,
            "binary": rng.integers(0, 2, len(groups)).astype(float),
            "constant": np.full(len(groups), center + 0.1),
            "by group": center + 0.3 * np.array(groups, float),
        }[kind]
        values[rng.random(len(groups)) < draw(st.floats(0, max_missing))] = np.nan
        rewards[f"reward {k}"] = values
        weights[f"reward {k}"] = draw(st.sampled_from([1.0, 0.5, -2.0, 3.25]))
    return rewards, groups, weights


whole_batches = batches(max_missing=0.0)


class Ranks:
    """Simulated ranks, one thread each; what they exchange goes as msgpack, as it would through Redis."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.calls: list[int] = []
        self._barrier = threading.Barrier(num_ranks)
        self._brought: list[Any] = [None] * num_ranks

    def gather_for(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(mine: Any) -> list[Any]:
            self.calls.append(rank)
            self._brought[rank] = msgpack.packb(mine)
            self._barrier.wait(10)
            everyone = [msgpack.unpackb(one) for one in self._brought]
            self._barrier.wait(10)
            return everyone

        return gather

    def run(self, on_rank: Callable[[int, Any], Any]) -> list[Any]:
        """What each rank returned or raised."""

        def run(rank: int) -> Any:
            try:
                return on_rank(rank, self.gather_for(rank))
            except ValueError as error:
                return error

        with ThreadPoolExecutor(self.num_ranks) as pool:
            return list(pool.map(run, range(self.num_ranks)))


def batch_of(
    rewards: dict[str, list[float]],
    groups: list[Any],
    failures: tuple[Failed, ...] = (),
    weights: dict[str, float] | None = None,
    **more: Any,
) -> RewardBatch:
    arrays = {name: np.array(values, np.float32) for name, values in rewards.items()}
    return RewardBatch(
        rewards=arrays,
        valid={name: np.isfinite(values) for name, values in arrays.items()},
        failures=failures,
        info={},
        groups=tuple(groups),
        timings={},
        num_hits=more.pop("num_hits", {}),
        weights=weights or {},
        **more,
    )
