"""Retries calls while a Redis server is away."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import redis

from tasks.servers.connections import LOST

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
"""The pause between two calls doubles from the first to the longest."""

T = TypeVar("T")


class Clock:
    """The clock of this process. A simulation gives a virtual one."""

    def monotonic(self) -> float:
        """Seconds since a moment that stays the same."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let this thread wait."""
        time.sleep(seconds)


def retry(
    call: Callable[[], T], give_up_s: float, clock: Clock, rng: random.Random
) -> T:
    """Call `call`, again with growing pauses while its server is away, for at most `give_up_s` seconds.

    Only for calls that may run twice: a lost reply does not say whether the server has done the work.

    Raises:
        Exception: What the last call raised once the time is over. An error that waiting does not mend is raised at
            once, such as a server that refuses this user.
    """
    deadline = clock.monotonic() + give_up_s
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return call()
        except redis.AuthenticationError:
            raise
        except LOST:
            if clock.monotonic() + pause_s > deadline:
                raise
        # Workers that lost the same server at once are not to come back to it at once.
        clock.sleep(pause_s * rng.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
