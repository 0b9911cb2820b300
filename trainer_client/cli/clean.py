"""`rewardq clean`: drops the outcomes of a run, or of one of its rewards, so that they are scored anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import click

from tasks import keys
from tasks.celery_app import client_outcomes, make_app
from tasks.errors import ConfigError, nearest
from tasks.servers.needs import check_servers
from tasks.settings import Settings, load_settings, without_password
from trainer_client.client import RUN_NAME
from trainer_client.runs.known import KnownReward, Run

KEYS_A_CALL = 1000
"""Keys that Redis looks at, or drops, in one call; it serves others between them."""

RUNS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Found:
    """What Redis has of a run.

    Attributes:
        num_outcomes: By fingerprint; of a groupwise reward, one for each group.
        num_claimed: Outcomes that a worker is at, by fingerprint.
        trainers: Processes that live, in words.
    """

    num_outcomes: Counter[str]
    num_claimed: Counter[str]
    trainers: tuple[str, ...]
    rewards: tuple[KnownReward, ...]

    def names_of(self, fingerprint: str) -> str:
        """What the run calls the rewards of a fingerprint."""
        known = [
            f"{r.name} ({r.model})" if r.name != r.model else r.name
            for r in self.rewards
        ]
        names = [
            name
            for name, r in zip(known, self.rewards, strict=True)
            if fingerprint in r.fingerprints
        ]
        return (
            ", ".join(dict.fromkeys(names)) or f"a reward of fingerprint {fingerprint}"
        )


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
    """Drop the outcomes of a run, of every version and start of it: what is asked for again is scored anew.

    It counts first, and asks. What a trainer has collected already it keeps. A sample that a worker is scoring is
    answered after it: edit the class, restart the workers, then clean.
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
    found = _look(redis, settings, run)
    if not found.num_outcomes and not found.rewards:
        raise ConfigError(_unknown_run(redis, settings, run))
    chosen = _chosen(found, run, reward)
    num = sum(found.num_outcomes[one] for one in chosen)
    of = f"run {run!r}" if reward is None else f"reward {reward!r} of run {run!r}"
    if not num:
        click.echo(
            f"{of} has no outcomes in {without_password(settings.results)}; nothing to drop"
        )
        return
    _show(found, chosen, run)
    if not yes:
        _ask(num, of)
    dropped = _drop(redis, run, chosen)
    Run(redis, run, settings.result_ttl_s).forget_answerers(chosen)
    click.echo(f"dropped {_count(sum(dropped.values()))} of {of}")
    left = _count_by_fingerprint(redis, run, keys.outcome)
    num_new = sum(left[one] for one in chosen)
    if num_new:
        click.echo(
            f"{_count(num_new)} came meanwhile: workers are at it; clean again once they have the new code"
        )


def _look(redis: Any, settings: Settings, run: str) -> Found:
    return Found(
        num_outcomes=_count_by_fingerprint(redis, run, keys.outcome),
        num_claimed=_count_by_fingerprint(redis, run, keys.claim),
        trainers=tuple(_trainers(redis, run)),
        rewards=tuple(Run(redis, run, settings.result_ttl_s).rewards()),
    )


def _chosen(found: Found, run: str, reward: str | None) -> list[str]:
    """The fingerprints to drop.

    Raises:
        ConfigError: The run has no reward of this name; names those that it has.
    """
    if reward is None:
        return sorted(found.num_outcomes)
    chosen = {
        f for known in found.rewards if known.name == reward for f in known.fingerprints
    }
    if chosen:
        return sorted(chosen)
    names = sorted({known.name for known in found.rewards})
    raise ConfigError(
        f"run {run!r} has no reward {reward!r}{nearest(reward, names)}; it has: {', '.join(names) or 'none by name'}"
    )


def _show(found: Found, chosen: Iterable[str], run: str) -> None:
    """A line for each reward: each version of it, of its code, and each start of one without version has outcomes."""
    fingerprints: dict[str, list[str]] = {}
    for one in chosen:
        fingerprints.setdefault(found.names_of(one), []).append(one)
    for names, own in fingerprints.items():
        num, num_claimed = (
            sum(of[one] for one in own)
            for of in (found.num_outcomes, found.num_claimed)
        )
        versions = f" by {len(own)} versions or codes" if len(own) > 1 else ""
        being_scored = f", {num_claimed:,} more are being scored" if num_claimed else ""
        if num or num_claimed:
            click.echo(f"{names}: {_count(num)}{versions}{being_scored}")
    for trainer in found.trainers:
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


def _drop(redis: Any, run: str, fingerprints: Iterable[str]) -> Counter[str]:
    """Drop outcomes, and how often each sample was begun; returns how many outcomes were there, by fingerprint."""
    dropped: Counter[str] = Counter()
    for fingerprint in fingerprints:
        for name in (keys.outcome, keys.starts):
            for batch in _batches(redis, name(f"{run}:{fingerprint}:*")):
                num = int(redis.unlink(*batch))
                dropped[fingerprint] += num if name is keys.outcome else 0
    return dropped


def _count_by_fingerprint(redis: Any, run: str, name: Any) -> Counter[str]:
    """How many keys there are of a run, by the fingerprint in their address."""
    num_of: Counter[str] = Counter()
    prefix = len(name(f"{run}:"))
    for batch in _batches(redis, name(f"{run}:*")):
        num_of.update(one.decode()[prefix:].partition(":")[0] for one in batch)
    return num_of


def _trainers(redis: Any, run: str) -> Iterator[str]:
    for batch in _batches(redis, f"{keys.trainer(run, '*', 0).rpartition(':')[0]}:*"):
        for name, holder in zip(batch, redis.mget(batch), strict=True):
            if holder is not None:
                yield f"{holder.decode().rpartition(' (')[0]}, rank {name.decode().rpartition(':')[2]}"


def _unknown_run(redis: Any, settings: Settings, run: str) -> str:
    """Which runs there are instead."""
    num_of: Counter[str] = Counter()
    prefix = len(keys.outcome(""))
    for batch in _batches(redis, keys.outcome("*")):
        num_of.update(one.decode()[prefix:].partition(":")[0] for one in batch)
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
    """The keys of a pattern, some at a time; one may come twice while Redis enlarges its table."""
    cursor = 0
    while True:
        cursor, found = redis.scan(cursor, match=pattern, count=KEYS_A_CALL)
        if found:
            yield list(dict.fromkeys(found))
        if not cursor:
            return


def _count(num: int) -> str:
    return f"{num:,} outcome{'' if num == 1 else 's'}"
