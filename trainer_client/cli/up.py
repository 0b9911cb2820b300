"""`rewardq up`: what a rewards file needs on this machine, started, watched, and stopped again."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tasks.catalog import GPU
from tasks.redis_needs import check_servers
from tasks.rewards import RewardConfig
from tasks.settings import Settings, load_settings, without_password
from trainer_client.cli.processes import Fleet, stop_signals, worker_command

BROKER_URL = "REWARDQ_BROKER_URL"
GPUS = "CUDA_VISIBLE_DEVICES"


@click.command()
@click.argument("rewards_yaml", type=click.Path(path_type=Path))
@click.option("--redis", "redis_url", metavar="URL", help=f"Use this Redis; else {BROKER_URL}, else one is started.")
@click.option(
    "--gpu-workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Workers on the queue gpu, one for each GPU in turn.",
)
def up(rewards_yaml: Path, redis_url: str | None, gpu_workers: int) -> None:
    """Start what REWARDS_YAML needs on this machine.

    That is a Redis if none is given, and a worker for each of its queues. Workers run in the current directory with
    this environment. Ctrl-C stops everything.
    """
    console = Console(highlight=False)
    queues = RewardConfig.from_yaml(rewards_yaml).queues
    given_url = redis_url or os.environ.get(BROKER_URL)
    settings = load_settings(**({"broker_url": given_url} if given_url else {}))
    if given_url:
        _check_redis(settings, queues)
    log_dir = Path(tempfile.mkdtemp(prefix="rewardq-up-"))

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    try:
        with stop_signals(), Fleet(log_dir, say) as fleet:
            try:
                url = given_url or fleet.start_redis()
                _start_workers(fleet, queues, gpu_workers, url)
                with console.status("waiting for the workers"):
                    fleet.wait_for_workers(load_settings(broker_url=url))
                _show(console, fleet, queues, gpu_workers, url, started_redis=not given_url)
                threading.Event().wait()
            except KeyboardInterrupt:
                say("stopping the workers; Ctrl-C again kills them")
    except KeyboardInterrupt:
        say("killed")
    say(f"all stopped; the logs are in {log_dir}")


def _check_redis(settings: Settings, queues: tuple[str, ...]) -> None:
    check_servers(settings, "worker", queues)  # as the workers that are started here will


def _start_workers(fleet: Fleet, queues: tuple[str, ...], gpu_workers: int, url: str) -> None:
    env = {**os.environ, BROKER_URL: url}
    gpus = _gpus() if gpu_workers > 1 else []
    for queue in queues:
        for i, name in enumerate(_worker_names(queue, gpu_workers)):
            own = {GPUS: gpus[i % len(gpus)]} if queue == GPU and gpus else {}
            fleet.start_worker(name, queue, {**env, **own}, Path.cwd())


def _gpus() -> list[str]:
    """The GPUs that workers here may use: those that the environment names, else all that there are."""
    given = os.environ.get(GPUS)
    if given is not None:
        return [gpu for gpu in given.split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()


def _worker_names(queue: str, gpu_workers: int) -> list[str]:
    if queue != GPU or gpu_workers == 1:
        return [f"worker-{queue}"]
    return [f"worker-{queue}-{i}" for i in range(1, gpu_workers + 1)]


def _show(
    console: Console, fleet: Fleet, queues: tuple[str, ...], gpu_workers: int, url: str, started_redis: bool
) -> None:
    table = Table("queue", "pid", "command", "log", box=None, pad_edge=False)
    by_name = {child.name: child for child in fleet.children}
    for queue in queues:
        for name in _worker_names(queue, gpu_workers):
            child = by_name[name]
            table.add_row(queue, str(child.pid), " ".join(worker_command(queue)), child.log_path.name)
    kept = " (started here; empty again when stopped)" if started_redis else ""
    console.print(f"Redis: {without_password(url)}{kept}", markup=False, soft_wrap=True)
    console.print(f"logs: {fleet.log_dir}\n", markup=False, soft_wrap=True)
    console.print(table)
    masked = " (with its password)" if without_password(url) != url else ""
    console.print(f"\nFor the trainer{masked}:", markup=False)
    console.print(f"  export {BROKER_URL}={shlex.quote(without_password(url))}", markup=False, soft_wrap=True)
    console.print("\nReady. Ctrl-C stops everything.", markup=False)
