"""The envelope of a task's message: checked, and made anew, before Celery sees it.

Whoever can write to a queue can write anything there, and much of an envelope makes Celery do something: wait for an
`eta`, call back, go on with a chain, store a result. What Celery does not expect ends its consumer or costs a slot. So
a worker hands Celery an envelope of its own making, with the parts of rewardq's own messages and nothing else.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import logging
import re
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.celery_app import COMBINE, GROUP, PRIORITY_FIRST, SCORE
from tasks.messages import MOST, WIRE_VERSION, Number, Text

log = logging.getLogger(__name__)

MAX_ENVELOPE_BYTES = 256 * 1024
"""Of an envelope as it lies in Redis. Ours have a few KiB: media, prompts and options are in the payload store."""

MAX_REPR_CHARS = 1024

MAX_LATER_ARGUMENTS = 4

LOGGED_A_MINUTE = 20
"""Lines on dropped messages; the others of a minute are counted, so that a flood of them fills no disk."""

MINUTE_S = 60.0

ID = r"[A-Za-z0-9_:-][A-Za-z0-9_.:~-]{0,199}"
"""Ids of tasks, groups, requests and stores: nothing that would break a line of a log or lead out of a folder."""


class EnvelopeError(ValueError):
    """A message is none of rewardq's. Says why in words of ours, never in the message's, and its id if it has one."""

    def __init__(self, why: str, task_id: str = "unknown") -> None:
        super().__init__(why)
        self.task_id = task_id


@dataclass(frozen=True, slots=True)
class Envelope:
    """An envelope made anew.

    Attributes:
        item: What kombu is given in place of what was in the queue's list.
        task_id: The id of its task.
        delivery_tag: Kombu's name for it until it is acknowledged.
    """

    item: bytes
    task_id: str
    delivery_tag: str


class Part(BaseModel):
    """A part of an envelope. Types are taken as they are; what we do not use is left out."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


Id = Annotated[str, Field(pattern=f"^{ID}$")]


class _Headers(Part):
    task: Literal["rewardq.score", "rewardq.group", "rewardq.combine"]
    id: Id
    group: Id | None = None
    group_index: Number | None = None
    eta: None = None
    expires: None = None


class _Properties(Part):
    priority: Annotated[int, Field(ge=0, le=9)] = 0
    body_encoding: Literal["base64"]


class _Outer(Part):
    body: str
    content_type: Literal["application/x-msgpack"] = Field(alias="content-type")
    headers: _Headers
    properties: _Properties


class _Chord(Part):
    """The body of a chord, which travels with its headers."""

    task: Literal["rewardq.combine"]
    args: list[Any]


class _Embedded(Part):
    callbacks: None = None
    errbacks: None = None
    chain: None = None
    chord: _Chord | None = None


class _Body(Part):
    args: list[Any]
    kwargs: Annotated[dict[str, Any], Field(max_length=0)]
    embedded: _Embedded


class _Arguments(Part):
    """What all versions of a message have in common; the order is that of `workers.scoring.task_message`."""

    label: Text
    request_id: Id
    wire: Number


class _OtherArguments(_Arguments):
    """Of another wire version, up to the number, which all versions have had."""

    number: Number = 0


class _ScoreArguments(_Arguments):
    number: Number = 0
    store: Id | Literal[""] = ""
    digest: Id | Literal[""] = ""


class _CombineArguments(_Arguments):
    store: Id | Literal[""] = ""
    num_returns: Number = 0
    digest: Id | Literal[""] = ""


_ARGUMENTS: dict[str, type[_Arguments]] = {
    SCORE: _ScoreArguments,
    GROUP: _ScoreArguments,
    COMBINE: _CombineArguments,
}

P = TypeVar("P", bound=Part)


def remade(item: bytes, queue: str) -> Envelope:
    """An envelope made anew from what is in `item`.

    Args:
        item: What was in the queue's list: JSON, with a body of msgpack in base64.
        queue: The queue that it was taken from.

    Raises:
        EnvelopeError: It is no message of rewardq's.
    """
    fields = _fields(item)
    try:
        return _remade(fields, queue)
    except EnvelopeError as error:
        raise EnvelopeError(str(error), _id_in(fields)) from None


def _remade(fields: Any, queue: str) -> Envelope:
    outer = _parsed(_Outer, fields, "")
    body = _body(outer.body)
    headers, chord = outer.headers, body.embedded.chord
    args = _arguments(headers.task, body.args)
    if chord is not None and headers.group is None:
        raise EnvelopeError("headers.group: missing, of a chord")

    signature = None if chord is None else _signature(chord, queue)
    embedded = {"callbacks": None, "errbacks": None, "chain": None, "chord": signature}
    packed = msgpack.packb([args, {}, embedded])
    tag = uuid.uuid4().hex
    envelope = {
        "body": base64.b64encode(packed).decode(),
        "content-encoding": "binary",
        "content-type": "application/x-msgpack",
        "headers": {
            "lang": "py",
            "task": headers.task,
            "id": headers.id,
            "root_id": headers.id,
            "parent_id": None,
            "group": headers.group,
            "group_index": headers.group_index,
            "retries": 0,
            "eta": None,
            "expires": None,
            "timelimit": [None, None],
            "argsrepr": args[0][:MAX_REPR_CHARS],
            "kwargsrepr": "",
            "ignore_result": True,
        },
        "properties": {
            "correlation_id": headers.id,
            "reply_to": None,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": outer.properties.priority,
            "body_encoding": "base64",
            "delivery_tag": tag,
        },
    }
    return Envelope(json.dumps(envelope).encode(), headers.id, tag)


