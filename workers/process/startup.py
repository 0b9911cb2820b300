"""Sets up a Celery worker process of ours: its stores, models and heartbeat, when Celery says that it starts."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Sequence
from typing import Any

from celery.signals import (
    after_setup_logger,
    celeryd_after_setup,
    worker_init,
    worker_ready,
)
from PIL import Image

from tasks.celery_app import worker_outcomes
from tasks.errors import RewardError, SettingsError
from tasks.messages import Failure, Outcome, SampleRequest
from tasks.outcomes import WorkerOutcomes
from tasks.payloads import open_store
from tasks.settings import Settings
from workers.process.heartbeat import TROUBLE, HeartbeatThread
from workers.process.lifetime import (
    AwaitRedis,
    KeepSecret,
    Refusals,
    TakeForGood,
    end_in_time,
    end_to_start_anew,
    end_without_device,
    hush_known_warnings,
    refuse_early,
)
from workers.process.preloading import AskServers, preload
from workers.process.terminal import (
    RedisLog,
    ScoreLog,
    quiet_celery,
    say_ready,
    show_urls_as_written,
)
from workers.process.watchdog import Watchdog
from workers.scoring.context import ScoringContext, set_context
from workers.scoring.held_claims import HeldClaims
from workers.scoring.runner import ModelRunner

log = logging.getLogger(__name__)

KEPT_BLOCKS = 32
"""Blocks of memory (at most 16 MB each) that Pillow keeps for its next images, enough for two chunks of 16: filling
fresh memory takes three times as long."""


@after_setup_logger.connect  # type: ignore[untyped-decorator]
def _say_what_we_do(**_: Any) -> None:
    """Our own lines (a model loaded, a worker that ends) are shown at Celery's default level too, which is WARNING."""
    for name in ("workers", "tasks"):
        logging.getLogger(name).setLevel(logging.INFO)


@worker_init.connect  # type: ignore[untyped-decorator]
def _add_steps(sender: Any, **_: Any) -> None:
    sender.app.steps["consumer"] |= {AwaitRedis, KeepSecret, TakeForGood}


@celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def open_worker(sender: str, instance: Any, **_: Any) -> None:
    """Make this process ready to score, before it takes its first task, or end it.

    Celery would log what is raised here and go on: a worker that loses every message that it takes.
    """
    try:
        _open_worker(sender, instance.app)
        show_urls_as_written(instance, instance.app.settings)
    except SettingsError as error:  # a supervisor is not to try again
        log.critical("worker cannot start: %s", error)
        raise SystemExit(os.EX_CONFIG) from None
    except RewardError as error:
        raise SystemExit(f"worker cannot start: {error}") from None
    except Exception as error:
        log.exception("worker cannot start")
        raise SystemExit(
            f"worker cannot start: {type(error).__name__}: {error}"
        ) from None


def _open_worker(node: str, app: Any) -> None:
    if "PILLOW_BLOCKS_MAX" not in os.environ:
        Image.core.set_blocks_max(KEPT_BLOCKS)  # type: ignore[attr-defined]
    settings: Settings = app.settings
    app.redis_log = redis_log = RedisLog()
    queues = tuple(app.amqp.queues.consume_from)
    refuse_early(settings, queues)
    outcomes, store = worker_outcomes(app), open_store(settings)
    claims = HeldClaims(outcomes)
    app.refusals = refusals = Refusals(settings, queues)
    watchdog = Watchdog(
        time_out=lambda samples, message: _time_out(outcomes, claims, samples, message),
        num_claimed=lambda: len(claims.tokens),
        release_claims=lambda: _hand_back(claims, beats),
    )
    runner = ModelRunner(
        settings, watchdog.watch, end_without_device, end_to_start_anew
    )
    beats = HeartbeatThread(
        node,
        queues,
        outcomes,
        claims,
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
    score_log.start()
    atexit.register(score_log.end)
    beats.is_preloading = bool(settings.preload.strip())
    beats.start()
    watchdog.start()
    atexit.register(beats.end)
    hush_known_warnings()
    end_in_time(lambda: _hand_back(claims, beats), settings.stop_grace_s)
    try:
        rewards = preload(settings, queues, runner.models)
    except RewardError as error:
        raise SystemExit(
            f"REWARDQ_PRELOAD={settings.preload}: {' '.join(str(error).split())}"
        ) from None
    servers = AskServers(rewards, say=lambda words: setattr(beats, "unanswered", words))
    servers.ask_all()
    servers.start()
    beats.is_preloading = False

    def ready(sender: Any, **_: Any) -> None:
        say_ready(settings, queues, runner.models.names, sender.controller.concurrency)

    worker_ready.connect(ready, weak=False)


def _time_out(
    outcomes: WorkerOutcomes,
    claims: HeldClaims,
    samples: Sequence[SampleRequest],
    message: str,
) -> None:
    """Write the reason for samples whose model hangs, in the place of their task."""
    tokens = claims.tokens
    claims.drop(sample.address for sample in samples)
    for sample in samples:
        if sample.address in tokens:
            failure = Failure(kind="timeout", message=message)
            outcome = Outcome(failure=failure, attempt=sample.attempt)
            # A process that was stopped (SIGSTOP) for as long looks the same; by now another may score its samples.
            outcomes.write(
                {sample.address: outcome}, tokens[sample.address], only_claimed=True
            )


def _hand_back(claims: HeldClaims, beats: HeartbeatThread) -> None:
    """Give back the claims of a process that ends with tasks unfinished."""
    try:
        claims.release_all()
    except TROUBLE as error:
        log.warning("claims not given back error=%s", error)
    beats.end()
