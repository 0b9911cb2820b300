"""What a fault did: rewards checked, wrong, lost, begun again, and the time it took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.pipeline.conftest import samples_of
from trainer_client import RewardClient

REWARD = "reward"
"""Name of the one reward in these tests; its model is `tests.delivery.models.<class>`."""


def reward_of(model: str, **options: Any) -> dict[str, Any]:
    """A reward by one of the models that do harm; `version` keeps one launch's answers for the next."""
    return {"reward_model": f"tests.delivery.models.{model}", "name": REWARD, "version": "1", **options}


@dataclass
class Seen:
    """Counts of one fault, summed over its tries.

    Attributes:
        tries: How often the fault was made.
        checked: Rewards compared with the number that their image carries.
        wrong: Rewards of another number.
        lost: Samples that ended without their reward, and should have one.
        again: Samples begun that had been begun before (or questions asked of a judge a second time).
        added_s: For each try, seconds longer than without the fault; empty where that means nothing.
    """

    tries: int = 0
    checked: int = 0
    wrong: int = 0
    lost: int = 0
    again: int = 0
    added_s: list[float] = field(default_factory=list)

    def check(self, batch: Any, numbers: Sequence[int], *, without: Sequence[int] = ()) -> None:
        """Count the rewards of a batch; the numbers in `without` must have none."""
        rewards, valid = batch.rewards[REWARD], batch.valid[REWARD]
        assert len(rewards) == len(numbers)
        for number, reward, is_valid in zip(numbers, rewards, valid, strict=True):
            self.checked += 1
            if number in without:
                self.wrong += bool(is_valid) or not np.isnan(reward)
            elif is_valid:
                self.wrong += bool(reward != np.float32(number))
            else:
                self.lost += 1

    def assert_held(self) -> None:
        """Every reward is there and right."""
        assert (self.wrong, self.lost) == (0, 0), self
        assert self.checked > 0


def step(client: RewardClient, numbers: Sequence[int], seen: Seen, timeout_s: float = 120.0) -> float:
    """Submit, collect and check these numbers; returns the seconds it took."""
    started = time.monotonic()
    client.submit(samples_of(numbers))
    batch = client.collect(timeout_s=timeout_s, on_failure="nan")
    took_s = time.monotonic() - started
    seen.check(batch, numbers)
    return took_s


class Numbers:
    """Numbers for samples that were never used before."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, num: int) -> list[int]:
        self._next += num
        return list(range(self._next - num, self._next))


def undisturbed_s(one_step: Callable[[], float], num_steps: int = 3) -> float:
    """Median seconds of a step without a fault, after one to warm up."""
    one_step()
    return statistics.median(one_step() for _ in range(num_steps))
