"""How a worker process ends: at once, after the tasks in hand, or when its grace is over."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from celery.signals import worker_shutting_down
from celery.worker import state as worker_state

from tasks.errors import StaleCodeError
from workers.process.watchdog import EXIT_HUNG, GRACE_S

log = logging.getLogger(__name__)

RELEASE_S = 1.5
"""How long a worker that must end tries to give back what it has in hand; a Redis that hangs is not waited for.
With the 8 s of REWARDQ_STOP_GRACE_S it fits into the 10 s that a container's stop takes by default."""


def end_without_device(loss: RuntimeError) -> None:
    """End at once, as by `kill -9`. Samples in hand count as started, so that a sample that breaks GPUs is found."""
    log.critical("worker ends, it has lost its GPU status=%d error=%s", EXIT_HUNG, loss)
    os._exit(EXIT_HUNG)


def end_to_start_anew(why: StaleCodeError | str) -> None:
    """Take no further task, finish those in hand, and end, for a supervisor to start a new process.

    Args:
        why: The process has old code, or takes no messages any more.
    """
    status = worker_state.should_stop
    # 0 is the status of a stop that was asked for.
    if status is None or status is False:
        log.critical("worker ends, to be started again status=%d: %s", EXIT_HUNG, why)
        worker_state.should_stop = EXIT_HUNG


def end_stuck(why: str, release_claims: Callable[[], None]) -> None:
    """As `end_to_start_anew`, within `GRACE_S` whatever Celery's main thread and the tasks in hand do."""
    end_to_start_anew(why)

    def end() -> None:
        _end_at_once(release_claims, EXIT_HUNG)

    timer = threading.Timer(GRACE_S, end)
    timer.daemon = True
    timer.start()


def _end_at_once(release_claims: Callable[[], None], status: int) -> None:
    """End the process with tasks unfinished, for whose samples other workers are given the claims."""
    try:
        releasing = threading.Thread(
            target=release_claims, name="rewardq-release", daemon=True
        )
        releasing.start()
        releasing.join(RELEASE_S)
    finally:
        os._exit(status)


def end_in_time(release_claims: Callable[[], None], grace_s: float) -> None:
    """From now on a worker that is asked to stop (SIGTERM) ends within `grace_s`, whatever its tasks do.

    The claims of unfinished samples are given back for other workers. Otherwise a container's stop would end in
    SIGKILL, and the samples would wait for their claims to expire.
    """

    def end() -> None:
        log.warning("worker ends with tasks unfinished after grace_s=%g", grace_s)
        _end_at_once(release_claims, os.EX_OK)

    def begin(**_: Any) -> None:
        timer = threading.Timer(grace_s, end)
        timer.daemon = True
        timer.start()

    worker_shutting_down.connect(begin, weak=False)
