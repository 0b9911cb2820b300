"""Steps of ours in Celery's consumer: it waits for its Redis, keeps messages that it took, and tells no password."""

from __future__ import annotations

import os
import time
from typing import Any

from celery import bootsteps
from celery.exceptions import WorkerShutdown
from celery.worker.consumer.connection import Connection
from celery.worker.state import maybe_shutdown

from tasks.errors import EvictionError, RedisRefusalError
from tasks.masking import without_password
from tasks.servers.connections import LOST
from tasks.servers.refusals import servers_of, words_for
from workers.process.redis_refusals import check_servers

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
"""Pauses between looks whether a Redis is back, or has room again."""


class AwaitRedis(bootsteps.StartStopStep):  # type: ignore[misc]
    """What a worker's consumer does first, at its start and whenever it was disconnected: wait for its Redis.

    Celery would wait up to 30 s between two looks at a Redis that is away. At a Redis that is full it would try several
    times a second, with a traceback each, since its consumer writes while it starts. If a Redis drops keys, or will not
    serve us however long we wait, the process ends with status EX_CONFIG.
    """

    _has_served = False

    def include(self, parent: Any) -> bool:
        """Put this step before any step that connects."""
        self.obj = self
        parent.steps.insert(0, self)
        return True

    def start(self, parent: Any) -> None:
        """Return once the broker takes writes.

        Raises:
            WorkerShutdown: A Redis drops keys or will not serve us, or the worker was asked to stop meanwhile.
        """
        app = parent.app
        queues = tuple(app.amqp.queues.consume_from)
        pause_s = FIRST_PAUSE_S
        while True:
            maybe_shutdown()
            _end_if_refused(app)
            try:
                check_servers(app.settings, queues)
            except (EvictionError, RedisRefusalError) as error:
                app.refusals.end(str(error), self._has_served)
                raise WorkerShutdown(os.EX_CONFIG) from None
            except (*LOST, *parent.connection_errors) as error:
                app.redis_log.gone("consumer", error)
            else:
                self._has_served = True
                app.redis_log.back("consumer")
                return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def stop(self, parent: Any) -> None:
        """Nothing is held open."""


def _end_if_refused(app: Any) -> None:
    """Raises `WorkerShutdown` for what the broker refused Celery's consumer with, which would ask for ever."""
    refusal, app.redis_log.refusal = app.redis_log.refusal, None
    broker = servers_of(app.settings)[0]
    words = words_for(refusal, broker) if refusal is not None else None
    if words is not None:
        app.refusals.end(broker.says(words))
        raise WorkerShutdown(os.EX_CONFIG)


class CountMessages(bootsteps.StartStopStep):  # type: ignore[misc]
    """What a worker says of its messages (`inspect stats`, Flower): how many it took, and how many it dropped."""

    requires = ("celery.worker.consumer.connection:Connection",)

    def info(self, parent: Any) -> dict[str, Any]:
        """Counted since the worker's start."""
        envelopes = parent.app.envelopes
        counts = {"taken": envelopes.num_taken, "dropped": envelopes.num_dropped}
        return {"messages": counts}


class HideSentinelPassword(bootsteps.StartStopStep):  # type: ignore[misc]
    """What a worker says of its broker (`inspect stats`, Flower) leaves out passwords: of sentinels, of their URLs."""

    requires = ("celery.worker.consumer.connection:Connection",)

    def info(self, parent: Any) -> dict[str, Any]:
        """What replaces what Celery's own step says."""
        if not parent.connection:
            return {}
        step = next(step for step in parent.steps if isinstance(step, Connection))
        broker = dict(step.info(parent)["broker"])
        broker["transport_options"] = dict(broker["transport_options"])
        broker["transport_options"].pop("sentinel_kwargs", None)
        broker["alternates"] = [
            without_password(url) for url in broker.get("alternates") or ()
        ]
        return {"broker": broker}


class KeepTakenMessages(bootsteps.StartStopStep):  # type: ignore[misc]
    """A message that was taken stays taken when the connection breaks or the worker stops.

    Kombu would put it back, while its task goes on or has ended: clients send again what is missing, and nothing else.
    It would also fail at that, and end the worker, while Redis is away (kombu 5.7: its channel has no connection left).
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        """Set it for the channel that tasks come by."""
        parent.task_consumer.channel.qos.restore_at_shutdown = False

    def stop(self, parent: Any) -> None:
        """Nothing is held open."""
