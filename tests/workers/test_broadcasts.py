"""Messages of remote control and events: which Celery is given, and which are dropped."""

from __future__ import annotations

import base64
import copy
import json

import msgpack
import pytest

from tests.fuzz.envelopes import BROADCAST, BROADCASTS
from workers.process.broadcasts import why_refused
from workers.process.envelopes import MAX_ENVELOPE_BYTES


def command(outer=None, **changed):
    """A `ping` by remote control, with parts of its body changed, and others in place of those around it."""
    body = {**BROADCASTS["celery.pidbox"], **changed}
    return json.dumps({**BROADCAST, "body": base64.b64encode(msgpack.packb(body)).decode(), **(outer or {})}).encode()


def event(**changed):
    """The heartbeat of another worker."""
    body = {**BROADCASTS["celeryev/worker.heartbeat"], **changed}
    outer = copy.deepcopy(BROADCAST)
    outer |= {"content-type": "application/json", "content-encoding": "utf-8"}
    outer["properties"]["delivery_info"]["exchange"] = "celeryev"
    return json.dumps({**outer, "body": base64.b64encode(json.dumps(body).encode()).decode()}).encode()


@pytest.mark.parametrize(
    "data",
    [
        command(),
        command(method="stats", destination=["gpu.1@host"]),
        command(method="rate_limit", arguments={"task_name": "rewardq.score", "rate_limit": "100/s"}),
        command(reply_to=None),
        event(),
    ],
)
def test_what_celery_sends_is_let_through(data):
    assert why_refused(data) == ""


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"{", "cannot be decoded"),
        (b"[" * 100_000, "cannot be decoded"),
        (b"x" * (MAX_ENVELOPE_BYTES + 1), f"more than {MAX_ENVELOPE_BYTES} bytes"),
        (b"5", "outer: model_type"),
        (command({"headers": {"clock": "x"}}), "outer: int_type"),
        (command({"body": "%%%"}), "cannot be decoded"),
        (command({"content-type": "application/json", "content-encoding": "utf-8"}), "cannot be decoded"),
        (command({"properties": {"body_encoding": "base64"}}), "outer: missing"),
        (command(method=5), "command: string_type"),
        (command(method="a\nforged"), "command: string_pattern_mismatch"),
        (command(destination=5), "command: list_type"),
        (command(reply_to={"exchange": "x"}), "command: missing"),
        (command(more=1), "command: extra_forbidden"),
        (event(hostname=None), "event: string_type"),
        (event(clock=2**62), "event: less_than_equal"),
        (event(timestamp="x"), "event: float_type"),
        (event(freq=[]), "event: float_type"),
        (event(more=1), "event: extra_forbidden"),
    ],
)
def test_what_celery_does_not_expect_is_refused_in_words_of_ours(data, why):
    assert why_refused(data) == why
