"""What `collect()` returns: rewards, what is valid, the reasons for the rest, and where the time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.errors import FailureKind

REASONS_SHOWN = 5
"""An error's message names so many failures of a reward; `RewardBatch.failures` has them all."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Why one sample has no reward."""

    sample: int
    """Index in the batch."""
    reward: str
    """Name of the reward."""
    kind: FailureKind
    message: str
    attempts: int
    """How often it was tried, over all submits."""

    def __str__(self) -> str:
        return f"sample {self.sample}: {self.kind}: {self.message}"


@dataclass(frozen=True, slots=True, eq=False)
class RewardBatch:
    """The rewards of `N` samples, in the order of their `submit()`.

    Attributes:
        rewards: By reward name, float32 `(N,)`; NaN where there is no reward.
        valid: By reward name, bool `(N,)`: whether there is a reward. A constant from `on_failure: {value: x}` is
            in `rewards` and not valid.
        failures: Every (sample, reward) without a reward, and why.
        info: By reward name, `N` mappings: what the reward model says beside the reward, and under `origin` where it
            was computed (worker, versions, seconds).
        groups: `N` group ids, as submitted.
        timings: Seconds. `submit_s`: the caller was held in `submit()`; `wait_s`: it waited in `collect()`; `span_s`:
            from the first submit to the last outcome; `hidden_s`: the part of `span_s` not waited for; `encode_s`,
            `store_s`, `send_s`: spent by background threads, summed over them.
        num_hits: By reward name, how many were answered without being sent.
        weights: By reward name, as configured.
        latency_s: By reward name, float32 `(N,)`: seconds from `submit()` to the outcome; NaN where there is none yet.
    """

    rewards: Mapping[str, npt.NDArray[np.float32]]
    valid: Mapping[str, npt.NDArray[np.bool_]]
    failures: tuple[Failed, ...]
    info: Mapping[str, tuple[Mapping[str, Any], ...]]
    groups: tuple[Hashable, ...]
    timings: Mapping[str, float]
    num_hits: Mapping[str, int]
    weights: Mapping[str, float] = field(default_factory=dict)
    latency_s: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def failure_rate(self) -> float:
        """Share of (sample, reward) pairs without a reward, in [0, 1]."""
        num_pairs = len(self) * len(self.rewards)
        return len(self.failures) / num_pairs if num_pairs else 0.0

    def to_torch(self, device: Any = "cpu") -> dict[str, Any]:
        """The rewards as float32 tensors `(N,)` on `device`; NaN where there is none."""
        import torch

        return {name: torch.from_numpy(values.copy()).to(device) for name, values in self.rewards.items()}

    def describe_failures(self) -> str:
        """Every reward with failures: how many of which kind, and the first reasons."""
        lines = []
        for name in self.rewards:
            failures = [f for f in self.failures if f.reward == name]
            if failures:
                kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(f.kind for f in failures).most_common())
                shown = "; ".join(map(str, failures[:REASONS_SHOWN]))
                more = f"; and {len(failures) - REASONS_SHOWN} more" if len(failures) > REASONS_SHOWN else ""
                lines.append(f"reward {name!r}: {len(failures)} of {len(self)} samples ({kinds}): {shown}{more}")
        return "\n".join(lines)
