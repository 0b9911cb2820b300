"""`rewardq clean`: drops the outcomes of a run, or of one of its rewards, so that they are scored anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import click

from tasks import keys
from tasks.celery_app import client_outcomes, make_app
from tasks.errors import ConfigError, nearest
from tasks.masking import without_password
from tasks.servers.needs import check_servers
from tasks.settings import Settings, load_settings
from trainer_client.runs.registry import RegisteredReward, RunRegistry
from trainer_client.runs.start_checks import RUN_NAME

KEYS_A_CALL = 1000
"""Keys that Redis looks at, or drops, in one call. Between calls it serves others, so that no run stalls."""

RUNS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class RunContents:
    """What Redis has of a run.

    Attributes:
        num_outcomes: By fingerprint; of a groupwise reward, one for each group.
        num_claimed: By fingerprint, the outcomes that a worker is scoring.
        trainers: Live trainer processes, as text.
    """

    num_outcomes: Counter[str]
    num_claimed: Counter[str]
    trainers: tuple[str, ...]
    rewards: tuple[RegisteredReward, ...]

    def names_of(self, fingerprint: str) -> str:
        """What the run calls the rewards of a fingerprint."""
        names: dict[str, None] = {}
        for reward in self.rewards:
            if fingerprint in reward.fingerprints:
                is_plain = reward.name == reward.model
                names[
                    reward.name if is_plain else f"{reward.name} ({reward.model})"
                ] = None
        return ", ".join(names) or f"a reward of fingerprint {fingerprint}"


@click.command()
@click.option(
    "--run",
    "run",
    required=True,
    metavar="NAME",
    help="The run, as RewardClient(run=...) names it.",
)
@click.option(
    "--reward",
    metavar="NAME",
    help="Only what this reward has, by its name in the rewards file.",
)
@click.option(
    "--redis",
    "redis_url",
    metavar="URL",
    help="Redis of the results; else as REWARDQ_* variables say.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
def clean(run: str, reward: str | None, redis_url: str | None, yes: bool) -> None:
    """Drop the outcomes of a run, of every version and start of it: samples that are submitted again are scored anew.

    It counts first, and asks. A trainer keeps what it has collected already. A sample that a worker is scoring is
    answered afterwards: edit the class, restart the workers, then clean.
    """
    settings = load_settings(**({"result_url": redis_url} if redis_url else {}))
    if not RUN_NAME.fullmatch(run):
        raise ConfigError(
            f"a run is letters, digits, '.', '_' or '-', at most 100 of them; found {run!r}"
        )
    check_servers(settings, "clean")
    app = make_app(settings)
    redis = client_outcomes(app).redis
    try:
        _clean(redis, settings, run, reward, yes)
    finally:
        redis.connection_pool.disconnect()
        app.close()


def _clean(
    redis: Any, settings: Settings, run: str, reward: str | None, yes: bool
) -> None:
    contents = _contents(redis, settings, run)
    if not contents.num_outcomes and not contents.rewards:
        raise ConfigError(_unknown_run(redis, settings, run))
    chosen = _chosen(contents, run, reward)
    num_outcomes = _total(contents.num_outcomes, chosen)
    of = f"run {run!r}" if reward is None else f"reward {reward!r} of run {run!r}"
    if not num_outcomes:
        click.echo(
            f"{of} has no outcomes in {without_password(settings.results)}; nothing to drop"
        )
        return

    _show(contents, chosen, run)
    if not yes:
        _ask(num_outcomes, of)
    num_dropped = _drop(redis, run, chosen)
    RunRegistry(redis, run, settings.result_ttl_s).forget_code_versions(chosen)
    click.echo(f"dropped {_count(num_dropped)} of {of}")

    num_new = _total(_count_by_fingerprint(redis, run, keys.outcome), chosen)
    if num_new:
        click.echo(
            f"{_count(num_new)} came meanwhile: workers are at it; clean again once they have the new code"
        )


def _total(num_of: Mapping[str, int], fingerprints: Iterable[str]) -> int:
    return sum(num_of[fingerprint] for fingerprint in fingerprints)


def _contents(redis: Any, settings: Settings, run: str) -> RunContents:
    return RunContents(
        num_outcomes=_count_by_fingerprint(redis, run, keys.outcome),
        num_claimed=_count_by_fingerprint(redis, run, keys.claim),
        trainers=tuple(_trainers(redis, run)),
        rewards=tuple(RunRegistry(redis, run, settings.result_ttl_s).rewards()),
    )


def _chosen(contents: RunContents, run: str, reward: str | None) -> list[str]:
    """The fingerprints to drop.

    Raises:
        ConfigError: The run has no reward of this name; names those that it has.
    """
    if reward is None:
        return sorted(contents.num_outcomes)
    chosen: set[str] = set()
    for known in contents.rewards:
        if known.name == reward:
            chosen.update(known.fingerprints)
    if chosen:
        return sorted(chosen)
    names = sorted({known.name for known in contents.rewards})
    raise ConfigError(
        f"run {run!r} has no reward {reward!r}{nearest(reward, names)}; it has: {', '.join(names) or 'none by name'}"
    )


def _show(contents: RunContents, chosen: Iterable[str], run: str) -> None:
    """A line for each reward, whose outcomes may be of several fingerprints.

    There is a fingerprint for each version of a reward, and for a reward without version for each version of its code
    and for each launch.
    """
    by_names: dict[str, list[str]] = {}
    for fingerprint in chosen:
        by_names.setdefault(contents.names_of(fingerprint), []).append(fingerprint)

    for names, fingerprints in by_names.items():
        num_outcomes = _total(contents.num_outcomes, fingerprints)
        num_claimed = _total(contents.num_claimed, fingerprints)
        line = f"{names}: {_count(num_outcomes)}"
        if len(fingerprints) > 1:
            line += f" by {len(fingerprints)} versions or codes"
        if num_claimed:
            line += f", {num_claimed:,} more are being scored"
        if num_outcomes or num_claimed:
            click.echo(line)

    for trainer in contents.trainers:
        click.echo(
            f"{trainer} of run {run!r} is alive: what it waits for and has not read yet is scored again"
        )


def _ask(num: int, of: str) -> None:
    try:
        is_wanted = click.confirm(f"drop {_count(num)} of {of}?")
    except click.Abort:  # nobody is there to answer
        click.echo()  # the question's line is open
        is_wanted = False
    if not is_wanted:
        raise ConfigError("nothing was dropped; --yes drops without asking")


def _drop(redis: Any, run: str, fingerprints: Iterable[str]) -> int:
    """Drop outcomes, and how often each sample was begun; returns how many outcomes there were."""
    num_dropped = 0
    for fingerprint in fingerprints:
        for batch in _batches(redis, keys.outcome(f"{run}:{fingerprint}:*")):
            num_dropped += int(redis.unlink(*batch))
        for batch in _batches(redis, keys.starts(f"{run}:{fingerprint}:*")):
            redis.unlink(*batch)
    return num_dropped


def _count_by_fingerprint(
    redis: Any, run: str, key_of: Callable[[str], str]
) -> Counter[str]:
    """How many keys there are of a run, by the fingerprint in their address."""
    num_of: Counter[str] = Counter()
    prefix = len(key_of(f"{run}:"))
    for batch in _batches(redis, key_of(f"{run}:*")):
        for key in batch:
            num_of[key.decode()[prefix:].partition(":")[0]] += 1
    return num_of


def _trainers(redis: Any, run: str) -> Iterator[str]:
    """`process 7 on host, rank 0`, of each rank lock of the run."""
    any_rank = keys.trainer(run, "*", 0).rpartition(":")[0]
    for batch in _batches(redis, f"{any_rank}:*"):
        for key, holder in zip(batch, redis.mget(batch), strict=True):
            if holder is not None:
                process = holder.decode().rpartition(" (")[0]
                rank = key.decode().rpartition(":")[2]
                yield f"{process}, rank {rank}"


def _unknown_run(redis: Any, settings: Settings, run: str) -> str:
    """Which runs there are instead."""
    num_of: Counter[str] = Counter()
    prefix = len(keys.outcome(""))
    for batch in _batches(redis, keys.outcome("*")):
        for key in batch:
            num_of[key.decode()[prefix:].partition(":")[0]] += 1
    where = without_password(settings.results)
    if not num_of:
        return (
            f"no run {run!r} in {where}, which has no outcomes of any run; "
            "--redis names another, or REWARDQ_RESULT_URL"
        )
    shown = ", ".join(
        f"{name} ({_count(num)})" for name, num in num_of.most_common(RUNS_SHOWN)
    )
    more = f" and {len(num_of) - RUNS_SHOWN} more" if len(num_of) > RUNS_SHOWN else ""
    return f"no run {run!r} in {where}{nearest(run, num_of)}; it has: {shown}{more}"


def _batches(redis: Any, pattern: str) -> Iterator[list[bytes]]:
    """The keys of a pattern, some at a time; a key may come twice while Redis enlarges its hash table."""
    cursor = 0
    while True:
        cursor, found = redis.scan(cursor, match=pattern, count=KEYS_A_CALL)
        if found:
            yield list(dict.fromkeys(found))
        if not cursor:
            return


def _count(num: int) -> str:
    return f"{num:,} outcome{'' if num == 1 else 's'}"
