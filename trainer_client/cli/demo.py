"""`rewardq demo`: everything at work on this machine, with posters instead of a generator's samples."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from tasks.catalog import GPU, VLM
from tasks.errors import MissingExtraError
from tasks.masking import without_password
from tasks.settings import Settings, load_settings
from trainer_client import RewardClient, Sample
from trainer_client.cli.child import Child
from trainer_client.cli.commands import LOOPBACK, free_port, worker_command
from trainer_client.cli.demo_report import (
    DemoStep,
    show_failures,
    show_rewards,
    show_times,
)
from trainer_client.cli.fleet import Fleet, stop_signals
from trainer_client.cli.lines import print_line
from trainer_client.cli.posters import SUBJECTS, Subject, draw_group

PROMPTS_A_STEP = 2
GROUP_SIZE = 8
SAMPLING_S = 0.25
"""Seconds the simulated generator takes for an image."""
SAMPLING_BATCH = 4
"""Images it makes at once; they are submitted while it makes the next."""

COLLECT_S = 120.0
GRACE_S = 3.0
"""Short, since no work of a demo has to be finished."""

NEEDED = ("rapidocr", "onnxruntime", "rapidfuzz", "openai")
NEEDED_BY_STANDIN = ("fastapi", "uvicorn")
STANDIN_MODEL = "sharpness-standin"
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


@click.command()
@click.option(
    "--steps",
    "num_steps",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Training steps.",
)
@click.option(
    "--judge-url",
    metavar="URL",
    help="A real judge: an OpenAI-compatible API, with its /v1.",
)
@click.option(
    "--vlm-model", metavar="NAME", help="The judge's model, as its server lists it."
)
@click.option(
    "--keep-logs",
    is_flag=True,
    help="Leave the logs of Redis, workers and judge where they are.",
)
def demo(
    num_steps: int, judge_url: str | None, vlm_model: str | None, keep_logs: bool
) -> None:
    """Play a trainer, with everything on this machine.

    Scores posters drawn at varying quality by OCR, by JPEG size, and by a judge. Starts a Redis, two workers and a
    stand-in judge, and stops them all at the end.
    """
    if bool(judge_url) != bool(vlm_model):
        raise click.UsageError(
            "--judge-url and --vlm-model go together: a real judge and its model"
        )
    _check_installed(NEEDED if judge_url else (*NEEDED, *NEEDED_BY_STANDIN))
    console = Console(highlight=False)
    say = partial(print_line, console)
    try:
        with (
            stop_signals(),
            _log_dir(keep_logs, say) as log_dir,
            Fleet(log_dir, say, GRACE_S) as fleet,
        ):
            steps = _run(console, fleet, num_steps, judge_url, vlm_model)
            _report(console, steps)
            if any(step.num_failed for step in steps):
                sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; everything is stopped")
        sys.exit(INTERRUPTED)


def _run(
    console: Console,
    fleet: Fleet,
    num_steps: int,
    judge_url: str | None,
    vlm_model: str | None,
) -> list[DemoStep]:
    """Start everything, and train."""
    with console.status("starting"):
        settings = _settings(fleet.start_redis())
        env = _worker_env(settings)
        for queue in (GPU, VLM):
            fleet.start_worker(f"worker-{queue}", queue, env, fleet.log_dir)
        is_standin = judge_url is None
        judge_url = judge_url or _start_standin(fleet)
        vlm_model = vlm_model or STANDIN_MODEL
        fleet.wait_for_workers(settings)

    for queue in (GPU, VLM):
        _print_row(console, f"worker for {queue}", " ".join(worker_command(queue)))
    shown = without_password(settings.broker)
    _print_row(console, "Redis", f"{shown}, empty, for this demo only")
    what = "a stand-in that only measures sharpness," if is_standin else vlm_model
    _print_row(console, "judge", f"{what} {judge_url}")
    print_line(console, "")

    rewards = [
        {"reward_model": "OCR", "batch_size": SAMPLING_BATCH},
        {"reward_model": "jpeg_compressibility"},
        {
            "reward_model": "vllm_evaluate",
            "api_base_url": judge_url,
            "vlm_model": vlm_model,
        },
    ]
    return _train(console, {"rewards": rewards}, settings, num_steps)


def _print_row(console: Console, name: str, text: str) -> None:
    print_line(console, f"{name:15}{text}")


def _train(
    console: Console, rewards: dict[str, Any], settings: Settings, num_steps: int
) -> list[DemoStep]:
    """Sample, submit and collect, step by step, as a trainer does."""
    steps = []
    with RewardClient.from_dict(rewards, run="demo", settings=settings) as client:
        for number in range(1, num_steps + 1):
            with _sampling_bar(console, number) as advance:
                sampling_s = _sample_and_submit(client, number, advance)
            batch = client.collect(timeout_s=COLLECT_S, on_failure="nan", progress=True)
            steps.append(DemoStep(number, batch, sampling_s))
    return steps


def _sample_and_submit(
    client: RewardClient, step: int, advance: Callable[[], None]
) -> float:
    """Make the images of a step and submit each batch at once; returns the seconds spent on sampling."""
    sampling_s = 0.0
    for subject in _subjects(step):
        group = f"{step}: {subject.words}"
        for images in _sample(subject, step):
            started = time.monotonic()
            for _ in images:
                time.sleep(SAMPLING_S)
                advance()
            sampling_s += time.monotonic() - started

            samples = []
            for image in images:
                samples.append(Sample(subject.prompt, image, group=group))
            client.submit(samples, group_size=GROUP_SIZE)
    return sampling_s


def _subjects(step: int) -> list[Subject]:
    first = (step - 1) * PROMPTS_A_STEP
    return [SUBJECTS[(first + i) % len(SUBJECTS)] for i in range(PROMPTS_A_STEP)]


def _sample(subject: Subject, step: int) -> Iterator[list[Image.Image]]:
    """A group of images, in batches as a generator makes them."""
    images = draw_group(subject, GROUP_SIZE, seed=step)
    for start in range(0, GROUP_SIZE, SAMPLING_BATCH):
        yield images[start : start + SAMPLING_BATCH]


@contextmanager
def _sampling_bar(console: Console, step: int) -> Iterator[Callable[[], None]]:
    """A bar of the images of a step; gives what advances it by one."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(
            f"step {step}: sampling images", total=PROMPTS_A_STEP * GROUP_SIZE
        )
        yield lambda: progress.advance(bar)


