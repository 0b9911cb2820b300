"""What a trainer's log says of each step: a warning of what failed, a line of how it went, and what a wait is for.

Warnings go through `logging`. So do the lines where logging shows this package's INFO. Where nobody has set it up, and
logging would swallow them, they go to standard error, as the bars do. `logging.getLogger("trainer_client")
.setLevel("WARNING")`, or `collect(progress=False)`, turns them off.
"""

from __future__ import annotations

import contextlib
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

from trainer_client.advantages.group_ids import ids_to_plain
from trainer_client.results import RewardBatch
from trainer_client.steps.failure_words import on_workers, reasons_of

log = logging.getLogger(__name__)

SAY_EVERY_S = 30.0
"""How often a trainer without a terminal is told what `collect()` waits for."""

RANKS_TOLD_S = 0.5
"""A shorter wait for other ranks is nothing to be told."""

REASONS_KEPT = 5
"""Of each reward, so many different reasons are counted over all ranks."""

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
    """Those that say why."""
    reasons: tuple[tuple[str, int], ...] = ()
    """The `REASONS_KEPT` most frequent, and of how many samples each is."""
    num_reasons: int = 0
    """How many there are; over ranks at least so many, as each tells the others of its most frequent alone."""


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """One group of one step, of this rank's samples or of all ranks'."""

    num_samples: int
    size: int | None = None
    """As it was given, if it was."""
    prompts: tuple[str, ...] = ()
    """Digests of its different prompts, two of them at most."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One step in numbers, as ranks tell each other."""

    num_samples: int
    wait_s: float
    """Of the rank that waited longest."""
    hidden_s: float
    """Of the rank that has least of it."""
    rewards: Mapping[str, RewardSummary]
    groups: Mapping[str, GroupSummary] = field(default_factory=dict)
    """By a digest of their id, the groups of which there is something to look at."""

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
            name: [
                r.num_valid,
                r.total,
                r.num_failed,
                list(r.workers),
                list(map(list, r.reasons)),
                r.num_reasons,
            ]
            for name, r in self.rewards.items()
        }
        groups = {
            key: [g.num_samples, g.size, list(g.prompts)]
            for key, g in self.groups.items()
        }
        return [self.num_samples, self.wait_s, self.hidden_s, rewards, groups]

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> Summary:
        """As it comes from other ranks."""
        num_samples, wait_s, hidden_s, rewards, groups = plain
        found = {}
        for name, (
            num_valid,
            total,
            num_failed,
            workers,
            reasons,
            num_reasons,
        ) in rewards.items():
            listed = tuple((words, num) for words, num in reasons)
            found[name] = RewardSummary(
                num_valid, total, num_failed, tuple(workers), listed, num_reasons
            )
        members = {
            key: GroupSummary(num, size, tuple(prompts))
            for key, (num, size, prompts) in groups.items()
        }
        return cls(num_samples, wait_s, hidden_s, found, members)


def summary_of(
    batch: RewardBatch,
    group_sizes: Mapping[Hashable, int] | None = None,
    prompts: Mapping[Hashable, Sequence[str]] | None = None,
) -> Summary:
    """The numbers of a batch.

    Args:
        group_sizes: Of its groups, as far as they were given.
        prompts: The different prompts of its groups, where they are to be compared with those of other ranks.
    """
    num_members = Counter(batch.groups)
    sizes, found = group_sizes or {}, {}
    for group in {**sizes, **(prompts or {})}:
        digests = tuple(
            _text_digest(prompt) for prompt in (prompts or {}).get(group, ())
        )
        found[group_digest(group)] = GroupSummary(
            num_members[group], sizes.get(group), digests
        )
    return Summary(
        num_samples=len(batch),
        wait_s=batch.timings.get("wait_s", 0.0),
        hidden_s=batch.timings.get("hidden_s", 0.0),
        rewards={name: _reward_summary(batch, name) for name in batch.rewards},
        groups=found,
    )


