"""Ends a worker whose model hangs: its samples time out, healthy tasks finish, the process exits for its supervisor.

A thread that is in a call of a model cannot be cancelled, and would hold one of the worker's few slots for good.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from celery.worker import state as worker_state

from tasks.messages import SampleRequest
from workers.deadline import Deadline, set_for_call

log = logging.getLogger(__name__)

EXIT_HUNG = 75
"""Exit status of a worker that ended since a model hung, its GPU was lost to it, or its code is outdated (EX_TEMPFAIL:
start it again)."""

GRACE_S = 30.0
"""How long healthy tasks may take to finish before the process ends; what is left goes back to the queue."""

LOOK_EVERY_S = 0.5

IDLE_LOOKS = 2
"""After so many looks without a healthy call, whatever is still claimed waits for the call that hangs."""


@dataclass(frozen=True, slots=True, eq=False)
class WatchedCall:
    """A call of a model that the watchdog watches."""

    samples: Sequence[SampleRequest]
    """Who gets the reason if the call is late."""
    deadline: Deadline


class Watchdog(threading.Thread):
    """Watches the calls of models, which cannot be cancelled.

    Args:
        time_out: Writes the outcome `timeout` for samples, with this message.
        num_claimed: How many samples of this process are claimed and unanswered.
        release_claims: Gives back what is left, as at a clean shutdown.
    """

    def __init__(
        self,
        time_out: Callable[[Sequence[SampleRequest], str], None],
        num_claimed: Callable[[], int],
        release_claims: Callable[[], None],
    ) -> None:
        super().__init__(name="rewardq-watchdog", daemon=True)
        self._time_out = time_out
        self._num_claimed = num_claimed
        self._release_claims = release_claims
        self._lock = threading.Lock()
        self._calls: set[WatchedCall] = set()

    @contextlib.contextmanager
    def watch(
        self, samples: Sequence[SampleRequest], timeout_s: float
    ) -> Iterator[None]:
        """Within, this thread calls a model for these samples, which may take `timeout_s` in all."""
        deadline = Deadline(timeout_s)
        call = WatchedCall(samples, deadline)
        with self._lock:
            self._calls.add(call)
        try:
            with set_for_call(deadline):
                yield
        finally:
            with self._lock:
                self._calls.discard(call)

    def run(self) -> None:
        """Look until a call is late; then end the process."""
        while True:
            time.sleep(LOOK_EVERY_S)
            late = self._late()
            if late:
                self._end_process(late)

    def _late(self) -> list[WatchedCall]:
        now_s = time.monotonic()
        with self._lock:
            return [call for call in self._calls if call.deadline.is_late(now_s)]

    def _has_healthy(self) -> bool:
        """Whether a call is in time and does not wait for another one's model."""
        now_s = time.monotonic()
        with self._lock:
            for call in self._calls:
                deadline = call.deadline
                if not deadline.is_late(now_s) and not deadline.waits_for_model:
                    return True
        return False

    def _end_process(self, late: Sequence[WatchedCall]) -> None:
        try:
            worker_state.should_stop = os.EX_OK  # no further task is taken
            for call in late:
                self._write_reason(call)
            self._wait_for_healthy()
            self._release_claims()
        finally:
            log.error("worker ends status=%d", EXIT_HUNG)
            os._exit(EXIT_HUNG)

    def _write_reason(self, call: WatchedCall) -> None:
        timeout_s = call.deadline.timeout_s
        log.error(
            "model hangs num_samples=%d timeout_s=%g", len(call.samples), timeout_s
        )
        message = (
            f"the model's call did not return within {timeout_s:g} s (timeout_s for each of its samples); "
            "its worker was ended"
        )
        self._time_out(call.samples, message)

    def _wait_for_healthy(self) -> None:
        """Wait until no call makes progress any more, or all are done, or the grace is over."""
        ends_at_s, num_idle_looks = time.monotonic() + GRACE_S, 0
        while self._num_claimed() and num_idle_looks < IDLE_LOOKS:
            if time.monotonic() >= ends_at_s:
                return
            time.sleep(LOOK_EVERY_S)
            num_idle_looks = 0 if self._has_healthy() else num_idle_looks + 1
