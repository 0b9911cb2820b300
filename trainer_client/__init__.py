"""The trainer's side: submit samples while sampling, collect their rewards when the step is finalized."""

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

from tasks.errors import (
    CollectTimeoutError,
    ConfigError,
    InvalidSampleError,
    RedisRefusalError,
    RedisUnreachableError,
    RewardError,
    ScoringError,
    TicketError,
)
from tasks.samples import Sample
from trainer_client.client import RewardClient
from trainer_client.failure_reasons import Failed
from trainer_client.results import RewardBatch
from trainer_client.ticket import Ticket

__all__ = [
    "CollectTimeoutError",
    "ConfigError",
    "Failed",
    "InvalidSampleError",
    "RedisRefusalError",
    "RedisUnreachableError",
    "RewardBatch",
    "RewardClient",
    "RewardError",
    "Sample",
    "ScoringError",
    "Ticket",
    "TicketError",
]
