"""Whether memory stays as it is while samples pass: the rule, and what it says of a run.

Memory is measured from the warm-up's end on: when a fifth of the samples has passed, and the results' TTL twice.
Its growth is that of a straight line through the measures. The limit is `PER_MILLION_MB` for a million samples, beside
`FLOOR_MB` for the allocator and the bytes of `FEW` samples, which may be on their way when memory is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.soak.long_run import RESULT_TTL_S, LongRun, Point

WARM_UP_SHARE = 0.2
WARM_UP_TTLS = 2

PER_MILLION_MB = 10.0
FLOOR_MB = 2.0
FEW = 4

FEWEST_POINTS = 5
"""With fewer points after the warm-up nothing is said."""


@dataclass(frozen=True)
class Growth:
    """How the memory of one process grew.

    Attributes:
        of: The process.
        warm_MB: At the end of the warm-up.
        last_MB: At the end of the run.
        rise_MB: From the one to the other by the line; of Redis without what its keys and payloads take.
        limit_MB: The most that the rise may be.
    """

    of: str
    warm_MB: float  # noqa: N815
    last_MB: float  # noqa: N815
    rise_MB: float  # noqa: N815
    limit_MB: float  # noqa: N815

    @property
    def is_flat(self) -> bool:
        """Whether the rule holds."""
        return self.rise_MB <= self.limit_MB


def growths(run: LongRun) -> list[Growth]:
    """What the rule says of the trainer, each worker and Redis.

    Raises:
        AssertionError: The run was too short for it.
    """
    points = after_warm_up(run)
    assert len(points) >= FEWEST_POINTS, f"{len(points)} points after the warm-up; let more samples pass"
    done = np.array([point.done for point in points], float)
    passed = done[-1] - done[0]
    limit_MB = FLOOR_MB + FEW * run.load.sample_MB + PER_MILLION_MB * passed / 1e6

    found = []
    for name, memory in processes(points).items():
        slope = _slope_of_redis(points) if name == "Redis" else _median_slope(done, memory)
        found.append(Growth(name, float(memory[0]), float(memory[-1]), float(slope * passed), float(limit_MB)))
    return found


def after_warm_up(run: LongRun) -> list[Point]:
    """The points that are measured."""
    first = run.points[0]
    return [
        point
        for point in run.points
        if point.done >= WARM_UP_SHARE * run.load.num_samples and point.at_s - first.at_s >= WARM_UP_TTLS * RESULT_TTL_S
    ]


def processes(points: Sequence[Point]) -> dict[str, np.ndarray]:
    """The memory of each process at the points, in MB."""
    found = {"trainer": np.array([point.trainer_MB for point in points])}
    for number in range(len(points[0].workers_MB)):
        found[f"worker {number + 1}"] = np.array([point.workers_MB[number] for point in points])
    found["Redis"] = np.array([point.redis_MB for point in points])
    return found


def _median_slope(done: np.ndarray, memory: np.ndarray) -> float:
    """MB a sample: the median over all pairs of points (Theil and Sen), which single peaks do not move."""
    i, j = np.triu_indices(len(done), 1)
    return float(np.median((memory[j] - memory[i]) / (done[j] - done[i])))


def _slope_of_redis(points: Sequence[Point]) -> float:
    """MB a sample beside what keys and payloads take: their numbers follow the speed, and none outlives its TTL."""
    constant = np.ones(len(points))
    done = np.array([point.done for point in points], float)
    num_keys = np.array([point.num_keys for point in points], float)
    payload_MB = np.array([point.payload_MB for point in points])
    columns = np.stack([constant, done / 1e6, num_keys / 1e4, payload_MB], axis=1)
    memory = np.array([point.redis_MB for point in points])
    fitted, *_ = np.linalg.lstsq(columns, memory, rcond=None)
    return float(fitted[1]) / 1e6
