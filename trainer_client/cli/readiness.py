"""When `rewardq up` is ready: each worker has loaded its rewards, and the judges and reward servers answer.

Later it tells which worker is ready again after a restart.
"""

from __future__ import annotations

import contextlib
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
from trainer_client.cli.child import Child
from trainer_client.cli.fleet import WORKER_START_S, Fleet

POLL_S = 0.3
SAY_EVERY_S = 30.0
"""How often the same is said again."""

QUIET_S = SAY_EVERY_S / 3
"""Every start takes some seconds: before this, nothing is said of workers that load."""


@dataclass(slots=True)
class WaitLines:
    """Tells the user what is waited for: when that changes, and every half minute."""

    say: Callable[[str], None]
    started_at: float = field(default_factory=time.monotonic)
    _last: tuple[str, ...] = ()
    _say_at: float = 0.0

    def tell(self, waiting: Sequence[str]) -> None:
        """Say each of these lines, unless they were said lately."""
        now = time.monotonic()
        lines = tuple(waiting)
        was_said = lines == self._last and now < self._say_at
        if not lines or was_said:
            return
        self._last, self._say_at = lines, now + SAY_EVERY_S
        for line in lines:
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
        The servers that do not answer and were not waited for, a line each.

    Raises:
        StartError: A worker ended or did not come up, or not everything is ready in time; says which reward and why.
    """
    app = make_app(settings)
    try:
        lines = WaitLines(say)
        return _wait(
            fleet, client_outcomes(app), _names(config), lines, wait_s, servers
        )
    finally:
        app.close()


def tell_who_is_back(
    fleet: Fleet, settings: Settings, say: Callable[[str], None]
) -> NoReturn:
    """Say when a worker that was started again serves again; goes on until it is interrupted."""
    app = make_app(settings)
    try:
        outcomes = client_outcomes(app)
        ready_pids = {child.name: child.pid for child in _workers(fleet)}
        while True:
            time.sleep(POLL_S)
            restarted = []
            for child in _workers(fleet):
                if child.pid != ready_pids[child.name]:
                    restarted.append(child)

            beats = _beats(outcomes, restarted) if restarted else {}
            for child in restarted:
                if _serves(beats[child.name]):
                    ready_pids[child.name] = child.pid
                    say(f"{child.name} is ready again (pid {child.pid})")
    finally:
        app.close()


def _workers(fleet: Fleet) -> list[Child]:
    return [child for child in fleet.children if not child.is_server]


def _wait(
    fleet: Fleet,
    outcomes: ClientOutcomes,
    names: Mapping[str, str],
    lines: WaitLines,
    wait_s: float,
    servers: bool,
) -> tuple[str, ...]:
    deadline = lines.started_at + wait_s
    while True:
        workers = _workers(fleet)
        beats = _beats(outcomes, workers)
        _check_started(workers, beats, lines.started_at)
        loading, unanswered = _left(beats, names)
        if not loading and not (servers and unanswered):
            return tuple(unanswered)

        if time.monotonic() > deadline:
            raise StartError(
                f"not ready within {wait_s:g} s: {'; '.join([*loading, *unanswered])}. Longer waits: --wait SECONDS"
            )
        is_quiet = time.monotonic() - lines.started_at <= QUIET_S
        lines.tell(unanswered if is_quiet else [*unanswered, *loading])
        time.sleep(POLL_S)


def _beats(
    outcomes: ClientOutcomes, workers: Sequence[Child]
) -> dict[str, Heartbeat | None]:
    """The heartbeat of each worker by its name; None if it has none yet, or while Redis is away."""
    found: dict[tuple[int, str], Heartbeat] = {}
    with contextlib.suppress(*LOST):
        for beat in outcomes.workers():
            found[beat.pid, beat.host] = beat
    host = platform.node()
    return {child.name: found.get((child.pid, host)) for child in workers}


def _check_started(
    workers: Sequence[Child], beats: Mapping[str, Heartbeat | None], started_at: float
) -> None:
    """Raise `StartError` for workers that ended while they started, or have no heartbeat for too long."""
    starting = [child for child in workers if not child.is_watched]
    ended = []
    for child in starting:
        if child.ended is not None:
            ended.append(
                f"{child.name} did not start ({child.ended}); {child.last_log_line()}"
            )
    if ended:
        raise StartError("; ".join(ended))

    is_late = time.monotonic() - started_at > WORKER_START_S
    for child in starting:
        beat = beats[child.name]
        if beat is None and is_late:
            raise StartError(
                f"{child.name} was not ready within {WORKER_START_S:g} s; {child.last_log_line()}"
            )
        # From now on it is started again when it ends.
        child.is_watched = _serves(beat)


def _left(
    beats: Mapping[str, Heartbeat | None], names: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """What the workers still load, and which judges and reward servers do not answer them, a line each."""
    loading, unanswered = [], []
    for worker, beat in beats.items():
        if not _serves(beat):
            loading.append(f"{worker}: {_what_it_does(beat, names)}")
        if beat is not None:
            for server in beat.unanswered:
                unanswered.append(f"{worker}: {server}")
    return loading, unanswered


def _serves(beat: Heartbeat | None) -> bool:
    return beat is not None and beat.state == "ready"


def _what_it_does(beat: Heartbeat | None, names: Mapping[str, str]) -> str:
    if beat is None:
        return "starting"
    models = [names.get(fingerprint, "a model") for fingerprint in beat.loading]
    return f"loading {', '.join(models)}" if models else "loading"


def _names(config: RewardConfig) -> dict[str, str]:
    """Names of reward models by fingerprint."""
    names = {}
    for spec in (*config.rewards, *config.eval_rewards):
        names[spec.part.fingerprint] = spec.part.reward_model
    return names
