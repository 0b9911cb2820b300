"""What comes to a worker by the channels of Redis, remote control and the events of other workers: is it well-formed?

Celery acts on them in callbacks of its event loop. What it does not expect there makes it connect anew, or writes the
whole message to the log.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Any, Literal

import msgpack
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from tasks.messages import Number
from workers.process.envelopes import MAX_ENVELOPE_BYTES, Part

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:@+-]{1,300}$")]
"""Of a command, a worker, a queue; nothing that would break a line of a log."""

Route = Annotated[str, Field(max_length=300)]


class _Headers(Part):
    clock: Number | None = None
    expires: FiniteFloat | int | None = None
    hostname: Name | None = None
    compression: None = None


class _Delivery(Part):
    exchange: Route
    routing_key: Route


class _Properties(Part):
    delivery_info: _Delivery
    delivery_tag: Route
    body_encoding: Literal["base64"]


class _Outer(Part):
    body: str
    content_type: Literal["application/x-msgpack", "application/json"] = Field(
        alias="content-type"
    )
    content_encoding: Literal["binary", "utf-8"] = Field(alias="content-encoding")
    headers: _Headers
    properties: _Properties


class _ReplyTo(Part):
    exchange: Route
    routing_key: Route


class _Command(BaseModel):
    """A message of remote control. Celery passes all its fields on, so there may be no further one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    method: Name
    arguments: dict[str, Any] | None = None
    destination: list[Name] | None = None
    pattern: Annotated[str, Field(max_length=300)] | None = None
    matcher: Literal["glob", "pcre"] | None = None
    reply_to: _ReplyTo | None = None
    ticket: Name | None = None


class _Event(BaseModel):
    """What a worker says of itself. Celery keeps all its fields and computes with them, so there is no further one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["worker-online", "worker-heartbeat", "worker-offline"]
    hostname: Name
    clock: Number
    timestamp: FiniteFloat | int
    utcoffset: FiniteFloat | int = 0
    pid: Number = 0
    freq: FiniteFloat | int = 0
    active: Number = 0
    processed: Number = 0
    loadavg: list[FiniteFloat | int] = []
    sw_ident: Name = "py-celery"
    sw_ver: Name = ""
    sw_sys: Name = ""


def why_refused(data: bytes) -> str:
    """Why bytes of a channel are no message that Celery can read, in words of ours; empty if they are one."""
    if len(data) > MAX_ENVELOPE_BYTES:
        return f"more than {MAX_ENVELOPE_BYTES} bytes"
    try:
        outer = _Outer.model_validate(json.loads(data))
        body = _decoded(outer)
        is_event = outer.properties.delivery_info.exchange == "celeryev"
        (_Event if is_event else _Command).model_validate(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        return f"{error.title.strip('_').lower()}: {first['type']}"
    except (ValueError, binascii.Error, msgpack.UnpackException, RecursionError):
        return "cannot be decoded"
    return ""


def _decoded(outer: _Outer) -> Any:
    """The body of a message, if it is said to be what it is: remote control is msgpack, an event is JSON."""
    is_event = outer.properties.delivery_info.exchange == "celeryev"
    is_json = outer.content_type == "application/json"
    encoding = "utf-8" if is_json else "binary"
    if is_event is not is_json or outer.content_encoding != encoding:
        raise ValueError("another serializer")
    data = base64.b64decode(outer.body, validate=True)
    return json.loads(data) if is_json else msgpack.unpackb(data)
