"""One `collect()`: which samples it brings, the wait for them, their batch, and what it raises on all ranks."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from tasks.errors import CollectTimeoutError, ScoringError
from tasks.messages import Failure
from tasks.rewards import OnFailure, RewardSpec, Split
from trainer_client.engine.engine import Engine
from trainer_client.engine.model import Slot
from trainer_client.progress import is_terminal
from trainer_client.ranks.gather import RankGather
from trainer_client.ranks.verdict import (
    Verdict,
    agree,
    error_for,
    error_for_rate,
)
from trainer_client.results import Late, RewardBatch, batch_of, step_name
from trainer_client.steps.grouping import are_compared
from trainer_client.steps.incomplete_groups import incomplete_groups, why_not_to_wait
from trainer_client.steps.open_steps import OpenStep
from trainer_client.steps.step_log import WaitLog
from trainer_client.steps.step_summary import StepSummary, summary_of
from trainer_client.ticket import Ticket

RANKS_MARGIN_S = 5.0
"""With several ranks a rank stops waiting for its own samples so long before the deadline of `collect()` (a quarter of
the time at most), and the ranks use the rest to come to one verdict."""


@dataclass(slots=True)
class Wanted:
    """What one `collect()` is to bring: the samples of a ticket, else those of the open step."""

    engine: Engine
    split: Split
    step: int
    rewards: tuple[RewardSpec, ...]
    slots: Sequence[Slot] = ()
    open_step: OpenStep | None = None
    """The open step of the split, of which a ticket's samples may be a part. Without its lock only `submit_s` is read,
    a number."""
    ticket: Ticket | None = None
    prompts: Mapping[Hashable, tuple[str, ...]] = field(default_factory=dict)
    """The different prompts of each group, where other ranks may have samples of the group."""
    incomplete: Mapping[Hashable, str] = field(default_factory=dict)
    """The groups that lack members which nobody else can submit, and what is said of each."""

    @property
    def given_up_groups(self) -> dict[Hashable, str]:
        """The incomplete groups that wanted samples are in, and what is said of each. (Tickets may have brought all the
        samples of a group. The engine remembers a group that is given up as long as the samples that are.)"""
        groups = {slot.group for slot in self.slots}
        return {id_: said for id_, said in self.incomplete.items() if id_ in groups}

    def take_all_of(self, step: OpenStep, world_size: int) -> None:
        """Want what is in the open step now. Other threads may go on submitting to it."""
        self.open_step = step
        self.slots = list(step.slots)
        if world_size == 1:  # of several ranks another one may complete a group
            self.incomplete = incomplete_groups(step)
        elif are_compared(self.split, self.rewards):
            self.prompts = dict(step.prompts)


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """How one `collect()` was called."""

    started: float
    """When it was called, on `time.monotonic()`."""
    timeout_s: float
    on_failure: OnFailure
    max_failure_rate: float
    progress: bool | None
    rank: int

    @property
    def deadline(self) -> float:
        """On `time.monotonic()`."""
        return self.started + self.timeout_s

    @property
    def has_bars(self) -> bool | None:
        """Whether there are bars; None if there are where standard error is a terminal."""
        return False if self.progress is None and self.rank != 0 else self.progress

    @property
    def has_log_lines(self) -> bool:
        """Whether the log is told how the step went, and what is waited for."""
        return self.progress is None and self.rank == 0 and not is_terminal()


@dataclass(frozen=True, slots=True)
class Collected:
    """What one `collect()` came to."""

    batch: RewardBatch
    error: ScoringError | None
    """What `collect()` raises, if it does; on all ranks alike."""
    summary: StepSummary
    """The step in numbers, over all ranks."""
    has_log_lines: bool

    @property
    def is_late(self) -> bool:
        """Whether the deadline passed, so that the step stays open."""
        return isinstance(self.error, CollectTimeoutError)


class Collection:
    """One `collect()` under way. It waits, and is run without any lock held.

    Args:
        ranks: Gathers the verdicts of all ranks; None where this rank collects by itself (one rank, or a ticket).
    """

    def __init__(
        self, wanted: Wanted, options: CollectOptions, ranks: RankGather | None
    ) -> None:
        self._wanted, self._options, self._ranks = wanted, options, ranks
        self._has_log_lines = options.has_log_lines
        self._wait_log: WaitLog | None = None
        if self._has_log_lines:
            self._wait_log = WaitLog(step_name(wanted.split, wanted.step))

    def run(self) -> Collected:
        """Wait for the samples, make their batch, and come to a verdict."""
        late = self._wait()
        batch = self._make_batch(late)
        verdict = self._verdict(batch, late)
        error = verdict.error or error_for_rate(
            verdict.summary, self._options.max_failure_rate, batch
        )
        return Collected(batch, error, verdict.summary, self._has_log_lines)

    def _wait(self) -> Failure | None:
        """Wait for the samples; the reason of those without an answer at the deadline, None if all have one."""
        wanted, options = self._wanted, self._options
        in_vain = why_not_to_wait(wanted.incomplete, wanted.rewards, options.on_failure)
        if in_vain is not None:
            return Failure(kind="timeout", message=in_vain)
        wanted.engine.give_up_groups(wanted.split, wanted.step, wanted.given_up_groups)

        deadline = options.deadline
        if self._ranks is not None:
            # Each rank leaves the others a little time to say how they fared, before the same deadline.
            deadline -= min(RANKS_MARGIN_S, options.timeout_s / 4)
        tell_waiting = None if self._wait_log is None else self._wait_log.tell
        is_complete = wanted.engine.wait(
            wanted.slots, deadline, options.has_bars, tell_waiting
        )
        if is_complete:
            return None
        return wanted.engine.why_late(wanted.slots, options.timeout_s)

    def _make_batch(self, late: Failure | None) -> RewardBatch:
        wanted = self._wanted
        submit_s = wanted.open_step.submit_s if wanted.open_step is not None else 0.0
        times = {
            "submit_s": submit_s,
            "wait_s": time.monotonic() - self._options.started,
            "ranks_s": 0.0,
            **wanted.engine.take_seconds(),
        }
        return batch_of(
            wanted.slots,
            wanted.rewards,
            None if late is None else Late(late, wanted.engine.why_open),
            times,
            wanted.split,
            wanted.step,
        )

    def _verdict(self, batch: RewardBatch, late: Failure | None) -> Verdict:
        """What the failures themselves come to, and the step in numbers; on all ranks alike."""
        wanted = self._wanted
        policies = {spec.name: spec.on_failure for spec in wanted.rewards}
        error = error_for(batch, late, self._options.on_failure, policies)
        summary = summary_of(batch, self._group_sizes(), wanted.prompts)
        own = Verdict(error, summary)
        if self._ranks is None:
            return own

        done_at = time.monotonic()
        topic = f"{wanted.split} step {wanted.step}"
        verdict = agree(
            self._ranks, topic, own, batch, self._options.deadline, self._tell_missing
        )
        # Set on the batch that is made already: what the error carries must have it too.
        batch.timings["ranks_s"] = time.monotonic() - done_at
        return verdict

    def _group_sizes(self) -> dict[Hashable, int]:
        """The groups that were given a size; none of a ticket, which may have a part of a group only."""
        sizes: dict[Hashable, int] = {}
        if self._wanted.ticket is not None:
            return sizes
        for slot in self._wanted.slots:
            if slot.group_size is not None:
                sizes[slot.group] = slot.group_size
        return sizes

    def _tell_missing(self, ranks: list[int]) -> None:
        """Tell the log, if that is due, which ranks are waited for."""
        if self._wait_log is not None:
            numbers = ", ".join(map(str, ranks))
            self._wait_log.tell(lambda: f"rank {numbers}; this rank has its rewards")
