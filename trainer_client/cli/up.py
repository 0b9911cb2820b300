"""`rewardq up`: starts what a rewards file needs on this machine, watches it, and stops it again."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tasks.catalog import GPU
from tasks.masking import without_password
from tasks.rewards import RewardConfig, RewardSpec
from tasks.servers.needs import check_servers
from tasks.settings import Settings, load_settings
from tasks.shadows import warning
from trainer_client.cli.commands import worker_command
from trainer_client.cli.fleet import PRELOAD, Fleet, stop_signals
from trainer_client.cli.lines import print_line
from trainer_client.cli.readiness import tell_who_is_back, wait_until_ready

BROKER_URL, MODULES = "REWARDQ_BROKER_URL", "REWARDQ_MODULES"
GPUS = "CUDA_VISIBLE_DEVICES"

WAIT_S = 1800.0
"""Seconds until all is ready: weights may have to be downloaded, and a judge takes minutes to start."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is started for a rewards file, and what the user is told of it."""

    config: RewardConfig
    queues: tuple[str, ...]
    gpu_workers: int
    env: Mapping[str, str]
    """Environment of the workers, without the Redis and the GPU of each."""
    notes: list[str] = field(default_factory=list)


@click.command()
@click.argument("rewards_yaml", type=click.Path(path_type=Path))
@click.option(
    "--redis",
    "redis_url",
    metavar="URL",
    help=f"Use this Redis; else {BROKER_URL}, else one is started. Write a URL with a password into {BROKER_URL}.",
)
@click.option(
    "--gpu-workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Workers on the queue gpu, one for each GPU in turn.",
)
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0, min_open=True),
    default=WAIT_S,
    show_default=True,
    metavar="SECONDS",
    help="How long models may take to load, and judges and reward servers to answer; then all is stopped, status 2.",
)
@click.option(
    "--no-wait",
    is_flag=True,
    help="Go on though a judge or a reward server does not answer yet.",
)
def up(
    rewards_yaml: Path,
    redis_url: str | None,
    gpu_workers: int,
    wait_s: float,
    no_wait: bool,
) -> None:
    """Start what REWARDS_YAML needs on this machine.

    That is a Redis if none is given, and a worker for each of its queues, which loads the rewards of the file. It says
    Ready when each of the rewards can be scored. Workers run in the current directory with this environment, and may
    import the modules of the file's own classes. Ctrl-C stops everything.
    """
    console = Console(highlight=False)
    say = partial(print_line, console)
    given_url = redis_url or os.environ.get(BROKER_URL)
    settings = load_settings(**({"broker_url": given_url} if given_url else {}))
    plan = _plan(rewards_yaml, settings, gpu_workers)
    if given_url:
        _check_redis(settings, plan.queues)
    log_dir = Path(tempfile.mkdtemp(prefix="rewardq-up-"))
    try:
        with stop_signals(), Fleet(log_dir, say) as fleet:
            try:
                url = given_url or fleet.start_redis()
                _start_workers(fleet, plan, url)
                _show(console, fleet, plan, url, started_redis=not given_url)
                unanswered = _wait(console, fleet, plan, url, wait_s, no_wait)
                _say_ready(console, url, not given_url, unanswered)
                tell_who_is_back(fleet, load_settings(broker_url=url), say)
            except KeyboardInterrupt:
                say("stopping the workers; Ctrl-C again kills them")
    except KeyboardInterrupt:
        say("killed")
    say(f"all stopped; the logs are in {log_dir}")


def _plan(rewards_yaml: Path, settings: Settings, gpu_workers: int) -> Plan:
    """What to start, with the classes of the file allowed and its rewards preloaded.

    Raises:
        ConfigError: The file is wrong.
        UnknownRewardError: A training reward is not built here.
    """
    config = RewardConfig.from_yaml(rewards_yaml)
    config.of("train")
    built, notes = [], []
    for reward in (*config.rewards, *config.eval_rewards):
        if reward.is_built:
            built.append(reward)
        else:
            notes.append(
                f"{reward.name}: {reward.reward_model} is not built here: it cannot be scored"
            )

    env = dict(os.environ)
    modules = _modules(built, settings)
    if modules:
        env[MODULES] = ",".join((*settings.allowed_modules, *modules))
        notes.append(
            f"{MODULES}={env[MODULES]} ({', '.join(modules)} as {rewards_yaml.name} names it)"
        )
    notes += _set_preload(env, rewards_yaml, _more_than_fit(built, settings))
    shadow = warning(Path.cwd())
    if shadow:
        notes.append(shadow)

    queues = tuple(dict.fromkeys(reward.queue for reward in built))
    return Plan(config, queues, gpu_workers, env, notes)


