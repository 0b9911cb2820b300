"""The Celery app and its settings.

With these settings Celery on Redis was measured to behave: a worker takes a message only when a slot is free, and then
for good (claims and reconciliation do what acknowledgements would); the pool has threads, no forks; every socket has a
timeout.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import celeryd_init, import_modules

from tasks import keys
from tasks.catalog import GPU
from tasks.dashboard import bound_address, choose_columns
from tasks.errors import SettingsError
from tasks.outcomes import ClientOutcomes, WorkerOutcomes
from tasks.servers.connections import (
    CONNECT_TIMEOUT_S,
    HEALTH_CHECK_S,
    SOCKET_TIMEOUT_S,
    for_sentinels,
)
from tasks.settings import Settings, load_settings
from tasks.shadows import load_ours

SCORE = "rewardq.score"
"""Name of the task that scores a chunk; clients send by name."""

GROUP = "rewardq.group"
"""Name of the task that scores a group within one chunk and combines it."""

COMBINE = "rewardq.combine"
"""Name of the task that makes a group's outcome from the outcomes of its parts; the body of a chord."""

SCORE_ARGUMENTS = ("label", "request_id", "wire", "number", "store", "digest")
COMBINE_ARGUMENTS = ("label", "request_id", "wire", "store", "num_returns", "digest")
"""What the arguments of a task's message say, in order: of the tasks that score, and of the one that combines."""

PRIORITY_FIRST, PRIORITY_USUAL = 0, 6
"""Priorities of messages: tasks that only combine outcomes run before tasks that score. (On Redis 0 is the highest.)"""

WORKER_MODULES = (
    "workers.scoring.chunk",
    "workers.scoring.group",
    "workers.process.startup",
)
"""Modules that a worker imports when it starts; a trainer never does."""


def in_order(names: Sequence[str], **said: Any) -> list[Any]:
    """The arguments of a message that is sent, from what each says by its name."""
    if said.keys() != set(names):
        raise TypeError(f"a message says {', '.join(names)}; got {', '.join(said)}")
    return [said[name] for name in names]


def named(names: Sequence[str], arguments: Sequence[Any]) -> dict[str, Any]:
    """The arguments of a message that has come, by name. What a later client sends beyond them is left out."""
    return dict(zip(names, arguments, strict=False))


def make_app(settings: Settings) -> Any:
    """A Celery app on the servers that `settings` names; `app.settings` are those settings."""
    app = Celery(
        "rewardq",
        broker=settings.broker,
        backend=settings.results,
        set_as_current=False,
    )
    app.settings = settings
    sentinels = {
        "master_name": settings.sentinels.master,
        "sentinel_kwargs": for_sentinels(settings.sentinels),
    }
    app.conf.update(
        include=WORKER_MODULES,
        task_serializer="msgpack",
        result_serializer="msgpack",
        accept_content=["msgpack"],
        task_default_queue=GPU,
        task_acks_late=True,
        task_acks_on_failure_or_timeout=True,
        task_reject_on_worker_lost=False,
        task_ignore_result=True,
        result_expires=int(settings.result_ttl_s),
        worker_pool=settings.pool,
        worker_concurrency=2,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_send_task_events=True,
        worker_enable_remote_control=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # a worker waits while Redis is full
        broker_transport_options={
            **sentinels,
            "global_keyprefix": keys.BROKER,
            "ack_emulation": False,  # a taken message is gone; clients send a missing one again
            "socket_timeout": SOCKET_TIMEOUT_S,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "socket_keepalive": True,
            "health_check_interval": HEALTH_CHECK_S,
        },
        result_backend_transport_options={**sentinels, "global_keyprefix": keys.ROOT},
        redis_socket_timeout=SOCKET_TIMEOUT_S,
        redis_socket_connect_timeout=CONNECT_TIMEOUT_S,
        redis_socket_keepalive=True,
        redis_backend_health_check_interval=HEALTH_CHECK_S,
        resultrepr_maxsize=256,
    )
    return app


def worker_outcomes(app: Any) -> WorkerOutcomes:
    """The outcomes in an app's result backend, to claim and to write."""
    settings: Settings = app.settings
    return WorkerOutcomes(
        app.backend.client, settings.claim_ttl_s, settings.result_ttl_s
    )


def client_outcomes(app: Any) -> ClientOutcomes:
    """The outcomes in an app's result backend, to look up."""
    settings: Settings = app.settings
    return ClientOutcomes(app.backend.client, settings.result_ttl_s)


if "flower" in sys.argv:
    choose_columns()


def _settings_of_process() -> Settings:
    """The settings from the environment. Under a command, a wrong variable ends the process without a traceback.

    The exit status is EX_CONFIG, as when a server refuses: a supervisor must not restart the process.
    """
    try:
        return load_settings()
    except SettingsError as error:
        if {"celery", "rewardq"}.isdisjoint(Path(sys.argv[0]).parts[-2:]):
            raise
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {error}\n")
        raise SystemExit(os.EX_CONFIG) from None


app: Any = make_app(_settings_of_process())
app.set_default()


@import_modules.connect  # type: ignore[untyped-decorator]
def _take_our_names(**_: Any) -> None:
    """A worker imports our `workers` before Celery looks in the current folder, where the user may have another."""
    load_ours("workers")


@import_modules.connect  # type: ignore[untyped-decorator]
def _bound_flower(**_: Any) -> None:
    """Flower sends this signal once its options are read, before it listens."""
    bound_address()


@celeryd_init.connect  # type: ignore[untyped-decorator]
def _name_node(sender: str, instance: Any, options: dict[str, Any], **_: Any) -> None:
    """Name a worker after its queues and process, so that several run on one host under the documented commands."""
    name, _at, host = sender.partition("@")
    if name != "celery":  # given by -n
        return
    queues = options.get("queues") or [GPU]
    names = queues.split(",") if isinstance(queues, str) else queues
    # In a container every worker may be process 1 of a host name that others have too.
    process = str(os.getpid()) if os.getpid() > 1 else secrets.token_hex(3)
    instance.hostname = f"{'+'.join(names)}.{process}@{host}"


@celeryd_init.connect  # type: ignore[untyped-decorator]
def _unregister_unused(instance: Any, **_: Any) -> None:
    """Unregister Celery's own tasks: whoever can write to Redis can start any registered task, and we use none."""
    app.finalize()
    for name in list(app.tasks):
        if name.startswith("celery."):
            app.tasks.pop(name)
