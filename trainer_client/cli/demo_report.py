"""What `rewardq demo` shows at its end: rewards by group, failures, and where the time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

REASONS_SHOWN = 10

UNITS = {"OCR": "[0, 1]", "jpeg_compressibility": "-kB", "vllm_evaluate": "[0, 1]"}


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the demo's trainer."""

    number: int
    batch: Any
    """The `RewardBatch`."""
    sampling_s: float

    @property
    def submit_s(self) -> float:
        """How long `submit()` held the trainer."""
        return float(self.batch.timings["submit_s"])

    @property
    def wait_s(self) -> float:
        """How long `collect()` held the trainer."""
        return float(self.batch.timings["wait_s"])

    @property
    def scoring_s(self) -> float:
        """From the first submit to the last outcome."""
        return float(self.batch.timings["span_s"])

    @property
    def hidden_s(self) -> float:
        """The part of the scoring that the trainer did not wait for."""
        return float(self.batch.timings["hidden_s"])

    @property
    def num_failed(self) -> int:
        """Outcomes that are no rewards."""
        return len(self.batch.failures)


def show_rewards(console: Console, steps: Sequence[Step]) -> None:
    """A row for each group, a column for each reward."""
    names = list(steps[0].batch.rewards)
    table = Table(
        title="Rewards by group: mean ± standard deviation, lowest .. highest",
        title_justify="left",
    )
    table.add_column("step", justify="right")
    table.add_column("group")
    for name in names:
        table.add_column(
            f"{name}\n{UNITS.get(name, '')}".strip(), justify="right", no_wrap=True
        )
    for step in steps:
        groups = np.array([str(group) for group in step.batch.groups])
        for group in dict.fromkeys(groups.tolist()):
            is_member = groups == group
            cells = [
                _spread(np.asarray(step.batch.rewards[name])[is_member])
                for name in names
            ]
            words = group.partition(": ")[2]
            table.add_row(
                str(step.number), f"{words}\n{is_member.sum()} images", *cells
            )
        table.add_section()
    console.print(table)


def show_failures(console: Console, steps: Sequence[Step]) -> None:
    """How many outcomes failed, and why."""
    num_outcomes = sum(
        np.asarray(rewards).size
        for step in steps
        for rewards in step.batch.rewards.values()
    )
    failures = [failed for step in steps for failed in step.batch.failures]
    reasons = Counter((f.reward, f.kind, f.message) for f in failures)
    lines = [
        f"  {num} x {reward}: {kind}: {message}"
        for (reward, kind, message), num in reasons.most_common()
    ]
    if len(lines) > REASONS_SHOWN:
        lines[REASONS_SHOWN:] = [f"  and {len(lines) - REASONS_SHOWN} other reasons"]
    for line in (f"Failures: {len(failures)} of {num_outcomes} outcomes", *lines):
        console.print(line, markup=False, soft_wrap=True)


def show_times(console: Console, steps: Sequence[Step]) -> None:
    """Where the trainer's time went, and how much of the scoring it did not feel."""
    table = Table(title="Where the time went, seconds", title_justify="left")
    for column in (
        "step",
        "sampling",
        "blocked\nin submit",
        "waited\nin collect",
        "scoring",
        "hidden",
    ):
        table.add_column(column, justify="right")
    for step in steps:
        table.add_row(str(step.number), *_seconds([step]))
    if len(steps) > 1:
        table.add_section()
        table.add_row("all", *_seconds(steps))
    console.print(table)
    console.print(
        "scoring: from the first submit to the last outcome; step 1 loads the models too\n"
        "hidden: the part of it in which the trainer went on sampling",
        style="dim",
    )


def _seconds(steps: Sequence[Step]) -> list[str]:
    sampling, submit, wait, scoring, hidden = (
        sum(getattr(step, name) for step in steps)
        for name in ("sampling_s", "submit_s", "wait_s", "scoring_s", "hidden_s")
    )
    share = f" ({hidden / scoring:.0%})" if scoring else ""
    return [
        f"{sampling:.1f}",
        f"{submit:.3f}",
        f"{wait:.1f}",
        f"{scoring:.1f}",
        f"{hidden:.1f}{share}",
    ]


def _spread(rewards: Any) -> str:
    """`0.71 ± 0.20` over `0.33 .. 1.00`; NaNs are left out."""
    there = rewards[~np.isnan(rewards)]
    if not there.size:
        return "none"
    return f"{there.mean():.2f} ± {there.std():.2f}\n{there.min():.2f} .. {there.max():.2f}"