def _report(console: Console, steps: list[DemoStep]) -> None:
    console.print()
    show_rewards(console, steps)
    show_failures(console, steps)
    console.print()
    show_times(console, steps)


def _settings(url: str) -> Settings:
    """The demo's own servers only: a `REWARDQ_*` variable of the user's must not lead it to servers in use."""
    return load_settings(
        broker_url=url, result_url="", payload_url="", check_media=True
    )


def _worker_env(settings: Settings) -> dict[str, str]:
    env = {}
    for name, value in os.environ.items():
        if not name.startswith("REWARDQ_"):
            env[name] = value
    env["REWARDQ_BROKER_URL"] = settings.broker
    direct = [env[name] for name in ("NO_PROXY", "no_proxy") if env.get(name)]
    env["NO_PROXY"] = env["no_proxy"] = ",".join([*direct, LOOPBACK])
    return env


def _start_standin(fleet: Fleet) -> str:
    port = free_port()
    module = ("-m", "trainer_client.cli.standin_judge")
    command = (sys.executable, *module, "--port", str(port))
    judge = fleet.start("judge", command, is_server=True)
    url = f"http://{LOOPBACK}:{port}/v1"
    _wait_for_answer(fleet, judge, f"{url}/models")
    return url


def _wait_for_answer(fleet: Fleet, child: Child, url: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def answers() -> bool:
        try:
            with opener.open(url, timeout=1):
                return True
        except (urllib.error.URLError, OSError):
            return False

    fleet.wait_for(child, answers)


@contextmanager
def _log_dir(keep: bool, say: Callable[[str], None]) -> Iterator[Path]:
    """A folder for logs; it stays if asked for, or if something went wrong."""
    path = Path(tempfile.mkdtemp(prefix="rewardq-demo-"))
    try:
        yield path
    except KeyboardInterrupt:
        if not keep:
            shutil.rmtree(path)
        raise
    except BaseException:
        say(f"the logs are in {path}")
        raise
    if keep:
        say(f"the logs are in {path}")
    else:
        shutil.rmtree(path)


def _check_installed(modules: tuple[str, ...]) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError("rewardq demo", module, "demo")
