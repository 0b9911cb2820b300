"""How well one worker keeps a judge occupied: `python -m benchmarks.judges`.

N requests of L seconds with C in flight take at least N * L / C; the ratio is the time taken over that. The steady
state is from when C requests were first in flight until the last request came in; there the ratio is that of C to the
number in flight.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks import images, slow_judge
from tasks.catalog import VLM
from tasks.media import PixelsHWC
from tasks.settings import Settings, load_settings
from trainer_client import RewardClient, Sample
from trainer_client.cli.commands import JUDGE_CALLS, free_port
from trainer_client.cli.fleet import Fleet, stop_signals

ROOT = Path(__file__).parents[1]
SMALL, LARGE = 64, 1024
"""Pixels of a side."""

SUBMIT_SIZE = 16
COLLECT_S = 600.0
TARGET = 1.1


@dataclass(frozen=True, slots=True)
class Run:
    """One run: its requests, and how its time compares with the least there is."""

    name: str
    num_requests: int
    least_s: float
    """N * L / C."""
    whole_s: float
    """From when the first request came in until the last was answered."""
    steady: float
    """Time over the least in the steady state."""


@click.command()
@click.option(
    "--num-small",
    type=click.IntRange(min=64),
    default=2000,
    show_default=True,
    help="Requests of 0.5 s.",
)
@click.option(
    "--num-large",
    type=click.IntRange(min=64),
    default=320,
    show_default=True,
    help="Requests of 2 s.",
)
def main(num_small: int, num_large: int) -> None:
    """Measure 0.5 s requests with small images, then 2 s requests with 1024x1024 images as JPEG.

    There are fewer large images, which are all different: 2,000 of them are 6 GB of pixels.
    """
    console = Console(highlight=False)
    with (
        stop_signals(),
        tempfile.TemporaryDirectory(prefix="rewardq-bench-") as folder,
        Fleet(Path(folder), console.print) as fleet,
        console.status("starting") as status,
    ):
        settings, port = _start(fleet)
        runs = []
        for size, seconds, num in ((SMALL, "0.5", num_small), (LARGE, "2", num_large)):
            status.update(f"drawing {num} images of {size}x{size}")
            pixels = images.draw(num, size)
            status.update(f"{num} requests of {seconds} s with {size}x{size} images")
            runs.append(
                _run(settings, port, f"{seconds} s, {size}x{size}", seconds, pixels)
            )
            del pixels
    console.print(_table(runs))


def _start(fleet: Fleet) -> tuple[Settings, int]:
    """A Redis, the judge, a worker by the documented command; the client's settings, the judge's port."""
    url, port = fleet.start_redis(), free_port()
    command = (sys.executable, "-m", "benchmarks.slow_judge", str(port))
    judge = fleet.start("judge", command, cwd=ROOT, is_server=True)
    fleet.start_worker("worker", VLM, {**os.environ, "REWARDQ_BROKER_URL": url}, ROOT)
    settings = load_settings(broker_url=url)
    fleet.wait_for(judge, lambda: slow_judge.is_up(port))
    fleet.wait_for_workers(settings)
    return settings, port


def _run(
    settings: Settings, port: int, name: str, seconds: str, pixels: Sequence[PixelsHWC]
) -> Run:
    reward = {
        "name": "judge",
        "reward_model": "vllm_evaluate",
        "api_base_url": f"http://{slow_judge.HOST}:{port}/v1",
        "vlm_model": seconds,
    }
    run = f"bench-{time.time_ns()}"
    with RewardClient.from_dict({"rewards": reward}, run, settings=settings) as client:
        for start in range(0, len(pixels), SUBMIT_SIZE):
            samples = []
            for i, image in enumerate(pixels[start : start + SUBMIT_SIZE], start):
                samples.append(Sample(f"a picture, {i}", image))
            client.submit(samples)
        batch = client.collect(COLLECT_S, progress=False)
    assert not batch.failures

    times = slow_judge.take_times(port)
    assert len(times) == len(pixels), f"{len(times)} requests, {len(pixels)} samples"
    starts, ends = zip(*times, strict=True)
    return Run(
        name=name,
        num_requests=len(pixels),
        least_s=len(pixels) * float(seconds) / JUDGE_CALLS,
        whole_s=max(ends) - min(starts),
        steady=steady_ratio(times, float(seconds), JUDGE_CALLS),
    )


def steady_ratio(
    times: Sequence[tuple[float, float]], seconds: float, most: int
) -> float:
    """Time taken over the least possible, between when the `most`-th request came in and when the last came in.

    A request counts as `seconds` of work however long it took; of a request that lies partly within, that share counts.
    """
    starts = sorted(start for start, _ in times)
    begins, ends = starts[most - 1], starts[-1]
    work = 0.0
    for start, end in times:
        within_s = max(0.0, min(end, ends) - max(start, begins))
        work += seconds * within_s / (end - start)
    return (ends - begins) * most / work


def _table(runs: Sequence[Run]) -> Table:
    table = Table(
        title=f"{JUDGE_CALLS} requests in flight, one worker, {os.cpu_count()} cores for everything",
        title_justify="left",
        box=None,
    )
    columns = ("", "requests", "N * L / C, s", "taken, s", "ratio, whole run")
    for column in (*columns, f"steady state (aim: {TARGET})"):
        table.add_column(column, justify="right")
    for run in runs:
        table.add_row(
            run.name,
            str(run.num_requests),
            f"{run.least_s:.1f}",
            f"{run.whole_s:.1f}",
            f"{run.whole_s / run.least_s:.3f}",
            f"{run.steady:.3f}",
        )
    return table


if __name__ == "__main__":
    main()