def _fields(item: bytes) -> Any:
    if len(item) > MAX_ENVELOPE_BYTES:
        raise EnvelopeError(f"more than {MAX_ENVELOPE_BYTES} bytes")
    try:
        return json.loads(item)
    except (ValueError, RecursionError):
        raise EnvelopeError("no JSON") from None


def _body(text: str) -> _Body:
    try:
        packed = base64.b64decode(text, validate=True)
        parts = msgpack.unpackb(packed)
    except (ValueError, binascii.Error, msgpack.UnpackException, RecursionError):
        raise EnvelopeError("body: no msgpack in base64") from None
    if not isinstance(parts, list) or len(parts) != 3:
        raise EnvelopeError("body: not the three parts of a task")
    given = dict(zip(("args", "kwargs", "embedded"), parts, strict=True))
    return _parsed(_Body, given, "body.")


def _arguments(task: str, args: list[Any]) -> list[Any]:
    """The arguments that a task knows, and further ones of a later client as long as they are ids or numbers.

    A message of another wire version is answered by a note.
    """
    is_our_version = _named(_Arguments, args).wire == WIRE_VERSION
    kind = _ARGUMENTS[task] if is_our_version else _OtherArguments
    known = _named(kind, args).model_dump(exclude_unset=True)
    known["label"] = _printable(known["label"])
    later = args[len(kind.model_fields) :][:MAX_LATER_ARGUMENTS]
    return [*known.values(), *itertools.takewhile(_is_plain, later)]


def _is_plain(value: Any) -> bool:
    is_id = isinstance(value, str) and re.fullmatch(ID, value) is not None
    return is_id or (type(value) is int and 0 <= value <= MOST)


def _named(kind: type[_Arguments], args: list[Any]) -> Any:
    return _parsed(kind, dict(zip(kind.model_fields, args, strict=False)), "args.")


def _signature(chord: _Chord, queue: str) -> dict[str, Any]:
    """The body of a chord, as Celery sends it once the headers are counted."""
    args = _arguments(COMBINE, chord.args)
    options = {
        "queue": queue,
        "priority": PRIORITY_FIRST,
        "argsrepr": args[0][:MAX_REPR_CHARS],
        "kwargsrepr": "",
        "ignore_result": True,
    }
    return {
        "task": COMBINE,
        "args": args,
        "kwargs": {},
        "options": options,
        "subtask_type": None,
        "immutable": True,
    }


def _parsed(kind: type[P], given: Any, where: str) -> P:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "envelope"
        raise EnvelopeError(f"{where}{field}: {first['type']}") from None


def _printable(text: str) -> str:
    """Text that stays within its line, and that can be encoded."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _id_in(fields: Any) -> str:
    headers = fields.get("headers") if isinstance(fields, dict) else None
    found = headers.get("id") if isinstance(headers, dict) else None
    return found if isinstance(found, str) and _is_plain(found) else "unknown"


class Envelopes:
    """What a worker takes out of its queues: it admits envelopes, and drops, logs and counts what is none.

    The main thread takes; others read the counts.
    """

    def __init__(self) -> None:
        self.num_taken = 0
        """Messages taken out of queues, dropped ones too."""
        self.num_dropped = 0
        self._lock = threading.Lock()
        self._minute_ends_s = 0.0
        self._num_in_minute = 0

    def admit(self, item: bytes, queue: str) -> Envelope | None:
        """As `remade`; None for a message that is dropped."""
        self.num_taken += 1
        try:
            return remade(item, queue)
        except EnvelopeError as error:
            self.drop(queue, error.task_id, len(item), str(error))
            return None

    def drop(self, queue: str, task_id: str, num_bytes: int, why: str) -> None:
        """Count a message that is dropped, and say so in the log, within bounds; `why` has none of its content."""
        with self._lock:
            self.num_dropped += 1
            left_out = self._begin_minute_if_over()
            self._num_in_minute += 1
            is_shown = self._num_in_minute <= LOGGED_A_MINUTE
        if left_out:
            log.warning("%d more messages were dropped in the last minute", left_out)
        if is_shown:
            log.warning(
                "message dropped, it is none of rewardq's queue=%s id=%s num_bytes=%d why=%s",
                queue,
                task_id,
                num_bytes,
                why,
            )

    def _begin_minute_if_over(self) -> int:
        """How many lines the last minute left out, if it is over now."""
        now_s = time.monotonic()
        if now_s < self._minute_ends_s:
            return 0
        left_out = max(0, self._num_in_minute - LOGGED_A_MINUTE)
        self._minute_ends_s, self._num_in_minute = now_s + MINUTE_S, 0
        return left_out
