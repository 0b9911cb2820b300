"""What a trainer's log says of each step: a warning of what failed, a line of how it went, and what a wait is for.

Warnings go through `logging`. So do the lines where logging shows this package's INFO. Where nobody has set it up, and
logging would swallow them, they go to standard error, as the bars do. `logging.getLogger("trainer_client")
.setLevel("WARNING")`, or `collect(progress=False)`, turns them off.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from trainer_client.reasons import on_workers, reasons_of
from trainer_client.results import RewardBatch
from trainer_client.table import plain_of_ids

log = logging.getLogger(__name__)

SAY_EVERY_S = 30.0
"""How often a trainer without a terminal is told what `collect()` waits for."""

REASON_CHARS = 300
"""A reason in the log is cut to so many characters; `RewardBatch.failures` has it whole."""


@dataclass(frozen=True, slots=True)
class RewardSummary:
    """One reward of one step, of this rank's samples or of all ranks'."""

    num_valid: int
    total: float
    """Sum of its rewards."""
    num_failed: int
    workers: tuple[str, ...] = ()
    """Those that say why, the first few."""
    num_reasons: int = 0
    reason: str = ""
    """The most frequent."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One step in numbers, as ranks tell each other."""

    num_samples: int
    wait_s: float
    """Of the rank that waited longest."""
    hidden_s: float
    """Of the rank that has least of it."""
    rewards: Mapping[str, RewardSummary]
    groups: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Of the groups whose size was given, by a digest of their id: how many samples they have, and that size."""

    @property
    def num_failed(self) -> int:
        """(sample, reward) pairs without a reward."""
        return sum(reward.num_failed for reward in self.rewards.values())

    @property
    def failure_rate(self) -> float:
        """Their share, in [0, 1]."""
        num_pairs = self.num_samples * len(self.rewards)
        return self.num_failed / num_pairs if num_pairs else 0.0

    def to_plain(self) -> list[Any]:
        """As it goes to other ranks."""
        rewards = {
            name: [r.num_valid, r.total, r.num_failed, list(r.workers), r.num_reasons, r.reason]
            for name, r in self.rewards.items()
        }
        return [self.num_samples, self.wait_s, self.hidden_s, rewards, {k: list(v) for k, v in self.groups.items()}]

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> Summary:
        """As it comes from other ranks."""
        num_samples, wait_s, hidden_s, rewards, groups = plain
        found = {
            name: RewardSummary(num_valid, total, num_failed, tuple(workers), num_reasons, reason)
            for name, (num_valid, total, num_failed, workers, num_reasons, reason) in rewards.items()
        }
        sizes = {key: (num_samples, size) for key, (num_samples, size) in groups.items()}
        return cls(num_samples, wait_s, hidden_s, found, sizes)


def summary_of(batch: RewardBatch, group_sizes: Mapping[Hashable, int] | None = None) -> Summary:
    """The numbers of a batch; `group_sizes` are those of its groups, as far as they were given."""
    num_members = Counter(batch.groups)
    sizes = {_digest(group): (num_members[group], size) for group, size in (group_sizes or {}).items()}
    return Summary(
        num_samples=len(batch),
        wait_s=batch.timings.get("wait_s", 0.0),
        hidden_s=batch.timings.get("hidden_s", 0.0),
        rewards={name: _reward_summary(batch, name) for name in batch.rewards},
        groups=sizes,
    )


def joined(summaries: Sequence[Summary]) -> Summary:
    """The numbers of all ranks, which have the same rewards."""
    names = dict.fromkeys(name for one in summaries for name in one.rewards)
    return Summary(
        num_samples=sum(one.num_samples for one in summaries),
        wait_s=max(one.wait_s for one in summaries),
        hidden_s=min(one.hidden_s for one in summaries),
        rewards={name: _joined([one.rewards[name] for one in summaries if name in one.rewards]) for name in names},
        groups=_joined_groups(summaries),
    )


def failure_words(summary: Summary) -> str:
    """Each reward with failures: how many, on which workers, the most frequent reason; empty where nothing failed."""
    return "; ".join(
        f"{reward}: {found.num_failed} of {summary.num_samples} failed{_why(found)}"
        for reward, found in summary.rewards.items()
        if found.num_failed
    )


def warn_of_failures(name: str, summary: Summary) -> None:
    """One warning for the step of this name, if any of its rewards has failures."""
    words = failure_words(summary)
    if words:
        log.warning("%s: %s", name, words)


def group_size_words(summary: Summary) -> str:
    """What is wrong with the sizes of groups; empty if nothing is."""
    wrong = [(num_samples, size) for num_samples, size in summary.groups.values() if num_samples != size]
    if not wrong:
        return ""
    num_samples, size = wrong[0]
    return (
        f"{len(wrong)} of {len(summary.groups)} groups are not whole: one has {num_samples} of "
        f"group_size={size} samples; were all of its samples submitted before collect(), under the same group= "
        "(without group=: under the same prompt)?"
    )


def tell_step(name: str, summary: Summary) -> None:
    """One line of how a step went, unless nothing was in it."""
    if not summary.num_samples:
        return
    rewards = "".join(f", {reward} {_mean(found)}" for reward, found in summary.rewards.items())
    times = f"waited {summary.wait_s:.1f} s, {summary.hidden_s:.1f} s hidden"
    tell(f"{name}: {summary.num_samples} samples{rewards}; {times}")


def tell(words: str) -> None:
    """One line at INFO; on standard error where logging would show it nowhere and nobody has told it not to."""
    if log.isEnabledFor(logging.INFO) and log.hasHandlers():
        log.info("%s", words)
    elif not _is_level_chosen():
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} rewardq: {words}\n")
        sys.stderr.flush()


class TicketWarnings:
    """Warns of the failures of tickets, of which a step may have hundreds: at once of the first, and then every
    `SAY_EVERY_S` of all that came meanwhile. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: list[str] = []
        self._held: list[Summary] = []
        self._due_at = float("-inf")

    def add(self, name: str, summary: Summary) -> None:
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
            warn_of_failures(first if first == last else f"{first} to {last}", joined(self._held))
            self._due_at = time.monotonic() + SAY_EVERY_S
        self._names, self._held = [], []


