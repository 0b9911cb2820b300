"""How a start of the job is named: the launch, which all ranks of one start have in common."""

from __future__ import annotations

import os
import uuid

from tasks.errors import ConfigError

UNNAMED = "none"
"""TORCHELASTIC_RUN_ID of every job that torchrun was given no name for: no two starts must share it."""


def launch_name(world_size: int) -> str:
    """The launch of a client that was given none: torchrun's name and restart count, else a new name on one rank.

    Raises:
        ConfigError: Several ranks have no name in common.
    """
    elastic = os.environ.get("TORCHELASTIC_RUN_ID")
    if elastic and elastic != UNNAMED:
        return f"{elastic}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if world_size == 1:
        return uuid.uuid4().hex[:12]

    why = ""
    if elastic:
        why = f"; torchrun calls every start {UNNAMED!r} unless it is given --rdzv-id or --standalone"
    raise ConfigError(
        f"with world_size > 1 give launch=, one text for this start of the job, the same on all ranks{why}"
    )
