"""Envelopes: what Celery is given of a message, and which messages are dropped."""

from __future__ import annotations

import base64
import json
import logging
import time

import msgpack
import pytest

from tasks.celery_app import COMBINE, COMBINE_ARGUMENTS, GROUP, SCORE, SCORE_ARGUMENTS, make_app
from tasks.messages import WIRE_VERSION
from tests.fuzz.envelopes import encoded, message
from trainer_client.engine.broker import CeleryBroker
from trainer_client.engine.requests import Message
from workers.process import envelopes
from workers.process.envelopes import (
    LOGGED_A_MINUTE,
    MAX_ENVELOPE_BYTES,
    EnvelopeError,
    Envelopes,
    remade,
)

SECRET = "a prompt"


def changed(body=None, **parts):
    """A right message, with `headers` and `properties` changed, and other parts and the body exchanged."""
    whole = message()
    for name in ("headers", "properties"):
        given = parts.pop(name, {})
        whole[name] = {**whole[name], **given} if isinstance(given, dict) else given
    whole |= {name.replace("_", "-"): part for name, part in parts.items()}
    if body is not None:
        whole["body"] = encoded(body)
    return json.dumps(whole).encode()


def body(args=("l", "c.1", WIRE_VERSION, 1, "store"), kwargs=None, **embedded):
    return [list(args), kwargs or {}, embedded]


def body_in(item):
    return msgpack.unpackb(base64.b64decode(json.loads(item)["body"]))


def test_a_message_of_the_trainers_is_handed_on_with_its_task_arguments_priority_group_and_body(settings, redis_server):
    app = make_app(settings)
    part = Message("rewardq.score", "part", "c.1.request.0", "gpu", number=7)
    whole = Message("rewardq.combine", "whole", "c.1.request", "gpu", header=[part])
    CeleryBroker(app).publish([whole], "store")
    with redis_server.client() as broker:
        (item,) = broker.lrange("rewardq:queue:gpu\x06\x166", 0, -1)
        app.close()
    sent, made = json.loads(item), json.loads(remade(item, "gpu").item)
    for name in ("task", "id", "group", "group_index", "argsrepr"):
        assert made["headers"][name] == sent["headers"][name]
    assert made["properties"]["priority"] == 6
    assert made["properties"]["delivery_info"]["routing_key"] == "gpu"
    sent_body, made_body = body_in(item), body_in(remade(item, "gpu").item)
    assert made_body[:2] == sent_body[:2]
    assert made_body[2]["chord"] == sent_body[2]["chord"]


def test_what_a_later_client_adds_is_left_out_but_for_plain_arguments():
    args = ("l", "c.1", WIRE_VERSION, 1, "store", "digest", {"more": 1}, "more")
    item = remade(changed(body(args, stamps=5), headers={"stamps": 5, "retries": "x", "shadow": {"a": 1}}), "gpu").item
    made = json.loads(item)
    assert body_in(item)[0] == ["l", "c.1", WIRE_VERSION, 1, "store", "digest"]
    assert {"stamps", "shadow"}.isdisjoint(made["headers"])
    assert made["headers"]["retries"] == 0


def test_a_message_of_another_wire_version_is_handed_on_with_what_it_says_of_itself():
    args = ("l", "c.1", WIRE_VERSION + 1, 7, {"new": 1})
    assert body_in(remade(changed(body(args)), "gpu").item)[0] == ["l", "c.1", WIRE_VERSION + 1, 7]


def test_the_queue_is_that_which_the_message_was_in_whatever_it_says():
    item = changed(properties={"delivery_info": {"routing_key": "other"}})
    made = json.loads(remade(item, "gpu").item)
    assert made["properties"]["delivery_info"] == {"exchange": "", "routing_key": "gpu"}
    assert body_in(remade(item, "gpu").item)[2]["chord"]["options"]["queue"] == "gpu"


def test_a_label_stays_within_its_line():
    made = remade(changed(body(("a\n[CRITICAL]\u2028 b", "c.1", WIRE_VERSION))), "gpu").item
    assert body_in(made)[0][0] == "a?[CRITICAL]? b"


CHORD = {"task": "rewardq.combine", "args": ["l", "c.1", WIRE_VERSION, "store"]}


