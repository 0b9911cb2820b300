"""What a forked child starts anew: it has none of its parent's threads, and must not touch its connections or locks."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_restarts: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = (
    weakref.WeakKeyDictionary()
)
"""By what is to be started anew. Weak, so that a client that nobody closes can still be collected as garbage."""


def restart_in_children(owner: T, restart: Callable[[T], None]) -> None:
    """Have each forked child call `restart(owner)`, while `owner` is alive and was not forgotten."""
    _restarts[owner] = restart


def forget(owner: object) -> None:
    """Let forked children leave `owner` as it is."""
    _restarts.pop(owner, None)


def _after_fork() -> None:
    for owner, restart in list(_restarts.items()):
        restart(owner)


os.register_at_fork(after_in_child=_after_fork)
