"""Sets up a Celery worker process of ours: its stores, models and heartbeat, when Celery says that it starts."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from celery.exceptions import CPendingDeprecationWarning
from celery.signals import (
    after_setup_logger,
    after_setup_task_logger,
    celeryd_after_setup,
    worker_init,
    worker_ready,
)
from PIL import Image

from tasks.celery_app import worker_outcomes
from tasks.errors import RewardError, SettingsError
from tasks.payloads import open_store
from tasks.servers.connections import connect
from tasks.settings import Settings
from workers.loading.cache import ModelCache
from workers.process.channel import guard_channels
from workers.process.consumer_steps import (
    AwaitRedis,
    CountMessages,
    HideSentinelPassword,
    KeepTakenMessages,
)
from workers.process.envelopes import Envelopes
from workers.process.heartbeat import REDIS_ERRORS, HeartbeatThread, WorkerState
from workers.process.lifetime import (
    end_in_time,
    end_stuck,
    end_to_start_anew,
    end_without_device,
)
from workers.process.pool import guarded
from workers.process.preloading import AskServers, preload
from workers.process.redis_refusals import RedisRefusals, refuse_early
from workers.process.slots import SlotWatch, slots_of
from workers.process.terminal import (
    RedisLog,
    ScoreLog,
    mask_log,
    quiet_celery,
    say_ready,
    show_urls_as_written,
)
from workers.process.watchdog import Watchdog
from workers.scoring.context import ScoringContext, set_context
from workers.scoring.held_claims import HeldClaims
from workers.scoring.runner import ModelRunner
from workers.scoring.timeouts import write_timeouts

log = logging.getLogger(__name__)

KEPT_BLOCKS = 32
"""Blocks of memory (at most 16 MB each) that Pillow keeps for its next images, enough for two chunks of 16: filling
fresh memory takes three times as long."""


@after_setup_logger.connect  # type: ignore[untyped-decorator]
def show_our_lines(**_: Any) -> None:
    """Our own lines (a model loaded, a worker that ends) are shown at Celery's default level too, which is WARNING."""
    for name in ("workers", "tasks"):
        logging.getLogger(name).setLevel(logging.INFO)


@after_setup_logger.connect  # type: ignore[untyped-decorator]
@after_setup_task_logger.connect  # type: ignore[untyped-decorator]
def mask_secrets(logger: Any, **_: Any) -> None:
    """No line of the log shows a secret, at any level, whoever writes the line."""
    mask_log(logger)


@worker_init.connect  # type: ignore[untyped-decorator]
def add_consumer_steps(sender: Any, **_: Any) -> None:
    """Add our steps to those of Celery's consumer, and take our pool and channels for Celery's."""
    steps = {AwaitRedis, CountMessages, HideSentinelPassword, KeepTakenMessages}
    sender.app.steps["consumer"] |= steps
    sender.pool_cls = guarded(sender.pool_cls)
    sender.app.envelopes = Envelopes()
    guard_channels(sender.app.envelopes)


@celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def prepare_or_end(sender: str, instance: Any, **_: Any) -> None:
    """Make this process ready to score, before it takes its first task, or end it.

    Celery would log what is raised here and go on: a worker that loses every message that it takes.
    """
    try:
        _prepare(sender, instance.app)
        show_urls_as_written(instance, instance.app.settings)
    except SettingsError as error:  # a supervisor is not to try again
        log.critical("worker cannot start: %s", error)
        raise SystemExit(os.EX_CONFIG) from None
    except RewardError as error:
        raise SystemExit(f"worker cannot start: {error}") from None
    except Exception as error:
        log.exception("worker cannot start")
        words = f"worker cannot start: {type(error).__name__}: {error}"
        raise SystemExit(words) from None