def joined(summaries: Sequence[Summary]) -> Summary:
    """The numbers of all ranks, which have the same rewards."""
    names = dict.fromkeys(name for one in summaries for name in one.rewards)
    return Summary(
        num_samples=sum(one.num_samples for one in summaries),
        wait_s=max(one.wait_s for one in summaries),
        hidden_s=min(one.hidden_s for one in summaries),
        rewards={
            name: _joined(
                [one.rewards[name] for one in summaries if name in one.rewards]
            )
            for name in names
        },
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
    sized = [group for group in summary.groups.values() if group.size is not None]
    wrong = [group for group in sized if group.num_samples != group.size]
    if not wrong:
        return ""
    return (
        f"{len(wrong)} of {len(sized)} groups are not whole: one has {wrong[0].num_samples} of "
        f"group_size={wrong[0].size} samples; were all of its samples submitted before collect(), under the same "
        "group= (without group=: under the same prompt)?"
    )


def mixed_groups(summary: Summary) -> list[str]:
    """The digests of groups with samples of several prompts."""
    return [key for key, group in summary.groups.items() if len(group.prompts) > 1]


def tell_step(name: str, summary: Summary, ranks_s: float = 0.0) -> None:
    """One line of how a step went, unless nothing was in it; `ranks_s` this rank has waited for the others."""
    if not summary.num_samples:
        return
    rewards = "".join(
        f", {reward} {_mean(found)}" for reward, found in summary.rewards.items()
    )
    times = f"waited {summary.wait_s:.1f} s, {summary.hidden_s:.1f} s hidden"
    if ranks_s >= RANKS_TOLD_S:
        times += f"; {ranks_s:.1f} s for other ranks"
    tell(f"{name}: {summary.num_samples} samples{rewards}; {times}")


def tell(words: str) -> None:
    """One line at INFO; on standard error where logging would show it nowhere and nobody has told it not to."""
    if log.isEnabledFor(logging.INFO) and log.hasHandlers():
        log.info("%s", words)
    elif not _is_level_chosen():
        # Nobody may be there to read it (a closed pipe, a full disk), which must not end a step.
        with contextlib.suppress(AttributeError, ValueError, OSError):
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
            warn_of_failures(
                first if first == last else f"{first} to {last}", joined(self._held)
            )
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
            tell(
                f"{self._name}: collect() has waited {now - self._started:.0f} s for {why()}"
            )


def _reward_summary(batch: RewardBatch, name: str) -> RewardSummary:
    there = batch.rewards[name][batch.valid[name]].astype(np.float64)
    reasons = reasons_of(failed for failed in batch.failures if failed.reward == name)
    workers = dict.fromkeys(worker for reason in reasons for worker in reason.workers)
    kept: Counter[str] = Counter()
    for reason in reasons[:REASONS_KEPT]:
        kept[
            _short(
                reason.words
                if reason.kind == "failed"
                else f"{reason.kind}: {reason.words}"
            )
        ] += len(reason.samples)
    return RewardSummary(
        num_valid=len(there),
        total=float(there.sum()),
        num_failed=sum(len(reason.samples) for reason in reasons),
        workers=tuple(workers),
        reasons=tuple(kept.items()),
        num_reasons=len(reasons),
    )


def _joined_groups(summaries: Sequence[Summary]) -> dict[str, GroupSummary]:
    found: dict[str, GroupSummary] = {}
    for one in summaries:
        for key, group in one.groups.items():
            before = found.get(key, GroupSummary(0))
            found[key] = GroupSummary(
                num_samples=before.num_samples + group.num_samples,
                size=before.size if group.size is None else group.size,
                prompts=tuple(dict.fromkeys([*before.prompts, *group.prompts]))[:2],
            )
    return found


def group_digest(group: Hashable) -> str:
    """The same for a group's id on all ranks where that can be; one of another type is known on its rank alone."""
    try:
        plain = msgpack.packb(ids_to_plain([group]))
    except (ValueError, TypeError):
        plain = repr(group).encode("utf-8", "replace")
    return hashlib.sha256(plain).hexdigest()[:16]


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _joined(found: Sequence[RewardSummary]) -> RewardSummary:
    reasons: Counter[str] = Counter()
    for one in found:
        reasons.update(dict(one.reasons))
    return RewardSummary(
        num_valid=sum(one.num_valid for one in found),
        total=sum(one.total for one in found),
        num_failed=sum(one.num_failed for one in found),
        workers=tuple(dict.fromkeys(worker for one in found for worker in one.workers)),
        reasons=tuple(reasons.most_common(REASONS_KEPT)),
        num_reasons=max(len(reasons), *(one.num_reasons for one in found)),
    )


def _why(found: RewardSummary) -> str:
    num_others = found.num_reasons - 1
    more = (
        f" (and {num_others} other reason{'s' if num_others > 1 else ''})"
        if num_others > 0
        else ""
    )
    reason = found.reasons[0][0] if found.reasons else "no reason is known"
    return f"{on_workers(found.workers)}: {reason}{more}"


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
    logger: logging.Logger = log
    while logger.parent is not None:
        if logger.level != logging.NOTSET:
            return True
        logger = logger.parent
    return logger.level > logging.WARNING  # which is the root's unless somebody sets it
