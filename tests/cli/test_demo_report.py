from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from trainer_client import Failed, RewardBatch
from trainer_client.cli.demo_report import DemoStep, show_failures, show_rewards, show_times

NAN = float("nan")


def step() -> DemoStep:
    batch = RewardBatch(
        rewards={"OCR": np.array([0.25, 0.75, NAN, NAN, NAN], dtype=np.float32)},
        valid={"OCR": np.array([True, True, False, False, False])},
        failures=tuple(Failed(i, "OCR", "failed", "out of memory", 1) for i in (2, 3, 4)),
        info={"OCR": ({},) * 5},
        groups=("1: A", "1: A", "1: A", "1: B", "1: B"),
        timings={"submit_s": 0.001, "wait_s": 1.0, "span_s": 4.0, "hidden_s": 3.0},
        num_hits={"OCR": 0},
    )
    return DemoStep(1, batch, sampling_s=3.5)


def shown(show) -> str:
    console = Console(file=io.StringIO(), width=100)
    show(console, [step()])
    return console.file.getvalue()


def test_failed_samples_are_left_out_of_a_groups_mean_and_a_group_without_rewards_says_so():
    text = shown(show_rewards)
    assert "0.50 ± 0.25" in text
    assert "0.25 .. 0.75" in text
    assert "none" in text


def test_equal_reasons_are_one_line_with_their_count():
    assert shown(show_failures).splitlines() == ["Failures: 3 of 5 outcomes", "  3 x OCR: failed: out of memory"]


def test_times_show_the_share_of_scoring_that_was_hidden():
    row = next(line for line in shown(show_times).splitlines() if "75%" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["1", "3.5", "0.001", "1.0", "4.0", "3.0 (75%)"]