class Waiting:
    """Tells what a wait is for, every `SAY_EVERY_S`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = time.monotonic()
        self._due_at = self._started + SAY_EVERY_S

    def tell(self, why: Callable[[], str]) -> None:
        """Tell it if that is due; only then `why` is asked."""
        now = time.monotonic()
        if now >= self._due_at:
            self._due_at = now + SAY_EVERY_S
            tell(f"{self._name}: collect() has waited {now - self._started:.0f} s for {why()}")


def _reward_summary(batch: RewardBatch, name: str) -> RewardSummary:
    there = batch.rewards[name][batch.valid[name]].astype(np.float64)
    reasons = reasons_of(failed for failed in batch.failures if failed.reward == name)
    workers = dict.fromkeys(worker for reason in reasons for worker in reason.workers)
    return RewardSummary(
        num_valid=len(there),
        total=float(there.sum()),
        num_failed=sum(len(reason.samples) for reason in reasons),
        workers=tuple(workers),
        num_reasons=len(reasons),
        reason=_short(reasons[0].words if reasons[0].kind == "failed" else f"{reasons[0].kind}: {reasons[0].words}")
        if reasons
        else "",
    )


def _joined_groups(summaries: Sequence[Summary]) -> dict[str, tuple[int, int]]:
    num_members: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    for one in summaries:
        for key, (num_samples, size) in one.groups.items():
            num_members[key] += num_samples
            sizes[key] = size
    return {key: (num_members[key], size) for key, size in sizes.items()}


def _digest(group: Hashable) -> str:
    """The same for a group's id on all ranks where that can be; one of another type is known on its rank alone."""
    try:
        plain = msgpack.packb(plain_of_ids([group]))
    except (ValueError, TypeError):
        plain = repr(group).encode("utf-8", "replace")
    return hashlib.sha256(plain).hexdigest()[:16]


def _joined(found: Sequence[RewardSummary]) -> RewardSummary:
    worst = max(found, key=lambda one: one.num_failed)
    return RewardSummary(
        num_valid=sum(one.num_valid for one in found),
        total=sum(one.total for one in found),
        num_failed=sum(one.num_failed for one in found),
        workers=tuple(dict.fromkeys(worker for one in found for worker in one.workers)),
        num_reasons=max(one.num_reasons for one in found),
        reason=worst.reason,
    )


def _why(found: RewardSummary) -> str:
    num_others = found.num_reasons - 1
    more = f" (and {num_others} other reason{'s' if num_others > 1 else ''})" if num_others > 0 else ""
    return f"{on_workers(found.workers)}: {found.reason}{more}"


def _mean(found: RewardSummary) -> str:
    mean = f"{found.total / found.num_valid:.4g}" if found.num_valid else "nan"
    return mean + (f" ({found.num_failed} failed)" if found.num_failed else "")


def _short(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= REASON_CHARS else f"{line[:REASON_CHARS]}..."


def _is_level_chosen() -> bool:
    """Whether somebody has set a level for this package's loggers, or turned INFO off for all."""
    if log.manager.disable >= logging.INFO:
        return True
    logger: logging.Logger | None = log
    while logger is not None and logger.parent is not None:  # the root's is WARNING unless somebody sets it
        if logger.level != logging.NOTSET:
            return True
        logger = logger.parent
    return False
