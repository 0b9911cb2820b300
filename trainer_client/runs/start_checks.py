"""What is checked when a client starts: its names, its servers, and whether its evaluation can run."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence

from tasks.errors import ConfigError, UnknownRewardError
from tasks.payloads import open_store
from tasks.rewards import RewardConfig
from tasks.servers.needs import check_servers
from tasks.settings import Settings

log = logging.getLogger(__name__)

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,99}")


def check_names(run: str, rank: int, world_size: int) -> None:
    """Raises `ConfigError` unless a run can have this name, and this rank is among so many."""
    if not RUN_NAME.fullmatch(run):
        raise ConfigError(
            f"run must be letters, digits, '.', '_' or '-', at most 100 of them; found {run!r}"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"rank must be in [0, world_size), found rank={rank}, world_size={world_size}"
        )


def check_trainer_servers(settings: Settings, queues: Sequence[str]) -> None:
    """Check every server, and the payload folder where payloads are files.

    Raises:
        RedisUnreachableError: A server does not answer, or refuses what a trainer asks of it.
        EvictionError: A Redis drops keys when it is full.
    """
    check_servers(settings, "trainer", queues)
    if settings.payloads.startswith("file:"):
        with contextlib.closing(open_store(settings)) as store:
            store.check()


def check_rewards(config: RewardConfig) -> None:
    """Check that the rewards are built here. A reward that only evaluation uses does not keep a run from training.

    Raises:
        UnknownRewardError: A training reward is not built here. An evaluation's is told in the log.
    """
    config.of("train")
    try:
        config.of("eval")
    except UnknownRewardError as error:
        log.warning(
            "evaluation cannot run, submit(split='eval') will refuse it: %s", error
        )
