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
"""Exit status of a worker that ended since a model hung (EX_TEMPFAIL: start it again)."""

GRACE_S = 30.0
"""How long healthy tasks may take to finish before the process ends; what is left goes back to the queue."""

LOOK_EVERY_S = 0.5


class Call:
    """A call of a model that may take `timeout_s` for each of its samples."""

    def __init__(self, samples: Sequence[SampleRequest], timeout_s: float) -> None:
        self.samples = samples
        self.timeout_s = timeout_s * len(samples)
        self.restart()

    def pause(self) -> None:
        """It waits for another thread: that does not count."""
        self.deadline = float("inf")

    def restart(self) -> None:
        """It computes from now on."""
        self.deadline = time.monotonic() + self.timeout_s


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
    def calling(self, samples: Sequence[SampleRequest], timeout_s: float) -> Iterator[None]:
        """This thread calls a model with these samples; it may take `timeout_s` for each."""
        call = this_call.clock = Call(samples, timeout_s)
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

    def _end_process(self, late: Sequence[Call]) -> None:
        try:
            worker_state.should_stop = os.EX_OK  # no further task is taken
            for call in late:
                log.error("model hangs num_samples=%d timeout_s=%g", len(call.samples), call.timeout_s)
                self._time_out(
                    call.samples,
                    f"the model's call did not return within {call.timeout_s:g} s "
                    f"(timeout_s for each of {len(call.samples)} samples); its worker was ended",
                )
            ends_at = time.monotonic() + GRACE_S
            while self._num_busy() and time.monotonic() < ends_at:
                time.sleep(LOOK_EVERY_S)
            self._hand_back()
        finally:
            log.error("worker ends status=%d", EXIT_HUNG)
            os._exit(EXIT_HUNG)
