"""A reward model that does nothing, so that only the way to it and back is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from workers import PointwiseRewardModel, RewardModelOutput


class NullReward(PointwiseRewardModel):
    """1.0 for every image; its info has the time of the call, on the machine's monotonic clock."""

    required_fields = ("prompt", "image")

    def __call__(self, prompt: Sequence[str], **kwargs: Any) -> RewardModelOutput:
        """Rewards of `N` images."""
        return RewardModelOutput([1.0] * len(prompt), {"called_at": time.monotonic()})
