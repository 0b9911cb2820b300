"""Images a second from `submit()` to the reward, beside the pattern in use today: `python -m benchmarks.throughput`."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import truediv
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks import http_pattern, images, pipeline
from benchmarks.ray_way import RayWay
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
class Contender:
    """One way to get rewards: what runs a round of it, and the processes that serve it."""

    run: Callable[[], pipeline.Round]
    pids: tuple[int, ...]
    is_apart: bool = False
    """Whether the first of the processes stands for the trainer, and not this one."""


@dataclass(frozen=True, slots=True)
class Result:
    """One round of a contender, and the processor time that it took."""

    round: pipeline.Round
    own_s: float
    """Of the process that stands for the trainer."""
    servers_s: float


@click.command()
@click.option(
    "--num-images",
    type=click.IntRange(min=16),
    default=256,
    show_default=True,
    help="Images in a round.",
)
@click.option(
    "--num-http-images",
    type=click.IntRange(min=16),
    default=64,
    show_default=True,
    help="The same over HTTP.",
)
@click.option(
    "--size",
    type=click.IntRange(min=8),
    default=1024,
    show_default=True,
    help="Pixels of a side.",
)
@click.option(
    "--rounds",
    "num_rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
)
@click.option(
    "--ray/--no-ray",
    "with_ray",
    default=True,
    show_default=True,
    help="Ray beside them: pip install 'rewardq[bench]'.",
)
def main(
    num_images: int, num_http_images: int, size: int, num_rounds: int, with_ray: bool
) -> None:
    """Measure the time from `submit()` to the reward of a model that does nothing."""
    console = Console(highlight=False)
    with console.status("drawing the images"):
        pixels = images.draw(max(num_images, num_http_images), size)
    own_pixels, http_pixels = pixels[:num_images], pixels[:num_http_images]
    with (
        stop_signals(),
        tempfile.TemporaryDirectory(prefix="rewardq-bench-") as logs,
        tempfile.TemporaryDirectory(
            prefix="rewardq-bench-", dir=SHARED_MEMORY
        ) as shared,
        Fleet(Path(logs), console.print) as fleet,
        console.status("starting") as status,
    ):
        settings, port = _start(fleet, Path(shared))
        with contextlib.ExitStack() as clients:
            contenders = _contenders(
                fleet, settings, port, own_pixels, http_pixels, clients
            )
            if with_ray:
                ray = clients.enter_context(RayWay(num_images, size))
                contenders["Ray"] = Contender(ray.run, ray.pids, is_apart=True)
            results = _measure(contenders, num_rounds, status.update)
        status.update("one chunk at a time")
        chunks = {}
        for queue, name in STORES.items():
            chunks[name] = pipeline.run_alone(settings[queue], queue, own_pixels)
    console.print(_table(results, size))
    console.print(_stages_table(chunks))


def _start(fleet: Fleet, shared: Path) -> tuple[dict[str, Settings], int]:
    """A Redis, a worker for each payload store, an HTTP server; the clients' settings by queue, the server's port."""
    url, port = fleet.start_redis(), free_port()
    env = {
        **os.environ,
        "REWARDQ_BROKER_URL": url,
        "REWARDQ_MODULES": "benchmarks.null_reward",
    }
    settings = {
        "redis": load_settings(broker_url=url),
        "shm": load_settings(broker_url=url, payload_url=shared.as_uri()),
    }
    for queue, own in settings.items():
        own_env = {**env, "REWARDQ_PAYLOAD_URL": own.payloads}
        fleet.start_worker(f"worker-{queue}", queue, own_env, ROOT)
    command = (sys.executable, "-m", "benchmarks.http_pattern", str(port))
    server = fleet.start("http", command, cwd=ROOT, is_server=True)
    fleet.wait_for(server, lambda: http_pattern.is_up(port))
    fleet.wait_for_workers(settings["redis"])
    return settings, port


def _contenders(
    fleet: Fleet,
    settings: Mapping[str, Settings],
    port: int,
    pixels: Sequence[PixelsHWC],
    http_pixels: Sequence[PixelsHWC],
    clients: contextlib.ExitStack,
) -> dict[str, Contender]:
    """Every contender by its name. The first is the pattern in use today, with which the others are compared."""
    pids = {child.name: child.pid for child in fleet.children}
    contenders = {}
    for num_threads in HTTP_THREADS:
        run = partial(_over_http, port, http_pixels, num_threads)
        contenders[f"HTTP x {num_threads}"] = Contender(run, (pids["http"],))
    for queue, name in STORES.items():
        client = clients.enter_context(pipeline.open_client(settings[queue], queue))
        run = partial(pipeline.run, client, pixels)
        servers = (pids["redis"], pids[f"worker-{queue}"])
        contenders[f"rewardq, {name}"] = Contender(run, servers)
    return contenders


def _measure(
    contenders: Mapping[str, Contender], num_rounds: int, say: Callable[[str], None]
) -> dict[str, list[Result]]:
    """Rounds of all contenders in turn, so that other load on the machine meets all alike; the first is not counted."""
    results: dict[str, list[Result]] = {name: [] for name in contenders}
    for i in range(num_rounds + 1):
        for name, contender in contenders.items():
            say(f"round {i} of {num_rounds}: {name}" if i else f"warming up: {name}")
            own_pids, server_pids = (os.getpid(),), contender.pids
            if contender.is_apart:
                own_pids, server_pids = contender.pids[:1], contender.pids[1:]
            own_s, servers_s = _processor_s(own_pids), _processor_s(server_pids)
            done = contender.run()
            result = Result(
                round=done,
                own_s=_processor_s(own_pids) - own_s,
                servers_s=_processor_s(server_pids) - servers_s,
            )
            if i:
                results[name].append(result)
    return results


def _processor_s(pids: Sequence[int]) -> float:
    """Processor time of these processes so far, as Linux counts it (in hundredths of a second)."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _over_http(
    port: int, pixels: Sequence[PixelsHWC], num_threads: int
) -> pipeline.Round:
    """A round in which the caller waits for every request, as it does today."""
    started = time.perf_counter()
    rewards = http_pattern.score(port, pixels, num_threads)
    total_s = time.perf_counter() - started
    assert rewards == [1.0] * len(pixels)
    return pipeline.Round(len(pixels), total_s, held_s=total_s)


