"""Mutated envelopes: what a queue and the channels of remote control may hold, given to a real worker.

`run(seconds)` starts a Redis and a worker with one slot, so that a single lost slot shows at once, and ends both.
"""

from __future__ import annotations

import base64
import copy
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import hypothesis.strategies as st
import msgpack

from tasks import keys
from tasks.celery_app import make_app
from tasks.messages import WIRE_VERSION, Note, unpack
from tasks.settings import load_settings
from tests.fuzz.counts import Counts
from tests.servers import RedisServer, WorkerProcess, wait_until

QUEUE = "gpu"
BATCH = 250
"""Envelopes between two looks at the worker."""

ANSWER_S = 60.0
"""How long the worker may take for a batch, and for a message that is right."""

SECRET = "only-in-the-message"
"""In each mutated envelope; the worker's log must not have it."""


def run(seconds: float, *, most: int | None = None, seed: int = 0) -> Counts:
    """Send mutated envelopes to a worker.

    Args:
        seconds: For how long; a batch that is begun is ended.
        most: End after so many envelopes.
        seed: Of the first batch; each further batch has the next one.

    Returns:
        What came of them; `wrong` is a worker whose log has content of a message, or a line that one has forged.
    """
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder))
        bench = _Bench(server, Path(folder))
        try:
            _play(bench, time.monotonic() + seconds, most, seed)
        finally:
            bench.stop()
            server.stop()
    return bench.counts


