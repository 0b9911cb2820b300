"""Sets up a Celery worker process of ours: its stores, models and heartbeat, when Celery says that it starts."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from typing import Any

from celery.signals import celeryd_after_setup

from tasks.celery_app import outcomes_of
from tasks.messages import Failure, Outcome, SampleRequest
from tasks.outcomes import Outcomes
from tasks.payloads import open_store
from tasks.score import Desk, serve_at
from tasks.settings import Settings
from workers.heartbeat import HeartbeatThread
from workers.running import ModelRunner
from workers.watchdog import Watchdog


@celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def open_desk(sender: str, instance: Any, **_: Any) -> None:
    """Make this process ready to score, before it takes its first task."""
    app = instance.app
    settings: Settings = app.settings
    outcomes, store = outcomes_of(app), open_store(settings)
    runner = ModelRunner(settings)
    queues = tuple(app.amqp.queues.consume_from)
    beats = HeartbeatThread(sender, queues, outcomes, store, runner.models, settings.claim_ttl_s)
    watchdog = Watchdog(
        time_out=lambda samples, message: _time_out(outcomes, beats, samples, message),
        num_busy=lambda: len(beats.held),
        hand_back=lambda: _hand_back(outcomes, beats),
    )
    runner.watch = watchdog.calling
    serve_at(Desk(sender, outcomes, store, beats, runner))
    beats.start()
    watchdog.start()
    atexit.register(beats.end)


def _time_out(outcomes: Outcomes, beats: HeartbeatThread, samples: Sequence[SampleRequest], message: str) -> None:
    """Write the reason for samples whose model hangs, in the place of their task."""
    tokens = beats.held
    for sample in samples:
        if sample.address in tokens:
            failure = Failure(kind="timeout", message=message)
            outcomes.write({sample.address: Outcome(failure=failure, attempt=sample.attempt)}, tokens[sample.address])
    beats.drop(sample.address for sample in samples)


def _hand_back(outcomes: Outcomes, beats: HeartbeatThread) -> None:
    """Give back the claims of a process that ends with tasks unfinished."""
    for address, token in beats.held.items():
        outcomes.release([address], token)
    beats.end()
