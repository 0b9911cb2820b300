"""Messages on their way into Celery's queues."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from tasks import keys
from tasks.celery_app import (
    COMBINE_ARGUMENTS,
    PRIORITY_FIRST,
    PRIORITY_USUAL,
    SCORE_ARGUMENTS,
    in_order,
)
from tasks.messages import WIRE_VERSION
from tasks.servers.connections import NoQueueError, is_wrong_type
from trainer_client.engine.requests import Message

DISCONNECT_S = 1.0
"""How long a call under way is waited for before its connection is given back."""

MESSAGES_A_BATCH = 200
"""Messages handed to Redis in one transaction."""


class Broker(Protocol):
    """The queues. Safe between threads; a message that is published twice is scored once."""

    def publish(self, messages: Sequence[Message], store_id: str) -> None:
        """Put messages into their queues; `store_id` is the identity of the payload store that has their requests."""

    def num_waiting(self, queue: str) -> int:
        """How many messages wait in a queue."""

    def disconnect(self) -> None:
        """Give back the connection; the next call makes a new one."""


class CeleryBroker:
    """The queues of a Celery app, over a connection of its own. Each thread that uses it has its own broker."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._connection: Any = None

    def publish(self, messages: Sequence[Message], store_id: str) -> None:
        """See `Broker`."""
        with self._lock:
            try:
                producer = self._app.amqp.Producer(self._connect(), auto_declare=False)
                with producer.batch(MESSAGES_A_BATCH):
                    for message in messages:
                        self._publish(producer, message, store_id)
            except BaseException:
                self._disconnect()
                raise

    def num_waiting(self, queue: str) -> int:
        """See `Broker`."""
        with self._lock:
            try:
                channel = self._connect().default_channel
                # Not passive: kombu would look for the queue without its prefix, and find none.
                declared = channel.queue_declare(queue)
            except BaseException as error:
                self._disconnect()
                if is_wrong_type(error):
                    raise NoQueueError(keys.queue_lists(queue)[0]) from None
                raise
            return int(declared.message_count)

    def disconnect(self) -> None:
        """See `Broker`. A call that hangs keeps its connection."""
        if self._lock.acquire(timeout=DISCONNECT_S):
            try:
                self._disconnect()
            finally:
                self._lock.release()

    def _connect(self) -> Any:
        if self._connection is None:
            self._connection = self._app.connection_for_write()
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()

    def _publish(self, producer: Any, message: Message, store_id: str) -> None:
        if message.header:
            self._publish_chord(producer, message, store_id)
        else:
            self._publish_one(producer, message, store_id)

    def _publish_chord(self, producer: Any, body: Message, store_id: str) -> None:
        """A Celery chord, put together by hand: `chord().apply_async()` leaves result objects behind, one for each
        header, that ask the result backend when they are collected. The body is immutable: what the header returns
        does not travel to it."""
        group_id = uuid.uuid4().hex
        signature = self._app.signature(
            body.task,
            args=in_order(
                COMBINE_ARGUMENTS,
                label=body.label,
                request_id=body.request,
                wire=WIRE_VERSION,
                store=store_id,
                num_returns=0,
                digest=body.digest,
            ),
            immutable=True,
            queue=body.queue,
            priority=PRIORITY_FIRST,
            argsrepr=body.label,
            kwargsrepr="",
            ignore_result=True,
        )
        self._app.backend.set_chord_size(group_id, len(body.header))
        for index, part in enumerate(body.header):
            self._publish_one(
                producer,
                part,
                store_id,
                group_id=group_id,
                group_index=index,
                chord=dict(signature),
            )

    def _publish_one(
        self, producer: Any, message: Message, store_id: str, **options: Any
    ) -> None:
        self._app.send_task(
            message.task,
            args=in_order(
                SCORE_ARGUMENTS,
                label=message.label,
                request_id=message.request,
                wire=WIRE_VERSION,
                number=message.number,
                store=store_id,
                digest=message.digest,
            ),
            queue=message.queue,
            producer=producer,
            argsrepr=message.label,
            kwargsrepr="",
            priority=PRIORITY_USUAL,
            ignore_result=True,
            retry=False,
            **options,
        )
