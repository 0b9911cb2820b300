"""Ends a worker that a Redis will not serve (any more): waiting would not mend a missing right or a dropped key."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence

from celery.worker import state as worker_state

from tasks.errors import EvictionError, RedisRefusalError
from tasks.servers.connections import LOST
from tasks.servers.needs import ask
from tasks.servers.refusals import may_be_for_good, servers_of
from tasks.settings import Settings

log = logging.getLogger(__name__)

ASK_EVERY_S = 5.0
"""How often at most servers are asked again for what was refused."""


def check_servers(settings: Settings, queues: Sequence[str]) -> None:
    """Ask every Redis server for all that a worker for `queues` needs.

    Raises:
        EvictionError: A server drops keys.
        RedisRefusalError: A server will not serve us.
        OSError, redis.RedisError: One of `LOST`: a server is away.
    """
    for server in servers_of(settings):
        ask(server, settings.sentinels, "worker", queues)


def refuse_early(settings: Settings, queues: Sequence[str]) -> None:
    """End the process before it loads models for minutes, if a Redis refuses it. For one that is away it waits later.

    Raises:
        SystemExit: With EX_CONFIG, if a Redis drops keys or will not serve us; the log says why.
    """
    try:
        check_servers(settings, queues)
    except (EvictionError, RedisRefusalError) as error:
        log.critical("worker refuses to start: %s", error)
        raise SystemExit(os.EX_CONFIG) from None
    except LOST:
        return


class RedisRefusals:
    """Ends the worker once, whichever of its threads is refused first. Safe between threads.

    The words of a refusal say little (`The user executing the script can't run this command`). So the servers are asked
    again for all that we need of them, and say which right is missing.
    """

    def __init__(self, settings: Settings, queues: Sequence[str]) -> None:
        self._settings, self._queues = settings, queues
        self._lock = threading.RLock()
        self._ask_from_s = 0.0
        self._why = ""
        """Why the worker ends; empty while it does not."""

    def refusal(self, error: BaseException) -> str:
        """Why this process ends, if `error` says that a server will not serve it any more; else empty."""
        if not may_be_for_good(error):
            return ""
        with self._lock:
            if not self._why and time.monotonic() >= self._ask_from_s:
                why = self._ask()
                self._ask_from_s = time.monotonic() + ASK_EVERY_S
                if why:
                    self.end(why)
            return self._why

    def end(self, why: str, has_served: bool = True) -> None:
        """Take no further task, and end; tasks in hand, which can write no outcome any more, have their grace."""
        with self._lock:
            if self._why:
                return
            self._why = why
        event = "ends" if has_served else "refuses to start"
        log.critical("worker %s: %s", event, why)
        if worker_state.should_stop in (None, False):
            worker_state.should_stop = os.EX_CONFIG
        at_last = threading.Timer(self._settings.stop_grace_s, os._exit, [os.EX_CONFIG])
        at_last.daemon = True
        at_last.start()

    def _ask(self) -> str:
        try:
            check_servers(self._settings, self._queues)
        except (EvictionError, RedisRefusalError) as error:
            return str(error)
        except LOST:
            return ""
        return ""