@pytest.mark.parametrize(
    ("item", "why"),
    [
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"x" * (MAX_ENVELOPE_BYTES + 1), f"more than {MAX_ENVELOPE_BYTES} bytes"),
        (b"[]", "envelope: model_type"),
        (changed(headers=None), "headers: model_type"),
        (changed(headers={"task": "os.system"}), "headers.task: literal_error"),
        (changed(headers={"id": 5}), "headers.id: string_type"),
        (changed(headers={"id": "a\nb"}), "headers.id: string_pattern_mismatch"),
        (changed(headers={"eta": "2000-01-01T00:00:00"}), "headers.eta: none_required"),
        (changed(headers={"expires": 1e308}), "headers.expires: none_required"),
        (changed(headers={"group": ["g"]}), "headers.group: string_type"),
        (changed(headers={"group": None}), "headers.group: missing, of a chord"),
        (changed(content_type="application/json"), "content-type: literal_error"),
        (changed(properties={"priority": "x"}), "properties.priority: int_type"),
        (changed(properties={"priority": True}), "properties.priority: int_type"),
        (changed(properties={"body_encoding": "zip"}), "properties.body_encoding: literal_error"),
        (json.dumps({**message(), "body": "%%%"}).encode(), "body: no msgpack in base64"),
        (json.dumps({**message(), "body": base64.b64encode(b"\xc1").decode()}).encode(), "body: no msgpack in base64"),
        (changed(5), "body: not the three parts of a task"),
        (changed(body({"a": 1})[:2]), "body: not the three parts of a task"),
        (changed([{"a": 1}, {}, {}]), "body.args: list_type"),
        (changed([["l"], [1], {}]), "body.kwargs: dict_type"),
        (changed(body(kwargs={"x": 1})), "body.kwargs: too_long"),
        (changed([["l"], {}, 5]), "body.embedded: model_type"),
        (changed(body(callbacks=[5])), "body.embedded.callbacks: none_required"),
        (changed(body(chain=[{"task": "os.system"}])), "body.embedded.chain: none_required"),
        (changed(body(chord=5)), "body.embedded.chord: model_type"),
        (changed(body(chord={**CHORD, "task": "x"})), "body.embedded.chord.task: literal_error"),
        (changed(body(chord={**CHORD, "args": ["l"]})), "args.request_id: missing"),
        (changed(body(("l",))), "args.request_id: missing"),
        (changed(body(("l", "../../etc", WIRE_VERSION))), "args.request_id: string_pattern_mismatch"),
        (changed(body(("l", "..", WIRE_VERSION))), "args.request_id: string_pattern_mismatch"),
        (changed(body(("l" * 5000, "c.1", WIRE_VERSION))), "args.label: string_too_long"),
        (changed(body(("l", "c.1", WIRE_VERSION, "abc"))), "args.number: int_type"),
        (changed(body(("l", "c.1", WIRE_VERSION, 2**62))), "args.number: less_than_equal"),
        (changed(body(("l", "c.1", WIRE_VERSION, -1))), "args.number: greater_than_equal"),
    ],
)
def test_a_message_that_is_none_of_ours_is_refused_in_words_of_ours(item, why):
    with pytest.raises(EnvelopeError) as caught:
        remade(item, "gpu")
    assert str(caught.value) == why


def test_a_dropped_message_is_logged_by_id_and_size_within_bounds_and_counted(caplog, monkeypatch):
    envelopes = Envelopes()
    item = changed(headers={"task": f"{SECRET}\nforged"})
    with caplog.at_level(logging.WARNING):
        for _ in range(LOGGED_A_MINUTE + 5):
            assert envelopes.admit(item, "gpu") is None
        assert envelopes.admit(changed(headers={"id": f"{SECRET}\nforged"}), "gpu") is None
        later = time.monotonic() + 61
        monkeypatch.setattr("workers.process.envelopes.time.monotonic", lambda: later)
        assert envelopes.admit(changed(headers={"id": f"{SECRET}\nforged"}), "gpu") is None
    assert envelopes.num_dropped == envelopes.num_taken == LOGGED_A_MINUTE + 7
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == LOGGED_A_MINUTE + 2
    task_id = json.loads(item)["headers"]["id"]
    assert lines[0].endswith(f"queue=gpu id={task_id} num_bytes={len(item)} why=headers.task: literal_error")
    assert lines[-2] == "6 more messages were dropped in the last minute"
    assert "id=unknown" in lines[-1]
    assert not any(SECRET in line or "\n" in line for line in lines)


def test_the_arguments_are_checked_in_the_order_in_which_tasks_read_them():
    found = {task: tuple(kind.model_fields) for task, kind in envelopes._ARGUMENTS.items()}
    assert found == {SCORE: SCORE_ARGUMENTS, GROUP: SCORE_ARGUMENTS, COMBINE: COMBINE_ARGUMENTS}