def _prepare(node: str, app: Any) -> None:
    """Make a worker's parts, start its threads, and load what it is told to."""
    settings: Settings = app.settings
    queues = tuple(app.amqp.queues.consume_from)
    _keep_pillow_memory()
    refuse_early(settings, queues)
    app.redis_log = redis_log = RedisLog()
    app.refusals = refusals = RedisRefusals(settings, queues)

    outcomes, store = worker_outcomes(app), open_store(settings)
    claims = HeldClaims(outcomes)
    watchdog = Watchdog(
        time_out=functools.partial(write_timeouts, outcomes, claims),
        num_claimed=lambda: len(claims.tokens),
        release_claims=lambda: release_and_end(claims, heartbeat),
    )
    runner = ModelRunner(
        settings, watchdog.watch, end_without_device, end_to_start_anew
    )
    state = WorkerState(node, queues, is_preloading=bool(settings.preload.strip()))
    heartbeat = HeartbeatThread(
        state,
        claims,
        outcomes,
        store,
        runner.models,
        settings.claim_ttl_s,
        redis_log,
        refusals.refusal,
    )
    context = ScoringContext(
        node, outcomes, store, claims, runner, refusal=refusals.refusal
    )
    set_context(app, context)

    quiet_celery(redis_log, settings)
    score_log = ScoreLog(context.tally)
    for thread in (score_log, heartbeat, watchdog):
        thread.start()
    atexit.register(score_log.end)
    atexit.register(heartbeat.end)
    _hush_known_warnings()
    end_in_time(lambda: release_and_end(claims, heartbeat), settings.stop_grace_s)
    _preload(settings, state, runner.models)
    _say_when_ready(settings, queues, runner.models)
    _watch_slots_when_ready(app, state, lambda: release_and_end(claims, heartbeat))


def _preload(settings: Settings, state: WorkerState, models: ModelCache) -> None:
    """Load what REWARDQ_PRELOAD names and begin to ask its servers. Ends the process if a model does not load."""
    try:
        served = preload(settings, state.queues, models)
    except RewardError as error:
        words = " ".join(str(error).split())
        raise SystemExit(f"REWARDQ_PRELOAD={settings.preload}: {words}") from None

    def say(unanswered: tuple[str, ...]) -> None:
        state.unanswered = unanswered

    servers = AskServers(served, say)
    servers.ask_all()
    servers.start()
    state.is_preloading = False


def _say_when_ready(
    settings: Settings, queues: Sequence[str], models: ModelCache
) -> None:
    def ready(sender: Any, **_: Any) -> None:
        say_ready(settings, queues, models.names, sender.controller.concurrency)

    worker_ready.connect(ready, weak=False)


def _watch_slots_when_ready(
    app: Any, state: WorkerState, release_claims: Callable[[], None]
) -> None:
    """Once the worker takes messages, look whether it goes on to."""
    broker = connect(app.settings.broker, app.settings.sentinels)

    def say(why: str) -> None:
        state.stuck = why

    def ready(sender: Any, **_: Any) -> None:
        SlotWatch(
            look=lambda: slots_of(sender, broker),
            say=say,
            end=lambda why: end_stuck(why, release_claims),
        ).start()

    worker_ready.connect(ready, weak=False)


def _keep_pillow_memory() -> None:
    if "PILLOW_BLOCKS_MAX" not in os.environ:
        Image.core.set_blocks_max(KEPT_BLOCKS)  # type: ignore[attr-defined]


def _hush_known_warnings() -> None:
    """Running tasks go on when the connection to the broker is lost, whatever Celery 6 will do; claims guard them."""
    known = r"\s*In Celery 5.1 we introduced an optional"
    warnings.filterwarnings("ignore", known, CPendingDeprecationWarning)


def release_and_end(claims: HeldClaims, heartbeat: HeartbeatThread) -> None:
    """Give back the claims of a process that ends with tasks unfinished, and take it off the list of workers."""
    try:
        claims.release_all()
    except REDIS_ERRORS as error:
        log.warning("claims not released error=%s", error)
    heartbeat.end()