def _play(bench: _Bench, ends_at_s: float, most: int | None, seed: int) -> None:
    for number in range(seed, 2**31):
        bench.give(drawn(envelopes(), number, BATCH), drawn(broadcasts(), number, BATCH // 5))
        is_enough = most is not None and bench.counts.tried >= most
        if is_enough or time.monotonic() > ends_at_s:
            return


class _Bench:
    """A worker with one slot; another is started in its place if it ends or is stuck."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        self._settings = load_settings(broker_url=server.url)
        self._folder = folder
        self._redis = server.client()
        self._worker = self._start()
        self.counts = Counts()

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess(QUEUE, self._settings, self._folder, 1, {})
        worker.wait_ready()
        return worker

    def give(self, envelopes: list[bytes], broadcasts: list[tuple[str, bytes]]) -> None:
        """Send envelopes and broadcasts, and see whether the worker serves a right message then."""
        self._redis.lpush(keys.queue_lists(QUEUE)[0], *envelopes)
        for channel, data in broadcasts:
            self._redis.publish(f"{keys.BROKER}/0.{channel}", data)
        self.counts.tried += len(envelopes) + len(broadcasts)
        if self._serves():
            return
        has_ended = self._worker.process.poll() is not None
        self.counts.ended += has_ended
        self.counts.stuck += not has_ended
        self.counts.say(f"after one of {envelopes}")
        self._read_log()
        self._worker.kill()
        self._redis.flushall()
        self._worker = self._start()

    def _serves(self) -> bool:
        """Whether a message that is right is noted: its request is in no store."""
        request_id = uuid.uuid4().hex
        own = json.dumps(message(request_id=request_id)).encode()
        self._redis.lpush(keys.queue_lists(QUEUE)[0], own)

        def is_noted() -> bool:
            return self._worker.process.poll() is not None or bool(self._redis.exists(keys.note(request_id)))

        try:
            wait_until(is_noted, ANSWER_S)
        except AssertionError:
            return False
        if self._worker.process.poll() is not None:
            return False
        value = self._redis.get(keys.note(request_id))
        return isinstance(value, bytes) and unpack(Note, value).reason == "store"

    def _read_log(self) -> None:
        if SECRET in self._worker.log_text:
            self.counts.wrong += 1
            self.counts.say("the worker's log has the content of a message")

    def _read_counts(self) -> None:
        """How many messages the worker says it has dropped."""
        answers = make_app(self._settings).control.inspect(timeout=10).stats() or {}
        self.counts.refused += sum(stats["messages"]["dropped"] for stats in answers.values())

    def stop(self) -> None:
        self._read_counts()
        self._worker.stop()
        self._read_log()
        self._redis.close()


def message(request_id: str = "c.1.request") -> dict[str, Any]:
    """A message as a trainer's Celery makes it, as Python values; its request is in no store."""
    task_id = str(uuid.uuid4())
    label = "PickScore x 16, run demo step 3"
    combine = {
        "task": "rewardq.combine",
        "args": [label, request_id, WIRE_VERSION, "store"],
        "kwargs": {},
        "options": {"queue": QUEUE, "priority": 0, "ignore_result": True},
        "subtask_type": None,
        "immutable": True,
    }
    embedded = {"callbacks": None, "errbacks": None, "chain": None, "chord": combine}
    return {
        "body": encoded([[label, request_id, WIRE_VERSION, 1, "store"], {}, embedded]),
        "content-encoding": "binary",
        "content-type": "application/x-msgpack",
        "headers": {
            "lang": "py",
            "task": "rewardq.score",
            "id": task_id,
            "shadow": None,
            "eta": None,
            "expires": None,
            "group": uuid.uuid4().hex,
            "group_index": 0,
            "retries": 0,
            "timelimit": [None, None],
            "root_id": task_id,
            "parent_id": None,
            "argsrepr": label,
            "kwargsrepr": "",
            "origin": "gen1@host",
            "ignore_result": True,
            "replaced_task_nesting": 0,
            "stamped_headers": None,
            "stamps": {},
        },
        "properties": {
            "correlation_id": task_id,
            "reply_to": str(uuid.uuid4()),
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
            "priority": 6,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }


def encoded(body: Any) -> str:
    """The body of a message as it travels."""
    return base64.b64encode(msgpack.packb(body)).decode()


BROADCAST = {
    "content-encoding": "binary",
    "content-type": "application/x-msgpack",
    "headers": {"clock": 1, "expires": None},
    "properties": {
        "delivery_mode": 2,
        "delivery_info": {"exchange": "celery.pidbox", "routing_key": "worker.heartbeat"},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": "tag",
    },
}
"""What is around a message of remote control, and around an event."""

BROADCASTS: dict[str, Any] = {
    "celery.pidbox": {
        "method": "ping",
        "arguments": {},
        "destination": None,
        "pattern": None,
        "matcher": None,
        "reply_to": {"exchange": "reply.celery.pidbox", "routing_key": "nobody"},
        "ticket": "ticket",
    },
    "celeryev/worker.heartbeat": {
        "hostname": "gpu.1@other",
        "utcoffset": 0,
        "pid": 1,
        "clock": 5,
        "freq": 2.0,
        "active": 0,
        "processed": 0,
        "loadavg": [0.1, 0.1, 0.1],
        "sw_ident": "py-celery",
        "sw_ver": "5.7.0",
        "sw_sys": "Linux",
        "timestamp": 1.0,
        "type": "worker-heartbeat",
    },
}
"""By channel: what remote control and other workers say."""

T = TypeVar("T")
Draw = Callable[[st.SearchStrategy[Any]], Any]

# --- mutations -----------------------------------------------------------------------------------

DATES = ("2000-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00", "x", f"{SECRET}\n[CRITICAL] forged")
NUMBERS = (0, 1, -1, 2**31, 2**62, -(2**63), 1e308, float("inf"), float("nan"), 0.5)
NAMES = ("rewardq.score", "rewardq.group", "rewardq.combine", "celery.chord", "os.system", SECRET, "")
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(DATES),
    st.sampled_from(NAMES),
    st.text(max_size=20),
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
"""What may stand anywhere in an envelope."""


@st.composite
def envelopes(draw: Draw) -> bytes:
    """A message with up to four of its parts exchanged, taken away or damaged, as it lies in Redis."""
    whole = message()
    whole["secret"] = SECRET
    body = msgpack.unpackb(base64.b64decode(whole["body"]))
    mutate(draw, whole, body)
    if draw(st.booleans()):
        body_of(whole, body)
    data = json.dumps(whole).encode()
    return damaged(data, draw) if draw(st.integers(0, 9)) == 0 else data


@st.composite
def broadcasts(draw: Draw) -> tuple[str, bytes]:
    """A message of remote control, or an event of another worker, mutated likewise; and its channel."""
    channel, body = draw(st.sampled_from(list(BROADCASTS.items())))
    whole, body = copy.deepcopy(BROADCAST), copy.deepcopy(body)
    if channel.startswith("celeryev"):
        whole |= {"content-encoding": "utf-8", "content-type": "application/json"}
        whole["properties"]["delivery_info"]["exchange"] = "celeryev"
    mutate(draw, whole, body)
    if channel.startswith("celeryev"):
        whole["body"] = base64.b64encode(json.dumps(body).encode()).decode()
    else:
        body_of(whole, body)
    data = json.dumps(whole).encode()
    return channel, damaged(data, draw) if draw(st.integers(0, 9)) == 0 else data


def mutate(draw: Draw, *parts: Any) -> None:
    """Exchange or take away up to four values in these parts."""
    for _ in range(draw(st.integers(1, 4))):
        target = draw(st.sampled_from(parts))
        there = list(places(target))
        if there:  # a part of which all was taken away has none
            place = draw(st.sampled_from(there))
            change(target, place, draw(st.just(TAKEN_AWAY) | VALUES))


TAKEN_AWAY = object()


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The way to each value within: keys and indices from the outside."""
    if not isinstance(value, dict | list):
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (key,)
        for rest in places(inner):
            yield (key, *rest)


def change(whole: Any, place: tuple[Any, ...], new: Any) -> None:
    """Put `new` at a place, or take away what is there."""
    *way, last = place
    for key in way:
        whole = whole[key]
    if new is TAKEN_AWAY:
        del whole[last]
    else:
        whole[last] = copy.deepcopy(new)


def body_of(whole: dict[str, Any], body: Any) -> None:
    """Put a mutated body into its envelope, unless msgpack cannot say it."""
    try:
        whole["body"] = encoded(body)
    except (ValueError, OverflowError, TypeError):
        whole["body"] = SECRET


def damaged(data: bytes, draw: Draw) -> bytes:
    """Bytes that were cut, or of which one was changed, or nested a thousand times over."""
    how = draw(st.sampled_from(("cut", "flip", "nest", "garbage")))
    at = draw(st.integers(0, len(data) - 1))
    if how == "cut":
        return data[:at]
    if how == "flip":
        return data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
    if how == "nest":
        return b"[" * 100_000
    return draw(st.binary(max_size=200))


def drawn(strategy: st.SearchStrategy[T], seed: int, num: int) -> list[T]:
    """So many examples; the same for the same seed."""
    found: list[T] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=num,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(one: T) -> None:
        found.append(one)

    collect()
    return found