def _table(results: Mapping[str, Sequence[Result]], size: int) -> Table:
    """Medians over rounds; a ratio is that of two contenders in the same round."""
    title = f"{size}x{size} uint8 on {os.cpu_count()} cores, medians"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("")
    for column in (
        "images/s",
        "from - to",
        "ratio",
        "held,\nms/image",
        "CPU: trainer,\nms/image",
        "servers,\nms/image",
    ):
        table.add_column(column, justify="right")

    today_rates = _rates(next(iter(results.values())))
    for name, own in results.items():
        rates = _rates(own)
        ratios = list(map(truediv, rates, today_rates))
        table.add_row(
            name,
            f"{statistics.median(rates):.3g}",
            f"{min(rates):.3g} - {max(rates):.3g}",
            f"{statistics.median(ratios):.3g}",
            _ms_an_image(own, lambda result: result.round.held_s),
            _ms_an_image(own, lambda result: result.own_s),
            _ms_an_image(own, lambda result: result.servers_s),
        )
    return table


def _rates(results: Sequence[Result]) -> list[float]:
    return [result.round.images_per_s for result in results]


def _ms_an_image(results: Sequence[Result], seconds: Callable[[Result], float]) -> str:
    ms = [1000 * seconds(result) / result.round.num_images for result in results]
    return f"{statistics.median(ms):.3g}"


def _stages_table(stores: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """Medians over chunks, by payload store."""
    title = f"\nA chunk of {pipeline.BATCH_SIZE} alone, ms/image"
    table = Table("stage", title=title, title_justify="left", box=None)
    medians = []
    for name, chunks in stores.items():
        table.add_column(name, justify="right")
        table.add_column("share", justify="right")
        medians.append({stage: _median_ms(chunks, stage) for stage in pipeline.STAGES})

    for stage in pipeline.STAGES:
        cells = []
        for of_store in medians:
            share = of_store[stage] / sum(of_store.values())
            cells += [f"{of_store[stage]:.2f}", f"{share:.0%}"]
        table.add_row(stage, *cells)

    totals = []
    for of_store in medians:
        totals += [f"{sum(of_store.values()):.2f}", ""]
    table.add_row("all", *totals)
    return table


def _median_ms(chunks: Sequence[Mapping[str, float]], stage: str) -> float:
    """Milliseconds an image."""
    seconds = statistics.median(chunk[stage] for chunk in chunks)
    return 1000 * seconds / pipeline.BATCH_SIZE


if __name__ == "__main__":
    main()
