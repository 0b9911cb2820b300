"""The message of a scoring task, and how a worker sends one itself."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from tasks.celery_app import (
    COMBINE,
    COMBINE_ARGUMENTS,
    PRIORITY_FIRST,
    app,
    in_order,
)
from tasks.errors import WireError
from tasks.messages import WIRE_VERSION, Number, Text


@dataclass(frozen=True, slots=True, config=ConfigDict(strict=True))
class TaskMessage:
    """What a task's message says. Whoever can write to Redis can send one, so that nothing in it is taken as it is.

    Attributes:
        label: What the task is for, for logs and Flower; `OCR x 16, run demo step 3`.
        queue: The queue that the message came by.
        request_id: Where the request is in the payload store.
        wire: Wire version of the client.
        store: Identity of the client's payload store.
        number: The message's number in its queue; 0 where it has none.
        num_returns: How often this body of a chord was sent again, since others were still scoring its parts.
        digest: Of the request's bytes: a request that is not what the client stored is not obeyed. Empty in the message
            of an older client, whose requests are not compared.
    """

    label: Text
    queue: Text
    request_id: Text
    wire: int
    store: Text = ""
    number: Number = 0
    num_returns: Number = 0
    digest: Text = ""


def message_of(task: Any, **arguments: Any) -> TaskMessage:
    """The message of a Celery task that runs, from the arguments that came with it.

    Raises:
        WireError: An argument is of another kind or beyond its bounds; says which, and not what was found.
    """
    try:
        return TaskMessage(queue=queue_of(task), **arguments)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise WireError(f"no message of ours: {field}: {first['msg']}") from None


def queue_of(task: Any) -> str:
    """The queue that a Celery task's message came by."""
    queue: str = (
        task.request.delivery_info.get("routing_key") or app.conf.task_default_queue
    )
    return queue


def send_body(message: TaskMessage) -> None:
    """Send the body of a group's chord, the task that combines its parts, to the queue of the message."""
    app.send_task(
        COMBINE,
        args=in_order(
            COMBINE_ARGUMENTS,
            label=message.label,
            request_id=message.request_id,
            wire=WIRE_VERSION,
            store=message.store,
            num_returns=message.num_returns,
            digest=message.digest,
        ),
        queue=message.queue,
        argsrepr=message.label,
        priority=PRIORITY_FIRST,
        ignore_result=True,
    )
