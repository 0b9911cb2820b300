from __future__ import annotations

import math

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import WireError
from tasks.messages import (
    WIRE_VERSION,
    Failure,
    Heartbeat,
    MediaRef,
    Note,
    Outcome,
    RewardCall,
    SampleRequest,
    ScoreRequest,
    pack,
    pack_outcome,
    unpack,
    unpack_outcome,
)

CALL = RewardCall(
    name="text",
    model="OCR",
    fingerprint="f" * 16,
    version="1",
    dtype="bfloat16",
    batch_size=16,
    timeout_s=600.0,
    image_format="raw",
    options={"deep": {"list": [1, 2.5, None, "é"]}},
)
REF = MediaRef(name="c.1", digest="d" * 32, shape=(4, 5, 3), format="raw")
SAMPLES = (
    SampleRequest(address="run:f:k", prompt="ein “Café”, 猫", media={"image": REF, "condition_images": (REF, REF)}),
    SampleRequest(address="run:f:l", prompt="", media={}, metadata={"text": "x", "n": [1, {"y": None}]}, attempt=3),
)
REQUEST = ScoreRequest(
    id="c.r1", run="run", label="OCR x 2", sent_ms=1, deadline_ms=2**41, reward=CALL, samples=SAMPLES
)
HEARTBEAT = Heartbeat(
    wire=WIRE_VERSION,
    node="gpu.1@h",
    queues=("gpu", "vlm"),
    host="h",
    pid=1,
    store="s",
    state="ready",
    models=("OCR",),
    unanswered=("reward",),
)


def fields_of(message) -> dict:
    return msgpack.unpackb(pack(message))


@pytest.mark.parametrize("message", [REQUEST, HEARTBEAT, Note(reason="gone", worker="w", detail="d"), *SAMPLES, CALL])
def test_a_message_arrives_as_it_was_sent(message):
    assert unpack(type(message), pack(message)) == message


def test_words_that_are_no_unicode_do_not_take_their_message_with_them():
    """A server may cut its words in the midst of a character, and a file's name may be anything."""
    words = "cut in a \ud83d"
    beat = HEARTBEAT.model_copy(update={"unanswered": ()}).model_dump() | {"unanswered": (words,)}
    messages = Failure(kind="failed", message=words), Note(reason="error", worker="w", detail=words), Heartbeat(**beat)
    said = [unpack(type(message), pack(message)) for message in messages]
    assert [said[0].message, said[1].detail, said[2].unanswered[0]] == ["cut in a ?"] * 3


def test_a_message_is_msgpack_of_plain_data():
    assert fields_of(REQUEST)["samples"][0]["media"]["image"] == {
        "name": "c.1",
        "digest": "d" * 32,
        "shape": [4, 5, 3],
        "format": "raw",
    }


@pytest.mark.parametrize("field", ["sample", "SAMPLES", "__class__"])
def test_an_unknown_field_is_refused_and_named(field):
    with pytest.raises(WireError, match=f"not a ScoreRequest of wire version {WIRE_VERSION}: {field}"):
        unpack(ScoreRequest, msgpack.packb({**fields_of(REQUEST), field: 1}))


@pytest.mark.parametrize("field", ["id", "reward", "samples", "deadline_ms"])
def test_a_missing_field_is_refused_and_named(field):
    fields = fields_of(REQUEST)
    del fields[field]
    with pytest.raises(WireError, match=field):
        unpack(ScoreRequest, msgpack.packb(fields))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("samples", []),
        ("samples", [{"address": 5}]),
        ("deadline_ms", "soon"),
        ("id", "x" * 5000),
        ("reward", {**CALL.model_dump(), "batch_size": 0}),
        ("reward", {**CALL.model_dump(), "timeout_s": -1}),
        ("samples", [{**SAMPLES[0].model_dump(), "attempt": 0}]),
        ("samples", [{**SAMPLES[0].model_dump(), "media": {"image": {**REF.model_dump(), "format": "pickle"}}}]),
    ],
)
def test_a_field_of_another_kind_is_refused_with_its_place(path, value):
    with pytest.raises(WireError, match=path):
        unpack(ScoreRequest, msgpack.packb({**fields_of(REQUEST), path: value}))


@pytest.mark.parametrize("wire", [0, WIRE_VERSION + 1, "2", None])
def test_another_wire_version_is_named_before_anything_else_is_looked_at(wire):
    with pytest.raises(WireError, match=f"of wire version {wire}; this side speaks {WIRE_VERSION}"):
        unpack(ScoreRequest, msgpack.packb({"wire": wire, "of_the_future": True}))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"{}", b"\x80\x02cos", pack(REQUEST)[:-1], pack(REQUEST) + b"\x00", msgpack.packb({1: 2}),
     msgpack.packb([1, 2]), msgpack.packb("text"), msgpack.packb(None), b"\xd4\x05\x00", b"\x81\xa1\xff\x00",
     b"\x91" * 5000],
)  # fmt: skip
def test_bytes_that_are_no_message_are_refused(data):
    with pytest.raises(WireError, match="not a ScoreRequest"):
        unpack(ScoreRequest, data)


@given(st.binary(max_size=200))
def test_no_bytes_whatever_do_more_than_be_refused(data):
    for model in (ScoreRequest, Note, Outcome, Heartbeat):
        try:
            unpack(model, data)
        except WireError:
            continue
        assert model is Outcome, "only an outcome has defaults for every field"
    try:
        unpack_outcome(data)
    except WireError:
        return


FAILURE = Failure(kind="failed", message="out of luck")


@pytest.mark.parametrize("fields", [{}, {"reward": 1.0, "failure": FAILURE}, {"info": {"a": 1}}])
def test_an_outcome_is_a_reward_or_a_failure_and_exactly_one_of_them(fields):
    with pytest.raises(ValueError, match="exactly one of them"):
        Outcome(**fields)
    with pytest.raises(WireError, match="exactly one of them"):
        unpack_outcome(b"R;" + msgpack.packb({k: v if k != "failure" else v.model_dump() for k, v in fields.items()}))


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused_on_both_sides(reward):
    with pytest.raises(ValueError, match="a reward is finite"):
        Outcome(reward=reward)
    with pytest.raises(WireError, match="a reward is finite"):
        unpack_outcome(b"R;" + msgpack.packb({"reward": reward}))


def test_a_failure_has_one_of_five_kinds():
    for kind in ("failed", "timeout", "unparsable", "invalid", "abstained"):
        assert Failure(kind=kind, message="m").kind == kind
    with pytest.raises(ValueError, match="kind"):
        Failure(kind="tired", message="m")


@pytest.mark.parametrize(
    ("outcome", "header"),
    [
        (Outcome(reward=0.25, info={"read": ["a", None]}, origin={"worker": "w"}), b"R;"),
        (Outcome(reward=0.0, attempt=7), b"R;"),
        (Outcome(failure=FAILURE), b"F1;"),
        (Outcome(failure=FAILURE, attempt=12), b"F12;"),
    ],
)
def test_an_outcome_arrives_as_it_was_written_behind_a_header_for_scripts(outcome, header):
    data = pack_outcome(outcome)
    assert data.startswith(header)
    assert unpack_outcome(data) == outcome


@pytest.mark.parametrize("data", [b"", b"R", b"R;", b";", b"no outcome at all", b"R;\xc1"])
def test_bytes_that_are_no_outcome_are_refused(data):
    with pytest.raises(WireError):
        unpack_outcome(data)


def test_a_message_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        REQUEST.run = "other"
