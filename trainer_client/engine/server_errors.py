"""Which errors are a server's: it is away, full, or refuses. All others are of what was asked of it."""

from __future__ import annotations

import errno

import redis
from kombu.exceptions import BatchPublishError, OperationalError

from tasks.servers.connections import LOST

AWAY: tuple[type[Exception], ...] = (*LOST, OperationalError, BatchPublishError)
"""A server that is away or full: wait and try again."""

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def has_no_room(error: BaseException) -> bool:
    """Whether the disk, or the memory, of the payload folder is full."""
    return isinstance(error, OSError) and error.errno in _FULL_DISK


def is_of_server(error: BaseException) -> bool:
    """Whether a server raised it, so that it says nothing of what was to be stored there."""
    return isinstance(error, (*AWAY, redis.RedisError)) or has_no_room(error)
