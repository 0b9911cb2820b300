"""What one client tells the log: of its steps, of their groups, of its tickets."""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Mapping, Sequence

from trainer_client.results import RewardBatch
from trainer_client.steps.step_log import (
    TicketWarnings,
    tell_step,
    warn_of_failures,
)
from trainer_client.steps.step_summary import (
    StepSummary,
    group_digest,
    group_size_words,
    mixed_groups,
)
from trainer_client.texts import shorten

log = logging.getLogger(__name__)

MAX_GROUP_CHARS = 80
"""Of a group's id, which may be a prompt, in a warning."""

MIXED, SIZE, ALONE = "mixed", "size", "alone"
"""What is warned of once a run."""


class ClientLog:
    """What one client in one process tells the log. Safe between threads.

    Rank 0 alone tells of steps and groups: all ranks have the same summary. Each rank tells of its own tickets, which
    it collects by itself.
    """

    def __init__(self, rank: int) -> None:
        self._tells_of_steps = rank == 0
        self._ticket_warnings = TicketWarnings()
        self._lock = threading.Lock()
        """Guards `_warned`."""
        self._warned: set[str] = set()

    def tell_ticket(self, batch: RewardBatch, summary: StepSummary) -> None:
        """A ticket is collected."""
        self._ticket_warnings.add(batch.name, summary)

    def tell_step(
        self,
        batch: RewardBatch,
        summary: StepSummary,
        prompts: Mapping[Hashable, Sequence[str]],
        *,
        has_line: bool,
    ) -> None:
        """A step is collected: warn of its failures and of its groups, and tell how it went.

        Args:
            summary: The step over all ranks.
            prompts: The different prompts of each group of this rank, where ranks compare them.
            has_line: Whether the log gets a line of how the step went.
        """
        if not self._tells_of_steps:
            return
        warn_of_failures(batch.name, summary)
        self._warn_of_groups(batch.name, summary, prompts)
        if has_line:
            tell_step(batch.name, summary, batch.timings["ranks_s"])

    def warn_of_mixed_group(self, group: Hashable) -> None:
        """A group, whose samples are compared, has samples of several prompts on this rank."""
        if self._tells_of_steps:
            self._warn_once(MIXED, _mixed_words(group))

    def warn_if_all_are_alone(
        self, batch: RewardBatch, num_samples: int, num_groups: int
    ) -> None:
        """Advantages are made of so many samples in so many groups, over all ranks."""
        all_are_alone = num_samples > 0 and num_groups == num_samples
        if all_are_alone and batch.split == "train" and self._tells_of_steps:
            self._warn_once(ALONE, f"{batch.name}: {_alone_words(num_samples)}")

    def end(self) -> None:
        """Tell what is held back."""
        self._ticket_warnings.end()

    def _warn_of_groups(
        self,
        name: str,
        summary: StepSummary,
        prompts: Mapping[Hashable, Sequence[str]],
    ) -> None:
        words = group_size_words(summary)
        if words:
            self._warn_once(SIZE, f"{name}: {words}")

        mixed = mixed_groups(summary)
        if mixed:
            named = [group for group in prompts if group_digest(group) in mixed]
            words = _mixed_over_ranks_words(len(mixed), len(summary.groups), named)
            self._warn_once(MIXED, f"{name}: {words}")

    def _warn_once(self, topic: str, words: str) -> None:
        with self._lock:
            is_new = topic not in self._warned
            self._warned.add(topic)
        if is_new:
            log.warning("%s (said once a run)", words)


def _mixed_words(group: Hashable) -> str:
    return (
        f"group {_shown(group)} has samples of several prompts: advantages and ranks compare the samples of a group, "
        "which should be of one prompt; give each prompt a group= of its own, or none, and equal prompts are a group"
    )


def _mixed_over_ranks_words(
    num_mixed: int, num_groups: int, named: Sequence[Hashable]
) -> str:
    example = f", {_shown(named[0])} for example," if named else ""
    return (
        f"{num_mixed} of {num_groups} groups{example} have samples of several prompts, over all ranks: "
        "advantages and ranks compare the samples of a group, which should be of one prompt; group= is an id over all "
        "ranks, not one that each rank counts from 0: add the rank to it, or give none, and equal prompts are a group"
    )


def _alone_words(num_samples: int) -> str:
    return (
        f"each of the {num_samples} samples is a group of its own, so that every advantage is 0 and nothing is "
        "learned; give the samples of one prompt the same group=, or the same prompt"
    )


def _shown(group: Hashable) -> str:
    return shorten(repr(group), MAX_GROUP_CHARS)