def _set_preload(
    env: dict[str, str], rewards_yaml: Path, too_many: str | None
) -> list[str]:
    """Have workers preload the file unless it has `too_many` models; returns what the user is told."""
    if too_many:
        env.pop(PRELOAD, None)
        return [f"not preloaded, and so not tried: {too_many}"]
    replaced = env.get(PRELOAD)
    env[PRELOAD] = str(rewards_yaml.resolve())
    if replaced:
        return [f"{PRELOAD}={replaced} is not used: the rewards file is preloaded"]
    return []


def _modules(rewards: list[RewardSpec], settings: Settings) -> list[str]:
    """The modules of the file's own classes that workers may not import yet."""
    allowed = list(settings.allowed_modules)
    missing = []
    for reward in rewards:
        module = reward.reward_model.rpartition(".")[0]
        is_allowed = any(_is_within(module, known) for known in allowed)
        if not reward.is_builtin and not is_allowed:
            allowed.append(module)
            missing.append(module)
    return missing


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _more_than_fit(rewards: list[RewardSpec], settings: Settings) -> str | None:
    """Which queue has more models than a worker may keep."""
    models_of: dict[str, set[str]] = {}
    for reward in rewards:
        models = models_of.setdefault(reward.queue, set())
        if reward.is_local and not reward.counts_launch:
            models.add(reward.part.fingerprint)
    for queue, models in models_of.items():
        if settings.max_models and len(models) > settings.max_models:
            return f"queue {queue} has {len(models)} models, more than REWARDQ_MAX_MODELS={settings.max_models}"
    return None


def _check_redis(settings: Settings, queues: tuple[str, ...]) -> None:
    # As the workers that are started here will check it: what they lack is said before anything is started.
    check_servers(settings, "worker", queues)


def _start_workers(fleet: Fleet, plan: Plan, url: str) -> None:
    env = {**plan.env, BROKER_URL: url}
    gpus = _gpus() if plan.gpu_workers > 1 else []
    for queue in plan.queues:
        for i, name in enumerate(_worker_names(queue, plan.gpu_workers)):
            own = {GPUS: gpus[i % len(gpus)]} if queue == GPU and gpus else {}
            fleet.start_worker(name, queue, {**env, **own}, Path.cwd())


def _wait(
    console: Console, fleet: Fleet, plan: Plan, url: str, wait_s: float, no_wait: bool
) -> tuple[str, ...]:
    """Wait until each reward can be scored; returns the servers that do not answer, a line each."""
    say = partial(print_line, console)
    settings = load_settings(broker_url=url)
    with console.status("waiting until each reward can be scored"):
        return wait_until_ready(
            fleet, plan.config, settings, say, wait_s, servers=not no_wait
        )


def _say_ready(
    console: Console, url: str, started_redis: bool, unanswered: tuple[str, ...]
) -> None:
    """Tell what to export for the trainer.

    The password of a Redis that was started here stands nowhere else. That of yours you have, and it stays out of
    terminals and their logs.
    """
    say = partial(print_line, console)
    for line in unanswered:
        say(f"not ready: {line}")
    shown = url if started_redis else without_password(url)
    masked = " (with its password)" if shown != url else ""
    say(f"\nFor the trainer{masked}:")
    say(f"  export {BROKER_URL}={shlex.quote(shown)}")
    ready = "Ready but for what is above." if unanswered else "Ready."
    say(f"\n{ready} Ctrl-C stops everything.")


def _gpus() -> list[str]:
    """The GPUs that workers here may use: those that `CUDA_VISIBLE_DEVICES` names, else all of the machine."""
    given = os.environ.get(GPUS)
    if given is not None:
        return [gpu for gpu in given.split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(
        command, capture_output=True, text=True, check=False
    ).stdout.split()


def _worker_names(queue: str, gpu_workers: int) -> list[str]:
    if queue != GPU or gpu_workers == 1:
        return [f"worker-{queue}"]
    return [f"worker-{queue}-{i}" for i in range(1, gpu_workers + 1)]


def _show(
    console: Console, fleet: Fleet, plan: Plan, url: str, started_redis: bool
) -> None:
    table = Table("queue", "pid", "command", "log", box=None, pad_edge=False)
    by_name = {child.name: child for child in fleet.children}
    for queue in plan.queues:
        for name in _worker_names(queue, plan.gpu_workers):
            child = by_name[name]
            table.add_row(
                queue,
                str(child.pid),
                " ".join(worker_command(queue)),
                child.log_path.name,
            )
    kept = " (started here; empty again when stopped)" if started_redis else ""
    print_line(console, f"Redis: {without_password(url)}{kept}")
    print_line(console, f"logs: {fleet.log_dir}")
    for note in plan.notes:
        print_line(console, note)
    console.print()
    console.print(table)
