"""Handles a scoring task's message: reads its request, does the work, and leaves a note for what it cannot do."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import redis

from tasks.errors import BusyError, PayloadGoneError, StaleCodeError, WireError
from tasks.masking import masked
from tasks.media import digest
from tasks.messages import WIRE_VERSION, GroupRequest, Note, ScoreRequest, unpack
from tasks.servers.connections import LOST, why_away
from workers.scoring.context import ScoringContext, context_of
from workers.scoring.task_message import TaskMessage, message_of
from workers.texts import cut

log = logging.getLogger(__name__)

MAX_ERROR_CHARS = 1000
"""How much of an error's text a note carries to the client."""

Request = TypeVar("Request", ScoreRequest, GroupRequest)

Work = Callable[[ScoringContext, TaskMessage, Request, int], str]
"""Does what a request asks for. The number is when its message was taken, on Redis's clock, in ms. Returns a few words
for people."""


def handle_task(
    task: Any,
    arguments: Mapping[str, Any],
    kind: type[Request],
    work: Work[Request],
) -> str:
    """Handle the message of a Celery task that runs, which had these arguments; returns a few words for people.

    A message that is none of ours is dropped: there is nobody to leave a note for.
    """
    try:
        message = message_of(task, **arguments)
    except WireError as error:
        log.warning("message dropped reason=%s", error)
        return "dropped: it is no message of ours"
    return handle(context_of(task.app), message, kind, work)


def handle(
    context: ScoringContext,
    message: TaskMessage,
    kind: type[Request],
    work: Work[Request],
) -> str:
    """Read the request of a message and do its work; returns a few words for people.

    A request that cannot be read, or a model that cannot be asked now, is left to the client by a note. An error of
    `work` is noted too, and raised again.
    """
    try:
        return _read_and_do(context, message, kind, work)
    except LOST as error:
        # Not raised: the worker's log says once that Redis is away, and need not for each task.
        why = context.refusal(error) or why_away(error)
        _note_error(context, message, error, why)
        return f"left to be sent again: {why}"
    except redis.ResponseError as error:
        why = context.refusal(error)
        _note_error(context, message, error, why)
        if not why:
            raise
        return f"left to be sent again: {why}"
    except BaseException as error:
        _note_error(context, message, error)
        if isinstance(error, Exception) and not isinstance(error, MemoryError):
            raise
        # Raised out of a task of a threads pool it would leak the slot: the worker looks alive and takes nothing.
        raise RuntimeError(
            f"{type(error).__name__} while scoring {message.label}: {error}"
        ) from error


def _read_and_do(
    context: ScoringContext,
    message: TaskMessage,
    kind: type[Request],
    work: Work[Request],
) -> str:
    taken_ms = context.retry(
        lambda: context.outcomes.take(message.queue, message.number)
    )
    if message.wire != WIRE_VERSION:
        detail = (
            f"it speaks wire version {WIRE_VERSION}, the message is of {message.wire}"
        )
        return _leave_note(context, message, "wire", detail)
    try:
        request = _read(context, message, kind)
        if taken_ms > request.deadline_ms:
            return "expired"
        return work(context, message, request, taken_ms)
    except PayloadGoneError as error:
        return _note_missing(context, message, str(error))
    except WireError as error:
        return _leave_note(context, message, "wire", str(error))
    except BusyError as error:
        return _leave_note(context, message, "busy", str(error))
    except StaleCodeError as error:
        return _leave_note(context, message, "stale", str(error))


def _read(
    context: ScoringContext, message: TaskMessage, kind: type[Request]
) -> Request:
    """The request of a message.

    Raises:
        PayloadGoneError: It is not in the store, or is not what the client put there.
        WireError: It cannot be read.
    """
    data = context.retry(lambda: context.store.get([message.request_id]))[0]
    if data is None:
        raise PayloadGoneError([message.request_id])
    if message.digest and digest(data) != message.digest:
        log.warning(
            "request is not what its client stored request=%s", message.request_id
        )
        raise PayloadGoneError([message.request_id])
    return unpack(kind, data)


def _note_missing(context: ScoringContext, message: TaskMessage, what: str) -> str:
    """Note that something is not in our store: either it is another store than the client's, or the payload is gone."""
    ours = context.retry(context.store.identity)
    if ours != message.store:
        detail = f"its payload store {ours} is not the client's {message.store}; set REWARDQ_PAYLOAD_URL alike on both"
        return _leave_note(context, message, "store", detail, ours)
    return _leave_note(context, message, "gone", what)


def _note_error(
    context: ScoringContext, message: TaskMessage, error: BaseException, why: str = ""
) -> None:
    """Note an error, so that the client can say why it waits: a task that raises each time is sent again each time."""
    words = why or f"the task raised {type(error).__name__}: {error}"
    detail = cut(masked(words), MAX_ERROR_CHARS)
    note = Note(reason="error", worker=context.node, detail=detail)
    # The error may be that Redis is away; then the note cannot be left either.
    with contextlib.suppress(redis.RedisError, OSError):
        context.outcomes.leave_note(message.request_id, note)


def _leave_note(
    context: ScoringContext,
    message: TaskMessage,
    reason: Any,
    detail: str,
    store: str = "",
) -> str:
    words = cut(masked(detail), MAX_ERROR_CHARS)
    note = Note(reason=reason, worker=context.node, detail=words, store=store)
    context.retry(lambda: context.outcomes.leave_note(message.request_id, note))
    return f"not read: {reason}"
