"""Quarantine of suspects: whether a suspect is scored alone, sent back, or given up.

A suspect is a sample that was started more than `USUAL_STARTS` times without an answer (see `tasks.outcomes`): it may
be what ended the processes that started on it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from tasks.messages import Failure

MOST_STARTS_ALONE = 3
"""How often a suspect is started alone without an answer before it is given up."""

Decision = Literal["score alone", "send back", "give up"]
"""What becomes of a suspect in quarantine. A suspect is sent back without an outcome: the client sends it again."""


class Quarantine:
    """The quarantine of a worker process. Safe between threads.

    One suspect at a time is in it: if the process ends meanwhile, that suspect did it, and no other suspect of this
    process is counted as started alone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @property
    def is_occupied(self) -> bool:
        """Whether a suspect is in it."""
        return self._lock.locked()

    @contextmanager
    def entered(self) -> Iterator[bool]:
        """Whether a suspect may enter, which then stays until the block ends. Else the suspect is sent back.

        Nobody waits for the quarantine: a thread that waits would keep the samples of other chunks from being scored.
        """
        if not self._lock.acquire(blocking=False):
            yield False
            return

        try:
            yield True
        finally:
            self._lock.release()


def decide(earlier: int, since_s: float, timeout_s: float) -> Decision:
    """What becomes of a suspect that has entered the quarantine.

    A suspect that ended its process each time is given up, but not before `timeout_s` has passed: what ends processes
    for a while (a host out of memory, a deployment) is not the sample's fault.

    Args:
        earlier: How often it was started alone without an answer.
        since_s: Seconds since the first of these starts.
        timeout_s: The reward's seconds for scoring one sample.
    """
    if earlier < MOST_STARTS_ALONE:
        return "score alone"
    if since_s >= timeout_s:
        return "give up"
    return "send back"


def given_up(earlier: int) -> Failure:
    """The failure of a suspect that is given up after `earlier` starts alone."""
    message = f"its worker process ended without an answer each of the {earlier} times it was scored alone"
    return Failure(kind="failed", message=message)
