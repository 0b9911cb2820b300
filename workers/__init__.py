"""The scoring side: reward models, and what loads and runs them in a Celery worker.

Write a reward model of your own from what is exported here; see the README.
"""

from pathlib import Path

import tasks

if (
    Path(getattr(tasks, "__file__", None) or "").resolve().parent
    != Path(__file__).resolve().parents[1] / "tasks"
):
    raise ImportError(
        f"the module `tasks` imported here is {getattr(tasks, '__file__', tasks)}, not rewardq's package at "
        f"{Path(__file__).parents[1] / 'tasks'}; rename that file, or start from another directory"
    )

from workers import telemetry
from workers.base import (
    Accelerator,
    GroupwiseRewardModel,
    PointwiseRewardModel,
    RewardArguments,
    RewardModel,
    RewardModelOutput,
    Unscored,
)

telemetry.turn_off()  # before any reward model imports what it is made of

__all__ = [
    "Accelerator",
    "GroupwiseRewardModel",
    "PointwiseRewardModel",
    "RewardArguments",
    "RewardModel",
    "RewardModelOutput",
    "Unscored",
]
