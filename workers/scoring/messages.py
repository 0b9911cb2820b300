"""A worker process's desk: what tasks score with, and how a message is opened there."""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import redis

from tasks.celery_app import app
from tasks.errors import BusyError, PayloadGoneError, StaleCodeError, WireError
from tasks.messages import (
    WIRE_VERSION,
    GroupRequest,
    Note,
    Outcome,
    RewardCall,
    SampleRequest,
    ScoreRequest,
    unpack,
)
from tasks.outcomes import WorkerOutcomes
from tasks.payloads import PayloadStore
from tasks.servers.connections import LOST, persist, why_away
from workers.scoring.tally import Tally

REDIS_AWAY_S = 120.0
"""How long a task waits for a Redis that is away before it leaves its chunk to be sent again."""

MAX_ERROR_CHARS = 1000
"""Of an error's words, as a note carries them to the client."""

T = TypeVar("T")
R = TypeVar("R", ScoreRequest, GroupRequest)


class Runner(Protocol):
    """Reward models, as `workers` brings them."""

    def is_loaded(self, call: RewardCall) -> bool:
        """Whether the model of this computation is in memory."""

    def lend(self, call: RewardCall) -> AbstractContextManager[Any]:
        """The model of this computation, in memory within the context.

        Raises:
            ModelLoadError: It cannot be loaded.
            StaleCodeError: This process has loaded other code of the user's than is asked for; it ends.
        """

    def admit(self, model: Any) -> None:
        """Raises `BusyError` if the model cannot be asked now."""

    def run(
        self,
        model: Any,
        call: RewardCall,
        samples: Sequence[SampleRequest],
        payloads: Mapping[str, bytes],
    ) -> Iterator[dict[str, Outcome]]:
        """Score samples; yields outcomes by address as they come, one for each sample in all. Never raises for one.

        Raises:
            BusyError: The model could not be asked for some, which have no outcome.
            ModelLoadError, StaleCodeError: As for `lend`: it imported more code meanwhile.
        """


class Claims(Protocol):
    """Keeps claims alive while their samples are being scored."""

    def hold(self, addresses: Iterable[str], token: str) -> None:
        """Extend these claims until they are dropped."""

    def drop(self, addresses: Iterable[str], token: str) -> None:
        """Let these claims go, unless another task has claimed them since."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What a worker process brings to this task."""

    node: str
    outcomes: WorkerOutcomes
    store: PayloadStore
    claims: Claims
    runner: Runner
    tally: Tally = field(default_factory=Tally)
    refusal: Callable[[BaseException], str] = lambda _error: ""
    """Why this process ends, if what a task met is that a Redis will not serve it any more; else nothing."""


_desk: Desk | None = None
_process = secrets.token_hex(4)
_numbers = itertools.count()


def serve_at(desk: Desk) -> None:
    """Let this process's tasks score at `desk`."""
    global _desk
    _desk = desk


def new_token(node: str) -> str:
    """A token for a task's claims, unlike that of any other, also where containers are process 1 of one host name."""
    return f"{node}/{_process}.{next(_numbers)}"


@dataclass(frozen=True, slots=True)
class Message:
    """What a message says, beside the words for people.

    Attributes:
        request_id: Where the request is in the payload store.
        wire: Wire version of the client.
        number: The message's number in its queue; 0 has none.
        store: Identity of the client's payload store.
    """

    request_id: str
    wire: int
    number: int
    store: str


def on_desk(
    task: Any,
    label: str,
    message: Message,
    kind: type[R],
    work: Callable[[Desk, R, int], str],
) -> str:
    """Open a message at this process's desk and do its work; returns a few words for people.

    `work` is given the request and when it was taken (Redis's clock, ms). What cannot be read or asked now is left to
    the client, by a note, and so is what `work` raises before it is raised again.
    """
    assert _desk is not None, "a worker imports workers.process.startup"
    queue = task.request.delivery_info.get("routing_key") or app.conf.task_default_queue
    try:
        return _work(_desk, queue, message, kind, work)
    except LOST as error:  # for as long as a task waits; the worker's log says so once, and not for each task
        why = _desk.refusal(error) or why_away(error)
        _note_error(_desk, message, error, why)
        return f"left to be sent again: {why}"
    except redis.ResponseError as error:
        why = _desk.refusal(error)
        _note_error(_desk, message, error, why)
        if not why:
            raise
        return f"left to be sent again: {why}"
    except BaseException as error:
        _note_error(_desk, message, error)
        if isinstance(error, Exception) and not isinstance(error, MemoryError):
            raise
        # Out of a task of a threads pool it would leak the slot: the worker looks alive and takes nothing.
        raise RuntimeError(
            f"{type(error).__name__} while scoring {label}: {error}"
        ) from error


def lasting(call: Callable[[], T]) -> T:
    """`call()`, which may run twice, for as long as a task waits for a Redis that is away."""
    return persist(call, REDIS_AWAY_S)


def _work(
    desk: Desk,
    queue: str,
    message: Message,
    kind: type[R],
    work: Callable[[Desk, R, int], str],
) -> str:
    now_ms = lasting(lambda: desk.outcomes.take(queue, message.number))
    if message.wire != WIRE_VERSION:
        detail = (
            f"it speaks wire version {WIRE_VERSION}, the message is of {message.wire}"
        )
        return _leave_note(desk, message, "wire", detail)
    try:
        request = _read(desk, message, kind)
        return (
            "expired" if now_ms > request.deadline_ms else work(desk, request, now_ms)
        )
    except PayloadGoneError as error:
        return _note_missing(desk, message, str(error))
    except WireError as error:
        return _leave_note(desk, message, "wire", str(error))
    except BusyError as error:
        return _leave_note(desk, message, "busy", str(error))
    except StaleCodeError as error:
        return _leave_note(desk, message, "stale", str(error))


def _read(desk: Desk, message: Message, kind: type[R]) -> R:
    data = lasting(lambda: desk.store.get([message.request_id]))[0]
    if data is None:
        raise PayloadGoneError([message.request_id])
    return unpack(kind, data)


def _note_missing(desk: Desk, message: Message, what: str) -> str:
    """Something is not in our store: is it another store than the client's, or gone from the same?"""
    ours = lasting(desk.store.identity)
    if ours != message.store:
        detail = f"its payload store {ours} is not the client's {message.store}; set REWARDQ_PAYLOAD_URL alike on both"
        return _leave_note(desk, message, "store", detail, ours)
    return _leave_note(desk, message, "gone", what)


def _note_error(
    desk: Desk, message: Message, error: BaseException, why: str = ""
) -> None:
    """A task that raises each time would be sent again for ever; the client is to know why it waits."""
    words = why or f"the task raised {type(error).__name__}: {error}"
    with contextlib.suppress(
        redis.RedisError, OSError
    ):  # what was raised may be that it is away
        note = Note(reason="error", worker=desk.node, detail=words[:MAX_ERROR_CHARS])
        desk.outcomes.leave_note(message.request_id, note)


def _leave_note(
    desk: Desk, message: Message, reason: Any, detail: str, store: str = ""
) -> str:
    note = Note(reason=reason, worker=desk.node, detail=detail, store=store)
    lasting(lambda: desk.outcomes.leave_note(message.request_id, note))
    return f"not read: {reason}"
