"""Ends a worker whose model hangs: its samples time out, healthy tasks finish, the process exits for its supervisor."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from celery.worker import state as worker_state

from tasks.messages import SampleRequest
from workers.base import this_call

log = logging.getLogger(__name__)

EXIT_HUNG = 75
"""Exit status of a worker that ended since a model hung, its GPU was lost to it, or its code is outdated (EX_TEMPFAIL:
start it again)."""

GRACE_S = 30.0
"""How long healthy tasks may take to finish before the process ends; what is left goes back to the queue."""

LOOK_EVERY_S = 0.5

IDLE_LOOKS = 2
"""No healthy call at so many looks: whatever is still claimed waits for what hangs."""


class Call:
    """A call of a model with these samples (or this group) that may take `timeout_s`."""

    def __init__(self, samples: Sequence[SampleRequest], timeout_s: float) -> None:
        self.samples = samples
        self.timeout_s = timeout_s
        self.restart()

    def pause(self, *, waits: bool = False) -> None:
        """From now on its time does not count; `waits` says that another thread holds it up."""
        self.deadline, self.waits = float("inf"), waits

    def restart(self) -> None:
        """It computes from now on."""
        self.deadline, self.waits = time.monotonic() + self.timeout_s, False


class Watchdog(threading.Thread):
    """Watches the calls of models, which cannot be cancelled.

    Args:
        time_out: Writes the outcome `timeout` for samples, with this message.
        num_busy: How many samples of this process are claimed and unanswered.
        hand_back: Gives back what is left, as at a clean shutdown.
    """

    def __init__(
        self,
        time_out: Callable[[Sequence[SampleRequest], str], None],
        num_busy: Callable[[], int],
        hand_back: Callable[[], None],
    ) -> None:
        super().__init__(name="rewardq-watchdog", daemon=True)
        self._time_out, self._num_busy, self._hand_back = time_out, num_busy, hand_back
        self._lock = threading.Lock()
        self._calls: set[Call] = set()

    @contextlib.contextmanager
    def calling(
        self, samples: Sequence[SampleRequest], timeout_s: float
    ) -> Iterator[None]:
        """This thread calls a model with these samples; it may take `timeout_s` for each."""
        group = getattr(this_call, "group", None)
        call = this_call.clock = Call(
            samples if group is None else [group], timeout_s * len(samples)
        )
        with self._lock:
            self._calls.add(call)
        try:
            yield
        finally:
            this_call.clock = None
            with self._lock:
                self._calls.discard(call)

    def run(self) -> None:
        """Look until a call is late; then end the process."""
        while True:
            time.sleep(LOOK_EVERY_S)
            late = self._late()
            if late:
                self._end_process(late)

    def _late(self) -> list[Call]:
        now = time.monotonic()
        with self._lock:
            return [call for call in self._calls if call.deadline < now]

    def _healthy(self) -> list[Call]:
        """Calls that are in time and wait for no other."""
        now = time.monotonic()
        with self._lock:
            return [
                call for call in self._calls if call.deadline >= now and not call.waits
            ]

    def _end_process(self, late: Sequence[Call]) -> None:
        try:
            worker_state.should_stop = os.EX_OK  # no further task is taken
            for call in late:
                log.error(
                    "model hangs num_samples=%d timeout_s=%g",
                    len(call.samples),
                    call.timeout_s,
                )
                self._time_out(
                    call.samples,
                    f"the model's call did not return within {call.timeout_s:g} s (timeout_s for each of its samples); "
                    "its worker was ended",
                )
            ends_at, num_idle_looks = time.monotonic() + GRACE_S, 0
            while (
                self._num_busy()
                and num_idle_looks < IDLE_LOOKS
                and time.monotonic() < ends_at
            ):
                time.sleep(LOOK_EVERY_S)
                num_idle_looks = 0 if self._healthy() else num_idle_looks + 1
            self._hand_back()
        finally:
            log.error("worker ends status=%d", EXIT_HUNG)
            os._exit(EXIT_HUNG)
