"""One step in numbers, of this rank's samples or of all ranks': what the log and the ranks tell each other of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from trainer_client.advantages.group_ids import ids_to_plain
from trainer_client.failure_reasons import Reason, on_workers, reasons_of
from trainer_client.results import RewardBatch
from trainer_client.texts import shorten

REASONS_KEPT = 5
"""Of each reward, so many different reasons are counted over all ranks."""

REASON_CHARS = 300
"""A reason in the log is cut to so many characters; `RewardBatch.failures` has it whole."""

PROMPTS_KEPT = 2
"""Two different prompts are enough to see that a group is mixed."""


@dataclass(frozen=True, slots=True)
class RewardSummary:
    """One reward of one step."""

    num_valid: int
    total: float
    """Sum of its rewards."""
    num_failed: int
    workers: tuple[str, ...] = ()
    """Names of the workers that reported failures."""
    reasons: tuple[tuple[str, int], ...] = ()
    """The `REASONS_KEPT` most frequent reasons, each with its number of samples."""
    num_reasons: int = 0
    """How many reasons there are. Over ranks there are at least so many: each rank tells only its most frequent."""

    def to_plain(self) -> list[Any]:
        """As it goes to other ranks."""
        return [
            self.num_valid,
            self.total,
            self.num_failed,
            list(self.workers),
            list(map(list, self.reasons)),
            self.num_reasons,
        ]

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> RewardSummary:
        """As it comes from other ranks."""
        num_valid, total, num_failed, workers, plain_reasons, num_reasons = plain
        reasons = tuple((reason, count) for reason, count in plain_reasons)
        return cls(num_valid, total, num_failed, tuple(workers), reasons, num_reasons)

    @classmethod
    def joined(cls, ranks: Sequence[RewardSummary]) -> RewardSummary:
        """The same reward over all ranks."""
        num_valid = num_failed = num_reasons = 0
        total = 0.0
        workers: dict[str, None] = {}
        reasons: Counter[str] = Counter()
        for rank in ranks:
            num_valid += rank.num_valid
            total += rank.total
            num_failed += rank.num_failed
            num_reasons = max(num_reasons, rank.num_reasons)
            workers |= dict.fromkeys(rank.workers)
            reasons.update(dict(rank.reasons))
        return cls(
            num_valid=num_valid,
            total=total,
            num_failed=num_failed,
            workers=tuple(workers),
            reasons=tuple(reasons.most_common(REASONS_KEPT)),
            num_reasons=max(len(reasons), num_reasons),
        )


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """One group of one step."""

    num_samples: int
    size: int | None = None
    """The `group_size` that `submit()` was given; None if it was given none."""
    prompts: tuple[str, ...] = ()
    """Digests of its different prompts, `PROMPTS_KEPT` of them at most."""

    def joined_with(self, other: GroupSummary) -> GroupSummary:
        """The same group with the samples of another rank."""
        prompts = dict.fromkeys((*self.prompts, *other.prompts))
        return GroupSummary(
            num_samples=self.num_samples + other.num_samples,
            size=self.size if other.size is None else other.size,
            prompts=tuple(prompts)[:PROMPTS_KEPT],
        )


@dataclass(frozen=True, slots=True)
class StepSummary:
    """One step in numbers."""

    num_samples: int
    wait_s: float
    """Of the rank that waited longest."""
    hidden_s: float
    """Of the rank that has least of it."""
    rewards: Mapping[str, RewardSummary]
    groups: Mapping[str, GroupSummary] = field(default_factory=dict)
    """By the digest of their id, the groups of which a size or several prompts are known."""

    @property
    def num_failed(self) -> int:
        """(sample, reward) pairs without a reward."""
        return sum(reward.num_failed for reward in self.rewards.values())

    @property
    def failure_rate(self) -> float:
        """Share of (sample, reward) pairs without a reward, in [0, 1]."""
        num_pairs = self.num_samples * len(self.rewards)
        return self.num_failed / num_pairs if num_pairs else 0.0

    def to_plain(self) -> list[Any]:
        """As it goes to other ranks."""
        rewards = {name: reward.to_plain() for name, reward in self.rewards.items()}
        groups = {}
        for digest, group in self.groups.items():
            groups[digest] = [group.num_samples, group.size, list(group.prompts)]
        return [self.num_samples, self.wait_s, self.hidden_s, rewards, groups]

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> StepSummary:
        """As it comes from other ranks."""
        num_samples, wait_s, hidden_s, plain_rewards, plain_groups = plain
        rewards, groups = {}, {}
        for name, plain_reward in plain_rewards.items():
            rewards[name] = RewardSummary.of_plain(plain_reward)
        for digest, (num_members, size, prompts) in plain_groups.items():
            groups[digest] = GroupSummary(num_members, size, tuple(prompts))
        return cls(num_samples, wait_s, hidden_s, rewards, groups)


def summary_of(
    batch: RewardBatch,
    group_sizes: Mapping[Hashable, int] | None = None,
    prompts: Mapping[Hashable, Sequence[str]] | None = None,
) -> StepSummary:
    """The numbers of a batch.

    Args:
        group_sizes: Of the groups that were given a size.
        prompts: The different prompts of the groups, where they are to be compared with those of other ranks.
    """
    sizes, prompts_of = group_sizes or {}, prompts or {}
    num_members = Counter(batch.groups)
    groups = {}
    for group in {**sizes, **prompts_of}:
        digests = tuple(map(_text_digest, prompts_of.get(group, ())))
        groups[group_digest(group)] = GroupSummary(
            num_members[group], sizes.get(group), digests
        )
    return StepSummary(
        num_samples=len(batch),
        wait_s=batch.timings.get("wait_s", 0.0),
        hidden_s=batch.timings.get("hidden_s", 0.0),
        rewards={name: _reward_summary(batch, name) for name in batch.rewards},
        groups=groups,
    )


def joined(ranks: Sequence[StepSummary]) -> StepSummary:
    """The numbers of all ranks, which have the same rewards."""
    by_name: dict[str, list[RewardSummary]] = {}
    groups: dict[str, GroupSummary] = {}
    for rank in ranks:
        for name, reward in rank.rewards.items():
            by_name.setdefault(name, []).append(reward)
        for digest, group in rank.groups.items():
            known = groups.get(digest, GroupSummary(0))
            groups[digest] = known.joined_with(group)
    return StepSummary(
        num_samples=sum(rank.num_samples for rank in ranks),
        wait_s=max(rank.wait_s for rank in ranks),
        hidden_s=min(rank.hidden_s for rank in ranks),
        rewards={
            name: RewardSummary.joined(of_ranks) for name, of_ranks in by_name.items()
        },
        groups=groups,
    )


def failure_words(summary: StepSummary) -> str:
    """Each reward with failures: how many, on which workers, the most frequent reason; empty where nothing failed."""
    shown = []
    for name, reward in summary.rewards.items():
        if reward.num_failed:
            count = f"{reward.num_failed} of {summary.num_samples} failed"
            shown.append(f"{name}: {count}{_why(reward)}")
    return "; ".join(shown)


def group_size_words(summary: StepSummary) -> str:
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


def mixed_groups(summary: StepSummary) -> list[str]:
    """The digests of groups with samples of several prompts."""
    return [key for key, group in summary.groups.items() if len(group.prompts) > 1]


def group_digest(group: Hashable) -> str:
    """The digest of a group's id: the same on all ranks, unless ranks cannot compare ids of its type."""
    try:
        plain = msgpack.packb(ids_to_plain([group]))
    except (ValueError, TypeError):
        plain = repr(group).encode("utf-8", "replace")
    return hashlib.sha256(plain).hexdigest()[:16]


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _reward_summary(batch: RewardBatch, name: str) -> RewardSummary:
    rewards = batch.rewards[name][batch.valid[name]].astype(np.float64)
    reasons = reasons_of(failed for failed in batch.failures if failed.reward == name)
    workers: dict[str, None] = {}
    for reason in reasons:
        workers |= dict.fromkeys(reason.workers)
    return RewardSummary(
        num_valid=len(rewards),
        total=float(rewards.sum()),
        num_failed=sum(len(reason.samples) for reason in reasons),
        workers=tuple(workers),
        reasons=tuple(_counts(reasons[:REASONS_KEPT]).items()),
        num_reasons=len(reasons),
    )


def _counts(reasons: Iterable[Reason]) -> Counter[str]:
    """How many samples have each reason, by its text as the log shows it."""
    counts: Counter[str] = Counter()
    for reason in reasons:
        is_failed = reason.kind == "failed"
        text = reason.words if is_failed else f"{reason.kind}: {reason.words}"
        one_line = " ".join(text.split())
        counts[shorten(one_line, REASON_CHARS)] += len(reason.samples)
    return counts


def _why(reward: RewardSummary) -> str:
    reason = reward.reasons[0][0] if reward.reasons else "no reason is known"
    num_others = reward.num_reasons - 1
    more = ""
    if num_others > 0:
        more = f" (and {num_others} other reason{'s' if num_others > 1 else ''})"
    return f"{on_workers(reward.workers)}: {reason}{more}"
