"""Which queue a reward's messages go to: what the config says, else what the catalog or the user's class names."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from tasks.catalog.entry import GPU, ModelEntry
from tasks.errors import ConfigError
from tasks.source.declared import Declared
from tasks.source.modules import why_not_read

log = logging.getLogger(__name__)


def queue_of_builtin(builtin: ModelEntry, keys: Mapping[str, Any]) -> Any:
    """The queue of a built-in, not checked yet.

    Args:
        keys: Our keys of the entry.
    """
    return keys.get("queue", builtin.queue)


def queue_of_own_class(
    path: str, keys: Mapping[str, Any], declared: Declared | None, where: str
) -> Any:
    """The queue of a class of the user's, not checked yet.

    Args:
        path: The dotted path of the class, or a name that means nothing here, which has no source.
        keys: Our keys of the entry.
        declared: What the class declares; None where its source is not here.
        where: The entry, for errors.

    Raises:
        ConfigError: Only a run of the class's module could tell the queue, and the config does not say it.
    """
    if "queue" in keys:
        return keys["queue"]
    return _named_by_class(path, declared, where) if "." in path else GPU


# --- private -------------------------------------------------------------------------------------


def _named_by_class(path: str, declared: Declared | None, where: str) -> str:
    """The queue that a class names, or the usual one."""
    if declared is None:
        _say_queue_is_assumed(path, why_not_read(path.rpartition(".")[0]))
        return GPU
    if not declared.unread_queue:
        return declared.queue or GPU
    if declared.is_queue_assigned:
        raise ConfigError(
            f"{where}: {path} names a queue in a way that cannot be read without running its module "
            f"({declared.unread_queue}); say it in the config too, queue: its_name"
        )
    _say_queue_is_assumed(path, declared.unread_queue)
    return GPU


@functools.cache
def _say_queue_is_assumed(path: str, why: str) -> None:
    log.warning(
        "%s is sent to the queue %s: whether it names another cannot be read (%s); say it in the config, queue: %s",
        path, GPU, why, GPU,
    )  # fmt: skip
