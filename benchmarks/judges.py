"""How busy a worker keeps a judge: time taken over N * L / C, the least there is: `python -m benchmarks.judges`.

N requests of L seconds with C in flight take at least N * L / C. The steady state is from when C requests were first
in flight until the last one came in; there the ratio is that of C to the number in flight.
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
    """From the first request's coming in to the last one's going out."""
    steady: float
    """Time over the least in the steady state."""


@click.command()
@click.option("--num-small", type=click.IntRange(min=64), default=2000, show_default=True, help="Requests of 0.5 s.")
@click.option("--num-large", type=click.IntRange(min=64), default=320, show_default=True, help="Requests of 2 s.")
def main(num_small: int, num_large: int) -> None:
    """Measure 0.5 s requests with small images, then 2 s requests with 1024x1024 images as JPEG.

    There are fewer of the large ones, which are all different: 2,000 of them are 6 GB of pixels.
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
            runs.append(_run(settings, port, f"{seconds} s, {size}x{size}", seconds, pixels))
            del pixels
    console.print(_table(runs))


def _start(fleet: Fleet) -> tuple[Settings, int]:
    """A Redis, the judge, a worker by the documented command; the client's settings, the judge's port."""
    url, port = fleet.start_redis(), free_port()
    judge = fleet.start("judge", (sys.executable, "-m", "benchmarks.slow_judge", str(port)), cwd=ROOT, is_server=True)
    fleet.start_worker("worker", VLM, {**os.environ, "REWARDQ_BROKER_URL": url}, ROOT)
    settings = load_settings(broker_url=url)
    fleet.wait_for(judge, lambda: slow_judge.is_up(port))
    fleet.wait_for_workers(settings)
    return settings, port


def _run(settings: Settings, port: int, name: str, seconds: str, pixels: Sequence[PixelsHWC]) -> Run:
    reward = {
        "name": "judge",
        "reward_model": "vllm_evaluate",
        "api_base_url": f"http://{slow_judge.HOST}:{port}/v1",
        "vlm_model": seconds,
    }
    run = f"bench-{time.time_ns()}"
    with RewardClient.from_dict({"rewards": reward}, run=run, settings=settings) as client:
        for i in range(0, len(pixels), SUBMIT_SIZE):
            client.submit(
                [Sample(prompt=f"a picture, {i + j}", image=p) for j, p in enumerate(pixels[i : i + SUBMIT_SIZE])]
            )
        batch = client.collect(COLLECT_S, progress=False)
    assert not batch.failures
    times = slow_judge.take_times(port)
    assert len(times) == len(pixels), f"{len(times)} requests for {len(pixels)} samples"
    least_s = len(pixels) * float(seconds) / JUDGE_CALLS
    whole_s = max(end for _, end in times) - min(start for start, _ in times)
    return Run(name, len(pixels), least_s, whole_s, steady_ratio(times, float(seconds), JUDGE_CALLS))


def steady_ratio(times: Sequence[tuple[float, float]], seconds: float, most: int) -> float:
    """Time taken over the least there is, between the `most`-th request's coming in and the last one's.

    A request counts as `seconds` of work however long it took, in the share that lies between.
    """
    starts = sorted(start for start, _ in times)
    begins, ends = starts[most - 1], starts[-1]
    work = sum(seconds * max(0.0, min(end, ends) - max(start, begins)) / (end - start) for start, end in times)
    return (ends - begins) * most / work


def _table(runs: Sequence[Run]) -> Table:
    table = Table(
        title=f"{JUDGE_CALLS} requests in flight, one worker, {os.cpu_count()} cores for everything",
        title_justify="left",
        box=None,
    )
    for column in ("", "requests", "N * L / C, s", "taken, s", "ratio, whole run", f"steady state (aim: {TARGET})"):
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
