"""Sets up a Celery worker process of ours: its stores, models and heartbeat, when Celery says that it starts."""

from __future__ import annotations

import atexit
from typing import Any

from celery.signals import celeryd_after_setup

from tasks.celery_app import outcomes_of
from tasks.payloads import open_store
from tasks.score import Desk, serve_at
from tasks.settings import Settings
from workers.heartbeat import HeartbeatThread
from workers.running import ModelRunner


@celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def open_desk(sender: str, instance: Any, **_: Any) -> None:
    """Make this process ready to score, before it takes its first task."""
    app = instance.app
    settings: Settings = app.settings
    outcomes, store = outcomes_of(app), open_store(settings)
    runner = ModelRunner(settings)
    queues = tuple(app.amqp.queues.consume_from)
    beats = HeartbeatThread(sender, queues, outcomes, store, runner.models, settings.claim_ttl_s)
    serve_at(Desk(sender, outcomes, store, beats, runner))
    beats.start()
    atexit.register(beats.end)
