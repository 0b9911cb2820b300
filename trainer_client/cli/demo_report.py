"""What `rewardq demo` shows at its end: rewards by group, failures, and where the time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from trainer_client.cli.lines import print_line

REASONS_SHOWN = 10

UNITS = {"OCR": "[0, 1]", "jpeg_compressibility": "-kB", "vllm_evaluate": "[0, 1]"}


@dataclass(frozen=True, slots=True)
class DemoStep:
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
        """Outcomes that are failures."""
        return len(self.batch.failures)


def show_rewards(console: Console, steps: Sequence[DemoStep]) -> None:
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
            cells = []
            for name in names:
                rewards = np.asarray(step.batch.rewards[name])
                cells.append(_spread(rewards[is_member]))
            words = group.partition(": ")[2]
            shown = f"{words}\n{is_member.sum()} images"
            table.add_row(str(step.number), shown, *cells)
        table.add_section()
    console.print(table)


def show_failures(console: Console, steps: Sequence[DemoStep]) -> None:
    """How many outcomes failed, and why."""
    num_outcomes = num_failed = 0
    reasons: Counter[tuple[str, str, str]] = Counter()
    for step in steps:
        num_outcomes += len(step.batch) * len(step.batch.rewards)
        num_failed += step.num_failed
        for failed in step.batch.failures:
            reasons[failed.reward, failed.kind, failed.message] += 1

    print_line(console, f"Failures: {num_failed} of {num_outcomes} outcomes")
    for (reward, kind, message), num in reasons.most_common(REASONS_SHOWN):
        print_line(console, f"  {num} x {reward}: {kind}: {message}")
    if len(reasons) > REASONS_SHOWN:
        print_line(console, f"  and {len(reasons) - REASONS_SHOWN} other reasons")


def show_times(console: Console, steps: Sequence[DemoStep]) -> None:
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


def _seconds(steps: Sequence[DemoStep]) -> list[str]:
    sampling = submit = wait = scoring = hidden = 0.0
    for step in steps:
        sampling += step.sampling_s
        submit += step.submit_s
        wait += step.wait_s
        scoring += step.scoring_s
        hidden += step.hidden_s
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
    known = rewards[~np.isnan(rewards)]
    if not known.size:
        return "none"
    mean = f"{known.mean():.2f} ± {known.std():.2f}"
    return f"{mean}\n{known.min():.2f} .. {known.max():.2f}"
