"""What `collect()` returns: rewards, which of them are valid, the reasons for the rest, and where the time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.messages import Failure, Outcome
from tasks.rewards import ConstantOnFailure, RewardSpec, Split
from trainer_client.engine.model import Awaited, Slot
from trainer_client.failure_reasons import Failed, describe


class Failures(tuple[Failed, ...]):
    """The failures of a batch, a tuple of them; shown with equal reasons together."""

    __slots__ = ()

    def __str__(self) -> str:
        by_reward: dict[str, list[Failed]] = {}
        for failed in self:
            by_reward.setdefault(failed.reward, []).append(failed)
        return "\n".join(
            f"{name}: {describe(failures)}" for name, failures in by_reward.items()
        )

    def __repr__(self) -> str:
        count = f"<{len(self)} failures>"
        return f"{count}\n{self}" if self else count


@dataclass(frozen=True, slots=True, eq=False)
class RewardBatch:
    """The rewards of `N` samples, in the order of their `submit()`.

    Attributes:
        rewards: By reward name, float32 `(N,)`; NaN where there is no reward.
        valid: By reward name, bool `(N,)`: whether there is a reward. A constant from `on_failure: {value: x}` is
            in `rewards` and not valid.
        failures: Every (sample, reward) without a reward, with the reason and the worker that reported it.
        info: By reward name, `N` mappings: what the reward model returned beside the reward, and under `origin` where
            the reward was computed (worker, device, versions, seconds).
        groups: `N` group ids: as submitted; of a sample without `group`, a text of its prompt and condition media.
        timings: Seconds. `submit_s`: the caller was held in `submit()`; `wait_s`: the caller waited in `collect()` for
            these rewards, and `ranks_s` after that for the other ranks; `span_s`: from the first submit to the last
            outcome; `hidden_s`: the part of `span_s` not waited for; `encode_s`, `store_s`, `send_s`: spent by
            background threads, summed over them.
        num_hits: By reward name, the number of samples whose outcome was known already, and that were not sent.
        num_rescored: By reward name, the number of samples that were sent more than once: their worker or message was
            lost, or they were tried again after a failure of an earlier submit.
        weights: By reward name, as configured.
        latency_s: By reward name, float32 `(N,)`: seconds from `submit()` to the outcome; NaN where there is none yet.
        split, step: The step of these samples. Ranks gather their metrics and advantages under this name.
    """

    rewards: Mapping[str, npt.NDArray[np.float32]]
    valid: Mapping[str, npt.NDArray[np.bool_]]
    failures: tuple[Failed, ...]
    info: Mapping[str, tuple[Mapping[str, Any], ...]]
    groups: tuple[Hashable, ...]
    timings: dict[str, float]
    num_hits: Mapping[str, int]
    weights: Mapping[str, float] = field(default_factory=dict)
    latency_s: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    split: Split = "train"
    step: int = 0
    num_rescored: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        num_groups = len(set(self.groups))
        lines = [f"RewardBatch({self.name}: {len(self)} samples in {num_groups} groups"]
        for name in self.rewards:
            lines.append(f"  {name}: {self._describe_reward(name)}")
        waits = []
        for key in ("wait_s", "hidden_s"):
            if key in self.timings:
                waits.append(f"{key} {self.timings[key]:.1f}")
        if waits:
            lines.append(f"  {', '.join(waits)}")
        return "\n".join(lines) + ")"

    @property
    def name(self) -> str:
        """`step 12`, or `eval step 3`."""
        return step_name(self.split, self.step)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def failure_rate(self) -> float:
        """Share of (sample, reward) pairs without a reward, in [0, 1]."""
        num_pairs = len(self) * len(self.rewards)
        return len(self.failures) / num_pairs if num_pairs else 0.0

    def to_torch(self, device: Any = "cpu") -> dict[str, Any]:
        """The rewards as float32 tensors `(N,)` on `device`; NaN where there is none."""
        import torch

        return {
            name: torch.from_numpy(values.copy()).to(device)
            for name, values in self.rewards.items()
        }

    def describe_failures(self, said: str | None = None) -> str:
        """Every reward with failures: how many of which kind, and the reasons, equal ones together.

        Args:
            said: A reason that the text around this one says already; only its samples are given.
        """
        by_reward: dict[str, list[Failed]] = {name: [] for name in self.rewards}
        for failed in self.failures:
            by_reward[failed.reward].append(failed)

        lines = []
        for name, failures in by_reward.items():
            if failures:
                kinds = Counter(failed.kind for failed in failures).most_common()
                counts = ", ".join(f"{count} {kind}" for kind, count in kinds)
                lines.append(
                    f"reward {name!r}: {len(failures)} of {len(self)} samples ({counts}): {describe(failures, said)}"
                )
        return "\n".join(lines)

    def _describe_reward(self, name: str) -> str:
        rewards = self.rewards[name][self.valid[name]]
        mean = f"mean {rewards.mean():.4g}, " if len(rewards) else ""
        num_failed = len(self) - len(rewards)
        failed = f", {num_failed} failed" if num_failed else ""
        return f"{mean}{len(rewards)} of {len(self)}{failed}"


def step_name(split: Split, step: int) -> str:
    """`step 12`, or `eval step 3`."""
    return f"step {step}" if split == "train" else f"{split} step {step}"


@dataclass(frozen=True, slots=True)
class Late:
    """Why samples have no answer at the end of `collect()`."""

    failure: Failure
    """The reason of every such sample but those whose group is open."""
    why_open: Callable[[Slot, RewardSpec], str | None]
    """Why the group of a slot is not complete; None if it is complete."""


def batch_of(
    slots: Sequence[Slot],
    rewards: Sequence[RewardSpec],
    late: Late | None,
    times: Mapping[str, float],
    split: Split = "train",
    step: int = 0,
) -> RewardBatch:
    """The batch of these slots, in their order.

    Args:
        late: At a deadline, why samples have no answer; None if all have one.
        times: `timings` as far as the client knows them by itself, in seconds.
        split, step: The step of these slots.
    """
    values, valid, latency_s = {}, {}, {}
    failures: list[Failed] = []
    info, weights, num_hits, num_rescored = {}, {}, {}, {}
    for spec in rewards:
        column, name = _column(slots, spec, late), spec.name
        values[name] = np.array(column.rewards, np.float32)
        valid[name] = np.array(column.valid, bool)
        latency_s[name] = np.array(column.latency_s, np.float32)
        failures += column.failures
        info[name] = tuple(column.info)
        weights[name] = spec.weight
        num_hits[name] = column.num_hits
        num_rescored[name] = column.num_rescored
    return RewardBatch(
        rewards=values,
        valid=valid,
        failures=Failures(failures),
        info=info,
        groups=tuple(slot.group for slot in slots),
        timings={**times, **_span(slots, times["wait_s"])},
        num_hits=num_hits,
        weights=weights,
        latency_s=latency_s,
        split=split,
        step=step,
        num_rescored=num_rescored,
    )


@dataclass(slots=True)
class _Column:
    """One reward of a batch, in the order of its slots."""

    rewards: list[float] = field(default_factory=list)
    valid: list[bool] = field(default_factory=list)
    failures: list[Failed] = field(default_factory=list)
    info: list[dict[str, Any]] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    num_hits: int = 0
    num_rescored: int = 0


def _column(slots: Sequence[Slot], spec: RewardSpec, late: Late | None) -> _Column:
    policy = spec.on_failure
    constant = policy.value if isinstance(policy, ConstantOnFailure) else float("nan")
    column = _Column()
    for i, slot in enumerate(slots):
        outcome = _outcome(slot, spec, late)
        column.rewards.append(constant if outcome.reward is None else outcome.reward)
        column.valid.append(outcome.reward is not None)
        column.info.append({**outcome.info, "origin": outcome.origin})
        if outcome.failure is not None:
            column.failures.append(_failed(i, spec.name, outcome, outcome.failure))

        awaited = slot.awaited.get(spec.name)
        column.latency_s.append(_latency_s(slot, awaited))
        if awaited is not None:
            column.num_hits += awaited.is_hit
            column.num_rescored += awaited.num_sends > 1 or awaited.attempt > 1
    return column


def _failed(sample: int, reward: str, outcome: Outcome, failure: Failure) -> Failed:
    worker = str(outcome.origin.get("worker", ""))
    return Failed(
        sample, reward, failure.kind, failure.message, outcome.attempt, worker
    )


def _span(slots: Sequence[Slot], wait_s: float) -> dict[str, float]:
    last_answer = 0.0
    for slot in slots:
        for awaited in slot.awaited.values():
            last_answer = max(last_answer, awaited.answered_at)
    span_s = 0.0
    if last_answer:
        first_submit = min(slot.submitted_at for slot in slots)
        span_s = max(0.0, last_answer - first_submit)
    return {"span_s": span_s, "hidden_s": max(0.0, span_s - wait_s)}


def _latency_s(slot: Slot, awaited: Awaited | None) -> float:
    """Seconds from the submit to the outcome; NaN where there is none."""
    if awaited is None or awaited.outcome is None:
        return float("nan")
    return awaited.answered_at - slot.submitted_at


def _outcome(slot: Slot, spec: RewardSpec, late: Late | None) -> Outcome:
    """The outcome of a slot for a reward as its caller sees it; of a group's outcome, that of this member."""
    if slot.problem is not None:
        return Outcome(failure=slot.problem)

    awaited = slot.awaited.get(spec.name)
    if awaited is not None and awaited.outcome is not None:
        return _of_member(awaited.outcome, slot, spec)

    assert late is not None, "a complete batch has an outcome for every sample"
    is_group_open = spec.is_groupwise and awaited is None
    reason = late.why_open(slot, spec) if is_group_open else None
    if reason is None:
        return Outcome(failure=late.failure)
    return Outcome(failure=Failure(kind="timeout", message=reason))


def _of_member(outcome: Outcome, slot: Slot, spec: RewardSpec) -> Outcome:
    """The slot's own part of a group's outcome; any other outcome as it is."""
    if not outcome.members:
        return outcome
    own = outcome.members[slot.member_index[spec.name]]
    origin = {**own.origin, **outcome.origin}
    return own.model_copy(update={"attempt": outcome.attempt, "origin": origin})
