"""What `collect()` returns, made of its slots: rewards, what is valid, reasons for the rest, where the time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.errors import FailureKind
from tasks.messages import Failure, Outcome
from tasks.rewards import ConstantOnFailure, RewardSpec, Split
from trainer_client.engine.model import Awaited, Slot
from trainer_client.steps.failure_words import describe, on_workers


@dataclass(frozen=True, slots=True)
class Failed:
    """Why one sample has no reward."""

    sample: int
    """Index in the batch."""
    reward: str
    """Name of the reward."""
    kind: FailureKind
    message: str
    attempts: int
    """How often it was tried, over all submits."""
    worker: str = ""
    """Name of the worker (`gpu.3211@host`) that says so; empty where the trainer does: media that are unfit, a
    deadline."""

    def __str__(self) -> str:
        where = on_workers([self.worker] if self.worker else [])
        return f"sample {self.sample}: {self.kind}{where}: {self.message}"


class Failures(tuple[Failed, ...]):
    """The failures of a batch, a tuple of them; shown with equal reasons together."""

    __slots__ = ()

    def __str__(self) -> str:
        names = dict.fromkeys(failed.reward for failed in self)
        return "\n".join(
            f"{name}: {describe(f for f in self if f.reward == name)}" for name in names
        )

    def __repr__(self) -> str:
        return f"<{len(self)} failures>" + (f"\n{self}" if self else "")


@dataclass(frozen=True, slots=True, eq=False)
class RewardBatch:
    """The rewards of `N` samples, in the order of their `submit()`.

    Attributes:
        rewards: By reward name, float32 `(N,)`; NaN where there is no reward.
        valid: By reward name, bool `(N,)`: whether there is a reward. A constant from `on_failure: {value: x}` is
            in `rewards` and not valid.
        failures: Every (sample, reward) without a reward, why, and which worker says so.
        info: By reward name, `N` mappings: what the reward model says beside the reward, and under `origin` where it
            was computed (worker, device, versions, seconds).
        groups: `N` group ids: as submitted; of a sample without one, a text of its prompt and condition media.
        timings: Seconds. `submit_s`: the caller was held in `submit()`; `wait_s`: it waited in `collect()` for these
            rewards, and `ranks_s` after that for the other ranks; `span_s`: from the first submit to the last outcome;
            `hidden_s`: the part of `span_s` not waited for; `encode_s`, `store_s`, `send_s`: spent by background
            threads, summed over them.
        num_hits: By reward name, how many were answered from what was there, without being sent.
        num_rescored: By reward name, how many were sent more than once: since their worker or message was lost, or
            tried again after a failure of an earlier submit.
        weights: By reward name, as configured.
        latency_s: By reward name, float32 `(N,)`: seconds from `submit()` to the outcome; NaN where there is none yet.
        split, step: Of which step these are; ranks that compare theirs do so under this name.
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
        lines = [
            f"RewardBatch({self.name}: {len(self)} samples in {len(set(self.groups))} groups"
        ]
        lines += [f"  {name}: {self._describe_reward(name)}" for name in self.rewards]
        waits = [
            f"{key} {self.timings[key]:.1f}"
            for key in ("wait_s", "hidden_s")
            if key in self.timings
        ]
        return "\n".join([*lines, *([f"  {', '.join(waits)}"] if waits else [])]) + ")"

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
            said: A reason that the text says already; only its samples are given.
        """
        lines = []
        for name in self.rewards:
            failures = [f for f in self.failures if f.reward == name]
            if failures:
                kinds = ", ".join(
                    f"{n} {kind}"
                    for kind, n in Counter(f.kind for f in failures).most_common()
                )
                lines.append(
                    f"reward {name!r}: {len(failures)} of {len(self)} samples ({kinds}): {describe(failures, said)}"
                )
        return "\n".join(lines)

    def _describe_reward(self, name: str) -> str:
        valid = self.valid[name]
        there = self.rewards[name][valid]
        mean = f"mean {there.mean():.4g}, " if len(there) else ""
        num_failed = int((~valid).sum())
        return f"{mean}{len(there)} of {len(self)}" + (
            f", {num_failed} failed" if num_failed else ""
        )


def step_name(split: Split, step: int) -> str:
    """`step 12`, or `eval step 3`."""
    return f"step {step}" if split == "train" else f"{split} step {step}"


def batch_of(
    slots: Sequence[Slot],
    rewards: Sequence[RewardSpec],
    late: Failure | None,
    why_open: Callable[[Slot, RewardSpec], str | None],
    times: Mapping[str, float],
    split: Split = "train",
    step: int = 0,
) -> RewardBatch:
    """The batch of these slots, in their order.

    Args:
        late: The reason of those that have no answer, at a deadline; None if all have.
        why_open: Why the group of a slot has no entry yet, if that is so.
        times: `timings` as far as the client knows them by itself, in seconds.
        split, step: Of which step they are.
    """
    outcomes = {
        spec.name: [_outcome(slot, spec, late, why_open) for slot in slots]
        for spec in rewards
    }
    failures = [
        Failed(
            i,
            name,
            o.failure.kind,
            o.failure.message,
            o.attempt,
            str(o.origin.get("worker", "")),
        )
        for name, found in outcomes.items()
        for i, o in enumerate(found)
        if o.failure is not None
    ]
    entries = {
        spec.name: [s.awaited[spec.name] for s in slots if spec.name in s.awaited]
        for spec in rewards
    }
    return RewardBatch(
        rewards={spec.name: _rewards(outcomes[spec.name], spec) for spec in rewards},
        valid={
            n: np.array([o.reward is not None for o in found], dtype=bool)
            for n, found in outcomes.items()
        },
        failures=Failures(failures),
        info={
            n: tuple({**o.info, "origin": o.origin} for o in found)
            for n, found in outcomes.items()
        },
        groups=tuple(s.group for s in slots),
        timings={**times, **_span(slots, times["wait_s"])},
        num_hits={
            name: sum(e.is_hit for e in found) for name, found in entries.items()
        },
        weights={spec.name: spec.weight for spec in rewards},
        latency_s={
            spec.name: np.array([_latency_s(s, spec.name) for s in slots], np.float32)
            for spec in rewards
        },
        split=split,
        step=step,
        num_rescored={
            name: sum(_is_rescored(e) for e in found) for name, found in entries.items()
        },
    )


def _is_rescored(awaited: Awaited) -> bool:
    return awaited.num_sends > 1 or awaited.attempt > 1


def _rewards(outcomes: Sequence[Outcome], spec: RewardSpec) -> npt.NDArray[np.float32]:
    constant = (
        spec.on_failure.value
        if isinstance(spec.on_failure, ConstantOnFailure)
        else np.nan
    )
    return np.array(
        [constant if o.reward is None else o.reward for o in outcomes], dtype=np.float32
    )


def _span(slots: Sequence[Slot], wait_s: float) -> dict[str, float]:
    last_answer = max(
        (a.answered_at for s in slots for a in s.awaited.values()), default=0.0
    )
    span_s = (
        max(0.0, last_answer - min(s.submitted_at for s in slots))
        if last_answer
        else 0.0
    )
    return {"span_s": span_s, "hidden_s": max(0.0, span_s - wait_s)}


def _latency_s(slot: Slot, reward: str) -> float:
    """Seconds from the submit to the outcome; NaN where there is none."""
    awaited = slot.awaited.get(reward)
    if awaited is None or awaited.outcome is None:
        return float("nan")
    return awaited.answered_at - slot.submitted_at


def _outcome(
    slot: Slot,
    spec: RewardSpec,
    late: Failure | None,
    why_open: Callable[[Slot, RewardSpec], str | None],
) -> Outcome:
    """The outcome of a slot for a reward as its caller sees it; of a group's, its own member's."""
    awaited = slot.awaited.get(spec.name)
    own = slot.outcome_for(spec.name)
    if own is not None:
        whole = awaited.outcome if awaited is not None else None
        if whole is None or not whole.members:
            return own
        return own.model_copy(
            update={"attempt": whole.attempt, "origin": {**own.origin, **whole.origin}}
        )
    assert late is not None, "a complete batch has an outcome for every sample"
    reason = why_open(slot, spec) if spec.is_groupwise and awaited is None else None
    return Outcome(failure=Failure(kind="timeout", message=reason) if reason else late)
