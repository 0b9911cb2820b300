"""The deadline of a model's call, which the worker's watchdog enforces.

Who sets it: `workers.process.watchdog`, in the thread that calls a model (`set_for_call`).
Who pauses it: `RewardModel.forward`, while another thread has the model, and whatever waits on the network under a
timeout of its own (`paused`). Outside a worker no call has a deadline, and a pause does nothing.
Who reads it: the watchdog's thread.

The thread carries the deadline, since a reward model's class is the user's code: its `__call__` has no argument for it.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator


class Deadline:
    """When a call of a model is late.

    The thread of the call changes it, and the watchdog's thread reads it. There is no lock: the watchdog may see one of
    two values that are set together before the other, and sees both at its next look.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.at_s = math.inf
        """On the clock of `time.monotonic`; never while the deadline is paused."""
        self.waits_for_model = False
        """Whether the call is held up by another thread's call of the same model."""
        self.restart()

    def restart(self) -> None:
        """Let the call compute for `timeout_s` from now on."""
        self.at_s = time.monotonic() + self.timeout_s
        self.waits_for_model = False

    def pause(self, *, waits_for_model: bool) -> None:
        """Let no time count from now on."""
        self.at_s = math.inf
        self.waits_for_model = waits_for_model

    def is_late(self, now_s: float) -> bool:
        """Whether the call should have returned by `now_s`, on the clock of `time.monotonic`."""
        return self.at_s < now_s


_of_thread = threading.local()


@contextlib.contextmanager
def set_for_call(deadline: Deadline) -> Iterator[None]:
    """Within, this thread's call of a model has this deadline."""
    _of_thread.deadline = deadline
    try:
        yield
    finally:
        _of_thread.deadline = None


@contextlib.contextmanager
def paused(*, waits_for_model: bool = False) -> Iterator[None]:
    """Within, no time counts for this thread's call; afterwards its whole timeout begins anew."""
    deadline: Deadline | None = getattr(_of_thread, "deadline", None)
    if deadline is None:
        yield
        return
    deadline.pause(waits_for_model=waits_for_model)
    try:
        yield
    finally:
        deadline.restart()
