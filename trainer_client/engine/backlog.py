"""The backlog: samples accepted and not yet sent. `submit()` waits while it is long, `flush()` while there is one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from tasks.errors import CollectTimeoutError
from trainer_client.engine.loop import SAY_EVERY_S, Loop
from trainer_client.engine.why_late import because

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.25
"""How often a wait looks at the clock and whether the loop is alive, and shows how far it is."""


class Backlog:
    """Counts what callers have handed over, and waits for it. Safe between threads.

    Args:
        why_unsent: Says what keeps samples from being sent; may ask Redis.
    """

    def __init__(self, loop: Loop, why_unsent: Callable[[], str | None]) -> None:
        self._loop, self._why_unsent = loop, why_unsent
        self._counting = threading.Lock()
        self._num_submitted = 0

    def count(self, num_samples: int) -> None:
        """So many samples are about to be put into the loop's inbox: they count from now on."""
        with self._counting:
            self._num_submitted += num_samples

    @property
    def num_unsent(self) -> int:
        """Samples that were accepted and are not in a message yet."""
        with self._loop.lock:
            state = self._loop.state
            num_in_inbox = self._num_submitted - state.intake.num_submitted
            return num_in_inbox + state.num_unsent

    def wait_for_room(self, max_backlog: int, timeout_s: float) -> None:
        """Wait while the backlog is longer than `max_backlog` samples.

        Raises:
            CollectTimeoutError: It still was after `timeout_s`; says what sending waits for.
        """
        if self._is_down_to(max_backlog, 0.0):
            return
        now = time.monotonic()
        ends_at, say_at = now + timeout_s, now + SAY_EVERY_S
        with self._loop.waiting():
            while True:
                pause_s = min(say_at, ends_at) - time.monotonic()
                if self._is_down_to(max_backlog, pause_s):
                    return
                ending = because(self._why_unsent())
                if time.monotonic() >= ends_at:
                    raise CollectTimeoutError(
                        f"nothing was queued: {self.num_unsent} samples submitted before, more than "
                        f"REWARDQ_MAX_BACKLOG={max_backlog}, were not sent within {timeout_s:g} s{ending}",
                        None,
                    )
                log.warning("submit waits num_unsent=%d%s", self.num_unsent, ending)
                say_at += SAY_EVERY_S

    def flush(self, timeout_s: float) -> None:
        """Wait until nothing is unsent. Raises `CollectTimeoutError`."""
        with self._loop.waiting():
            is_sent = self._is_down_to(0, timeout_s)
        if not is_sent:
            raise CollectTimeoutError(
                f"{self.num_unsent} samples were not sent within {timeout_s:g} s{because(self._why_unsent())}",
                None,
            )

    def _is_down_to(self, num_samples: int, timeout_s: float) -> bool:
        """Whether at most so many samples are unsent, within `timeout_s`."""
        ends_at = time.monotonic() + timeout_s
        while True:
            left_s = min(LOOK_EVERY_S, ends_at - time.monotonic())
            is_below = self._loop.wait_for(
                lambda: self.num_unsent <= num_samples, left_s
            )
            self._loop.raise_if_broken()
            if is_below or time.monotonic() >= ends_at:
                return is_below
