"""Images a second from `submit()` to the reward, beside the pattern in use today: `python -m benchmarks.throughput`."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks import http_pattern, images, pipeline
from tasks.media import PixelsHWC
from tasks.settings import Settings, load_settings
from trainer_client.cli.commands import free_port
from trainer_client.cli.fleet import Fleet, stop_signals

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = Path("/dev/shm")
HTTP_THREADS = (1, 4)
STORES = {"redis": "Redis", "shm": "/dev/shm"}
"""Queue of the worker that uses a payload store, and what the store is called."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to get rewards: what runs a round of it, and the processes that serve it."""

    run: Callable[[], pipeline.Round]
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """One round of a way, and the processor time that it took."""

    round: pipeline.Round
    own_s: float
    """Of this process, which stands for the trainer."""
    servers_s: float


@click.command()
@click.option("--num-images", type=click.IntRange(min=16), default=256, show_default=True, help="Images in a round.")
@click.option(
    "--num-http-images", type=click.IntRange(min=16), default=64, show_default=True, help="The same over HTTP."
)
@click.option("--size", type=click.IntRange(min=8), default=1024, show_default=True, help="Pixels of a side.")
@click.option("--rounds", "num_rounds", type=click.IntRange(min=1), default=3, show_default=True)
def main(num_images: int, num_http_images: int, size: int, num_rounds: int) -> None:
    """Measure the way from `submit()` to the reward of a model that does nothing."""
    console = Console(highlight=False)
    with console.status("drawing the images"):
        pixels = images.draw(max(num_images, num_http_images), size)
    with stop_signals(), tempfile.TemporaryDirectory(prefix="rewardq-bench-") as logs:
        shared = tempfile.TemporaryDirectory(prefix="rewardq-bench-", dir=SHARED_MEMORY)
        with shared as folder, Fleet(Path(logs), console.print) as fleet, console.status("starting") as status:
            settings, port = _start(fleet, Path(folder))
            ways = _ways(fleet, settings, port, pixels[:num_images], pixels[:num_http_images])
            results = _measure(ways, num_rounds, status.update)
            status.update("one chunk at a time")
            steps = {name: pipeline.run_alone(settings[q], q, pixels[:num_images]) for q, name in STORES.items()}
    console.print(_table(results, size))
    console.print(_steps_table(steps))


def _start(fleet: Fleet, shared: Path) -> tuple[dict[str, Settings], int]:
    """A Redis, a worker for each payload store, an HTTP server; the clients' settings by queue, the server's port."""
    url, port = fleet.start_redis(), free_port()
    env = {**os.environ, "REWARDQ_BROKER_URL": url, "REWARDQ_MODULES": "benchmarks.null_reward"}
    settings = {
        "redis": load_settings(broker_url=url),
        "shm": load_settings(broker_url=url, payload_url=shared.as_uri()),
    }
    for queue, own in settings.items():
        fleet.start_worker(f"worker-{queue}", queue, {**env, "REWARDQ_PAYLOAD_URL": own.payloads}, ROOT)
    server = fleet.start("http", (sys.executable, "-m", "benchmarks.http_pattern", str(port)), cwd=ROOT, is_server=True)
    fleet.wait_for(server, lambda: http_pattern.is_up(port))
    fleet.wait_for_workers(settings["redis"])
    return settings, port


def _ways(
    fleet: Fleet,
    settings: Mapping[str, Settings],
    port: int,
    pixels: Sequence[PixelsHWC],
    http_pixels: Sequence[PixelsHWC],
) -> dict[str, Way]:
    """Every way by its name; the pattern in use today is the first, and what the others are compared with."""
    pids = {child.name: child.pid for child in fleet.children}
    ways = {f"HTTP x {n}": Way(partial(_over_http, port, http_pixels, n), (pids["http"],)) for n in HTTP_THREADS}
    for queue, name in STORES.items():
        servers = (pids["redis"], pids[f"worker-{queue}"])
        ways[f"rewardq, {name}"] = Way(partial(pipeline.run, settings[queue], queue, pixels), servers)
    return ways


def _measure(ways: Mapping[str, Way], num_rounds: int, say: Callable[[str], None]) -> dict[str, list[Result]]:
    """Rounds of all ways in turn, so that whatever else the machine does meets them alike; the first is not counted."""
    results: dict[str, list[Result]] = {name: [] for name in ways}
    for i in range(num_rounds + 1):
        for name, way in ways.items():
            say(f"round {i} of {num_rounds}: {name}" if i else f"warming up: {name}")
            own_s, servers_s = time.process_time(), _processor_s(way.pids)
            done = way.run()
            if i:
                results[name].append(Result(done, time.process_time() - own_s, _processor_s(way.pids) - servers_s))
    return results


def _processor_s(pids: Sequence[int]) -> float:
    """Processor time of these processes so far, as Linux counts it (in hundredths of a second)."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _over_http(port: int, pixels: Sequence[PixelsHWC], num_threads: int) -> pipeline.Round:
    """A round in which the caller waits for every request, as it does today."""
    started = time.perf_counter()
    assert http_pattern.score(port, pixels, num_threads) == [1.0] * len(pixels)
    total_s = time.perf_counter() - started
    return pipeline.Round(len(pixels), total_s, held_s=total_s)


def _table(results: Mapping[str, Sequence[Result]], size: int) -> Table:
    """Medians over rounds; a ratio is that of two ways in the same round."""
    table = Table(title=f"{size}x{size} uint8 on {os.cpu_count()} cores, medians", title_justify="left", box=None)
    table.add_column("")
    columns = ("images/s", "from - to", "ratio", "held,\nms/image", "CPU: trainer,\nms/image", "servers,\nms/image")
    for column in columns:
        table.add_column(column, justify="right")
    today = next(iter(results.values()))
    for name, own in results.items():
        rates = [r.round.images_per_s for r in own]
        ratios = [r.round.images_per_s / t.round.images_per_s for r, t in zip(own, today, strict=True)]
        table.add_row(
            name,
            f"{statistics.median(rates):.3g}",
            f"{min(rates):.3g} - {max(rates):.3g}",
            f"{statistics.median(ratios):.3g}",
            _ms_an_image(own, lambda r: r.round.held_s),
            _ms_an_image(own, lambda r: r.own_s),
            _ms_an_image(own, lambda r: r.servers_s),
        )
    return table


def _ms_an_image(results: Sequence[Result], seconds: Callable[[Result], float]) -> str:
    return f"{statistics.median(1000 * seconds(r) / r.round.num_images for r in results):.3g}"


def _steps_table(stores: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """Medians over chunks."""
    title = f"\nA chunk of {pipeline.BATCH_SIZE} alone, ms/image"
    table = Table("step", title=title, title_justify="left", box=None)
    columns = []
    for name, chunks in stores.items():
        table.add_column(name, justify="right")
        table.add_column("share", justify="right")
        columns.append(
            {s: 1000 * statistics.median(c[s] for c in chunks) / pipeline.BATCH_SIZE for s in pipeline.STEPS}
        )
    for step in pipeline.STEPS:
        cells = ((f"{column[step]:.2f}", f"{column[step] / sum(column.values()):.0%}") for column in columns)
        table.add_row(step, *(cell for pair in cells for cell in pair))
    table.add_row("all", *(cell for column in columns for cell in (f"{sum(column.values()):.2f}", "")))
    return table


if __name__ == "__main__":
    main()
