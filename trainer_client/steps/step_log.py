"""What a trainer's log says of each step: a warning of what failed, a line of how it went, and what a wait is for.

Warnings go through `logging`. So do the lines where logging shows this package's INFO. Where nobody has set logging up,
and it would swallow them, the lines go to standard error, as the bars do.
`logging.getLogger("trainer_client").setLevel("WARNING")`, or `collect(progress=False)`, turns them off.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable

from trainer_client.steps.step_summary import (
    RewardSummary,
    StepSummary,
    failure_words,
    joined,
)

log = logging.getLogger(__name__)

SAY_EVERY_S = 30.0
"""How often a trainer without a terminal is told what `collect()` waits for."""

RANKS_TOLD_S = 0.5
"""A shorter wait for other ranks is not told."""


def warn_of_failures(name: str, summary: StepSummary) -> None:
    """One warning for the step of this name, if any of its rewards has failures."""
    words = failure_words(summary)
    if words:
        log.warning("%s: %s", name, words)


def tell_step(name: str, summary: StepSummary, ranks_s: float = 0.0) -> None:
    """One line of how a step went, unless it was empty; this rank has waited `ranks_s` for the others."""
    if not summary.num_samples:
        return
    parts = [f"{name}: {summary.num_samples} samples"]
    for reward, found in summary.rewards.items():
        parts.append(f"{reward} {_mean(found)}")
    times = f"waited {summary.wait_s:.1f} s, {summary.hidden_s:.1f} s hidden"
    if ranks_s >= RANKS_TOLD_S:
        times += f"; {ranks_s:.1f} s for other ranks"
    tell(f"{', '.join(parts)}; {times}")


def tell(words: str) -> None:
    """One line at INFO; on standard error where logging would show it nowhere, unless somebody has chosen a level."""
    if log.isEnabledFor(logging.INFO) and log.hasHandlers():
        log.info("%s", words)
    elif not _is_level_chosen():
        # Nobody may be there to read it (a closed pipe, a full disk), which must not end a step.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} rewardq: {words}\n")
            sys.stderr.flush()


class TicketWarnings:
    """Warns of the failures of tickets, of which a step may have hundreds.

    Warns of the first at once, and then every `SAY_EVERY_S` of all that came meanwhile. Safe between threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: list[str] = []
        self._held: list[StepSummary] = []
        self._due_at = float("-inf")

    def add(self, name: str, summary: StepSummary) -> None:
        """A ticket of the step of this name is collected."""
        with self._lock:
            self._held.append(summary)
            if summary.num_failed:
                self._names.append(name)
            if time.monotonic() >= self._due_at:
                self._say()

    def end(self) -> None:
        """Say what is held."""
        with self._lock:
            self._say()

    def _say(self) -> None:
        if self._names:
            first, last = self._names[0], self._names[-1]
            name = first if first == last else f"{first} to {last}"
            warn_of_failures(name, joined(self._held))
            self._due_at = time.monotonic() + SAY_EVERY_S
        self._names, self._held = [], []


class WaitLog:
    """Tells the log what one wait in `collect()` is for, every `SAY_EVERY_S`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = time.monotonic()
        self._due_at = self._started + SAY_EVERY_S

    def tell(self, why: Callable[[], str]) -> None:
        """Tell what is waited for if that is due. Only then `why` is called, which may ask Redis."""
        now = time.monotonic()
        if now < self._due_at:
            return
        self._due_at = now + SAY_EVERY_S
        waited_s = now - self._started
        tell(f"{self._name}: collect() has waited {waited_s:.0f} s for {why()}")


def _mean(reward: RewardSummary) -> str:
    mean = f"{reward.total / reward.num_valid:.4g}" if reward.num_valid else "nan"
    return f"{mean} ({reward.num_failed} failed)" if reward.num_failed else mean


def _is_level_chosen() -> bool:
    """Whether somebody has set a level for this package's loggers, or turned INFO off for all."""
    if log.manager.disable >= logging.INFO:
        return True
    logger: logging.Logger = log
    while logger.parent is not None:
        if logger.level != logging.NOTSET:
            return True
        logger = logger.parent
    return logger.level > logging.WARNING  # which is the root's unless somebody sets it
