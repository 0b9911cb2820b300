"""When `rewardq up` is ready: each worker has loaded its rewards, and the judges and reward servers answer.

Later, which worker that was started again is ready again.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from tasks.celery_app import client_outcomes, make_app
from tasks.errors import StartError
from tasks.messages import Heartbeat
from tasks.outcomes import ClientOutcomes
from tasks.rewards import RewardConfig
from tasks.servers.connections import LOST
from tasks.settings import Settings
from trainer_client.cli.processes import WORKER_START_S, Child, Fleet, last_words

POLL_S = 0.3
SAY_EVERY_S = 30.0
"""How often the same is said again."""


@dataclass(slots=True)
class Lines:
    """What is waited for, told when it changes and every half minute."""

    say: Callable[[str], None]
    started_at: float = field(default_factory=time.monotonic)
    _last: tuple[str, ...] = ()
    _say_at: float = 0.0

    def tell(self, waiting: Sequence[str]) -> None:
        """Say each of these lines, unless they were said lately."""
        now = time.monotonic()
        if not waiting or (tuple(waiting) == self._last and now < self._say_at):
            return
        self._last, self._say_at = tuple(waiting), now + SAY_EVERY_S
        for line in waiting:
            self.say(f"waiting ({now - self.started_at:.0f} s): {line}")


def wait_until_ready(
    fleet: Fleet,
    config: RewardConfig,
    settings: Settings,
    say: Callable[[str], None],
    wait_s: float,
    *,
    servers: bool,
) -> tuple[str, ...]:
    """Wait until the workers of a fleet can score each reward of `config`.

    Args:
        wait_s: Seconds for all that they load, and for their judges and reward servers to answer.
        servers: Whether to wait for judges and reward servers.

    Returns:
        What is to be said of servers that were not waited for.

    Raises:
        StartError: A worker ended, or has not come up, or not all is ready in time; says which reward and why.
    """
    app = make_app(settings)
    try:
        return _wait(
            fleet, client_outcomes(app), _names(config), Lines(say), wait_s, servers
        )
    finally:
        app.close()


def tell_who_is_back(
    fleet: Fleet, settings: Settings, say: Callable[[str], None]
) -> NoReturn:
    """Say of each worker that was started again when it serves again; goes on until it is interrupted."""
    app = make_app(settings)
    try:
        outcomes = client_outcomes(app)
        ready = {child.name: child.pid for child in _workers(fleet)}
        while True:
            time.sleep(POLL_S)
            others = [
                child for child in _workers(fleet) if child.pid != ready[child.name]
            ]
            beats = _beats(outcomes) if others else {}
            for child in others:
                if _serves(beats.get((child.pid, platform.node()))):
                    ready[child.name] = child.pid
                    say(f"{child.name} is ready again (pid {child.pid})")
    finally:
        app.close()


def _workers(fleet: Fleet) -> list[Child]:
    return [child for child in fleet.children if not child.is_server]


def _wait(
    fleet: Fleet,
    outcomes: ClientOutcomes,
    names: Mapping[str, str],
    lines: Lines,
    wait_s: float,
    servers: bool,
) -> tuple[str, ...]:
    deadline = lines.started_at + wait_s
    while True:
        beats = _beats(outcomes)
        workers = _workers(fleet)
        found = {
            child.name: beats.get((child.pid, platform.node())) for child in workers
        }
        _check_alive(workers, found, lines.started_at)
        for child in workers:
            beat = found[child.name]
            child.is_watched = child.is_watched or (
                beat is not None and beat.state == "ready"
            )
        loading = [
            f"{name}: {_what_it_does(beat, names)}"
            for name, beat in found.items()
            if not _serves(beat)
        ]
        unanswered = [
            f"{name}: {words}"
            for name, beat in found.items()
            if beat
            for words in beat.unanswered
        ]
        if not loading and not (servers and unanswered):
            return tuple(unanswered)
        if time.monotonic() > deadline:
            raise StartError(
                f"not ready within {wait_s:g} s: {'; '.join([*loading, *unanswered])}. Longer waits: --wait SECONDS"
            )
        lines.tell(
            unanswered
            if not loading
            else [*unanswered, *_after_a_while(loading, lines)]
        )
        time.sleep(POLL_S)


def _beats(outcomes: ClientOutcomes) -> dict[tuple[int, str], Heartbeat]:
    """The workers by process and host; none while Redis is away."""
    try:
        return {(beat.pid, beat.host): beat for beat in outcomes.workers()}
    except LOST:
        return {}


def _after_a_while(loading: Sequence[str], lines: Lines) -> Sequence[str]:
    """Every start takes some seconds: nothing is said of those."""
    return loading if time.monotonic() - lines.started_at > SAY_EVERY_S / 3 else []


def _check_alive(
    workers: Sequence[Child], found: Mapping[str, Heartbeat | None], started_at: float
) -> None:
    """Raise `StartError` for workers that ended while they started, or have no heartbeat for too long."""
    ended = [
        child for child in workers if not child.is_watched and child.ended is not None
    ]
    if ended:
        raise StartError(
            "; ".join(
                f"{child.name} did not start ({child.ended}); {last_words(child)}"
                for child in ended
            )
        )
    is_late = time.monotonic() - started_at > WORKER_START_S
    silent = [
        child
        for child in workers
        if is_late and not child.is_watched and found[child.name] is None
    ]
    if silent:
        raise StartError(
            f"{silent[0].name} was not ready within {WORKER_START_S:g} s; {last_words(silent[0])}"
        )


def _serves(beat: Heartbeat | None) -> bool:
    return beat is not None and beat.state == "ready"


def _what_it_does(beat: Heartbeat | None, names: Mapping[str, str]) -> str:
    if beat is None:
        return "starting"
    models = [names.get(fingerprint, "a model") for fingerprint in beat.loading]
    return f"loading {', '.join(models)}" if models else "loading"


def _names(config: RewardConfig) -> dict[str, str]:
    """Names of reward models by fingerprint."""
    return {
        spec.part.fingerprint: spec.part.reward_model
        for spec in (*config.rewards, *config.eval_rewards)
    }
