"""Kombu's channel to Redis, through which a worker takes messages: nothing that comes by it ends the worker.

Kombu reads a message, and Celery acts on it, in callbacks of the event loop, where any exception ends the process.
"""

from __future__ import annotations

import functools
import logging
import queue
from typing import Any

from celery.worker import state as worker_state
from kombu.transport import redis as transports
from kombu.utils.encoding import bytes_to_str

from workers.process.broadcasts import why_refused
from workers.process.envelopes import Envelope, Envelopes

log = logging.getLogger(__name__)

CONTROL = "remote control"
"""Whose messages these are, for the log."""


def guard_channels(envelopes: Envelopes) -> None:
    """From now on every channel of this process takes its messages through `envelopes`."""
    for transport in (transports.Transport, transports.SentinelTransport):
        channel: type[Any] = transport.Channel
        if not issubclass(channel, _GuardedChannel):
            parts = (_GuardedChannel, channel)
            transport.Channel = type(channel.__name__, parts, {})
        transport.Channel.envelopes = envelopes


class _GuardedChannel:
    """What each of kombu's channels to Redis gets before its own methods.

    An error of the connection itself is raised as ever: Celery's consumer connects anew.
    """

    envelopes: Envelopes
    _in_delivery: Envelope | None = None
    """Of the message that is being delivered."""

    def _create_client(self, *args: Any, **kwargs: Any) -> Any:
        client = super()._create_client(*args, **kwargs)  # type: ignore[misc]
        client.parse_response = functools.partial(self._answer, client.parse_response)
        return client

    def _answer(self, parse: Any, connection: Any, command: str, **options: Any) -> Any:
        """Redis's answer to a command. A message that is none of ours is as if none had come."""
        answer = parse(connection, command, **options)
        if command != "BRPOP" or not answer:
            return answer
        place, item = answer
        name = bytes_to_str(place).rsplit(self.sep, 1)[0]  # type: ignore[attr-defined]
        admitted = self.envelopes.admit(item, name)
        if admitted is None:
            return None
        self._in_delivery = admitted
        return place, admitted.item

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]
        except self._passed_on:
            raise
        except Exception as error:
            log.exception("a message could not be handed to Celery")
            self._give_up_delivery(error)
            return None

    def _give_up_delivery(self, error: Exception) -> None:
        """Free what the message that is being delivered has taken: a slot, and a place among the unacknowledged."""
        envelope = self._in_delivery
        if envelope is None:
            return
        num_bytes = len(envelope.item)
        self.envelopes.drop("?", envelope.task_id, num_bytes, type(error).__name__)
        request = worker_state.requests.get(envelope.task_id)
        if request is not None:
            worker_state.task_ready(request)
        self.qos.ack(envelope.delivery_tag)  # type: ignore[attr-defined]

    def _handle_message(self, client: Any, response: Any) -> Any:
        payload = super()._handle_message(client, response)  # type: ignore[misc]
        data = payload["data"]
        is_message = bytes_to_str(payload["type"]).endswith("message")
        why = why_refused(data) if is_message and data else ""
        if why:
            self.envelopes.drop(CONTROL, "unknown", len(data), why)
            payload["data"] = None  # kombu passes over it
        return payload

    def _receive_one(self, client: Any) -> Any:
        try:
            return super()._receive_one(client)  # type: ignore[misc]
        except self._passed_on:
            raise
        except Exception as error:
            self.envelopes.drop(CONTROL, "unknown", 0, type(error).__name__)
            return None

    @property
    def _passed_on(self) -> tuple[type[BaseException], ...]:
        """What is no fault of a message: nothing came, or the connection is lost."""
        transport = self.connection  # type: ignore[attr-defined]
        errors = {*transport.connection_errors, *transport.channel_errors}
        # Kombu counts it among the errors of a connection; here a message lacks something.
        errors.discard(KeyError)
        return (queue.Empty, *errors)
