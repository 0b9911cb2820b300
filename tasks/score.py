"""The task that turns a chunk into outcomes: read, claim, score, write once.

It may run twice, late, or on another worker after a crash: claims and outcomes (see `tasks.outcomes`) keep the answer
one. What it cannot read it leaves to the client, by a note; it never raises for a sample.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tasks.celery_app import SCORE, app
from tasks.connections import persist
from tasks.errors import ModelLoadError, PayloadGoneError, WireError
from tasks.media import digest
from tasks.messages import (
    WIRE_VERSION,
    Failure,
    MediaRef,
    Note,
    Outcome,
    RewardCall,
    SampleRequest,
    ScoreRequest,
    unpack,
)
from tasks.outcomes import Outcomes
from tasks.payloads import PayloadStore

USUAL_STARTS = 2
"""A sample found with so many starts and no answer is a suspect: it may be what ended those processes."""

MOST_STARTS_ALONE = 3
"""A suspect that was started alone so often without an answer is given up."""

REDIS_AWAY_S = 120.0
"""How long a task waits for a Redis that is away before it leaves its chunk to be sent again."""


class Runner(Protocol):
    """Reward models, as `workers` brings them."""

    def is_loaded(self, call: RewardCall) -> bool:
        """Whether the model of this computation is in memory."""

    def load(self, call: RewardCall) -> Any:
        """The model of this computation, loaded at the first call. Raises `ModelLoadError`."""

    def run(
        self, model: Any, call: RewardCall, samples: Sequence[SampleRequest], payloads: Mapping[str, bytes]
    ) -> Iterator[dict[str, Outcome]]:
        """Score samples; yields outcomes by address as they come, one for each sample in all. Never raises for one."""


class Claims(Protocol):
    """Keeps claims alive while their samples are being scored."""

    def hold(self, addresses: Iterable[str], token: str) -> None:
        """Extend these claims until they are dropped."""

    def drop(self, addresses: Iterable[str]) -> None:
        """Let these claims go."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What a worker process brings to this task."""

    node: str
    outcomes: Outcomes
    store: PayloadStore
    claims: Claims
    runner: Runner


_desk: Desk | None = None
_tokens = itertools.count()
_place_for_a_suspect = threading.Lock()


def serve_at(desk: Desk) -> None:
    """Let this process's tasks score at `desk`."""
    global _desk
    _desk = desk


@app.task(name=SCORE, bind=True)  # type: ignore[untyped-decorator]
def score(self: Any, label: str, request_id: str, wire: int, number: int = 0, store: str = "", *_later: Any) -> str:
    """Score the chunk of a request; returns a few words for people.

    Args:
        label: What it is, for logs and Flower; `OCR x 16, run demo step 3`.
        request_id: Where the request is in the payload store.
        wire: Wire version of the client.
        number: The message's number in its queue.
        store: Identity of the client's payload store.
    """
    assert _desk is not None, "a worker imports workers.serving"
    queue = self.request.delivery_info.get("routing_key") or app.conf.task_default_queue
    try:
        return _score(_desk, request_id, wire, queue, number, store)
    except (SystemExit, KeyboardInterrupt, MemoryError) as error:
        # Out of a task of a threads pool they would leak the slot: the worker looks alive and takes nothing.
        raise RuntimeError(f"{type(error).__name__} while scoring {label}: {error}") from error


def _score(desk: Desk, request_id: str, wire: int, queue: str, number: int, store: str) -> str:
    outcomes = desk.outcomes
    now_ms = _lasting(lambda: outcomes.take(queue, number))
    if wire != WIRE_VERSION:
        detail = f"it speaks wire version {WIRE_VERSION}, the message is of {wire}"
        return _leave_note(desk, request_id, "wire", detail)
    try:
        request = _read_request(desk, request_id)
    except PayloadGoneError:
        return _note_missing(desk, request_id, store, "the request")
    except WireError as error:
        return _leave_note(desk, request_id, "wire", str(error))
    if now_ms > request.deadline_ms:
        return "expired"
    return _Chunk(desk, request, f"{desk.node}/{next(_tokens)}", now_ms, store).score()


class _Chunk:
    """One chunk on its way through this process."""

    def __init__(self, desk: Desk, request: ScoreRequest, token: str, taken_ms: int, store: str) -> None:
        self.desk, self.request, self.token, self.store = desk, request, token, store
        self.queued_s = max(0.0, (taken_ms - request.sent_ms) / 1000)
        self.num_scored = self.num_failed = 0
        self.fetch_s = 0.0
        self.left: set[str] = set()
        """Addresses claimed by us and unanswered."""

    def score(self) -> str:
        """Load, claim, fetch, run, write."""
        call, runner = self.request.reward, self.desk.runner
        if not runner.is_loaded(call) and not self._unanswered():
            return "answered already"
        try:
            model = runner.load(call)
        except ModelLoadError as error:
            return self._fail_all(str(error))
        claimed = self._claim()
        if not claimed:
            return "answered or claimed already"
        self.left = {s.address for s, _ in claimed}
        self.desk.claims.hold(self.left, self.token)
        try:
            try:
                payloads, self.fetch_s = self._fetch([s for s, _ in claimed])
            except PayloadGoneError as error:
                return _note_missing(self.desk, self.request.id, self.store, str(error))
            self._run(model, [s for s, starts in claimed if starts <= USUAL_STARTS], payloads)
            for sample in [s for s, starts in claimed if starts > USUAL_STARTS]:
                self._run_suspect(model, sample, payloads)
        finally:
            self.desk.claims.drop([s.address for s, _ in claimed])
            if self.left:
                _lasting(lambda: self.desk.outcomes.release(self.left, self.token))
        return self._words()

    def _run(self, model: Any, samples: Sequence[SampleRequest], payloads: Mapping[str, bytes]) -> None:
        for outcomes in self.desk.runner.run(model, self.request.reward, samples, payloads):
            self._write(outcomes)

    def _run_suspect(self, model: Any, sample: SampleRequest, payloads: Mapping[str, bytes]) -> None:
        """Run a sample alone, at most one such in this process at a time; if the place is taken it goes back.

        One that ended its process each time is given up, but not before `timeout_s` has passed: what ends processes
        for a while (a host out of memory, a deployment) is not the sample's fault.
        """
        if not _place_for_a_suspect.acquire(blocking=False):
            return
        try:
            earlier, since_s = _lasting(lambda: self.desk.outcomes.start_alone(sample.address, MOST_STARTS_ALONE))
            if earlier < MOST_STARTS_ALONE:
                self._run(model, [sample], payloads)
            elif since_s >= self.request.reward.timeout_s:
                message = f"its worker process ended without an answer each of the {earlier} times it was scored alone"
                self._write({sample.address: Outcome(failure=Failure(kind="failed", message=message))})
        finally:
            _place_for_a_suspect.release()

    def _unanswered(self) -> bool:
        samples = self.request.samples
        found = _lasting(lambda: self.desk.outcomes.look_up([s.address for s in samples]))
        return any(
            o is None or (o.reward is None and o.attempt < s.attempt) for o, s in zip(found, samples, strict=True)
        )

    def _claim(self) -> list[tuple[SampleRequest, int]]:
        """The samples that are this task's to score, with their starts. Equal samples in a chunk are claimed once."""
        samples = list({s.address: s for s in self.request.samples}.values())
        addresses, attempts = [s.address for s in samples], [s.attempt for s in samples]
        claims = _lasting(lambda: self.desk.outcomes.claim(addresses, attempts, self.token, self.request.deadline_ms))
        pairs = zip(samples, claims or (), strict=claims is not None)
        return [(s, c.starts) for s, c in pairs if c.state == "claimed"]

    def _fetch(self, samples: Sequence[SampleRequest]) -> tuple[dict[str, bytes], float]:
        names = list(dict.fromkeys(ref.name for s in samples for ref in _refs(s)))
        started = time.perf_counter()
        found = _lasting(lambda: self.desk.store.get(names))
        fetched = {name: data for name, data in zip(names, found, strict=True) if data is not None}
        digests = {ref.name: ref.digest for s in samples for ref in _refs(s)}
        missing = [name for name in names if name not in fetched or digest(fetched[name]) != digests[name]]
        if missing:
            raise PayloadGoneError(missing)
        return fetched, time.perf_counter() - started

    def _write(self, outcomes: dict[str, Outcome]) -> None:
        times = {"queued_s": round(self.queued_s, 4), "fetch_s": round(self.fetch_s, 4), "worker": self.desk.node}
        attempts = {s.address: s.attempt for s in self.request.samples}
        complete = {
            a: o.model_copy(update={"attempt": attempts[a], "origin": {**o.origin, **times}})
            for a, o in outcomes.items()
        }
        _lasting(lambda: self.desk.outcomes.write(complete, self.token))
        self.left -= complete.keys()
        self.num_scored += sum(o.reward is not None for o in outcomes.values())
        self.num_failed += sum(o.reward is None for o in outcomes.values())

    def _fail_all(self, message: str) -> str:
        claimed = self._claim()
        failure = Failure(kind="failed", message=message)
        self._write({s.address: Outcome(failure=failure) for s, _ in claimed})
        return self._words()

    def _words(self) -> str:
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        return f"{self.num_scored} scored{failed}"


def _refs(sample: SampleRequest) -> Iterator[MediaRef]:
    for refs in sample.media.values():
        yield from refs if isinstance(refs, tuple) else (refs,)


def _read_request(desk: Desk, request_id: str) -> ScoreRequest:
    data = _lasting(lambda: desk.store.get([request_id]))[0]
    if data is None:
        raise PayloadGoneError([request_id])
    return unpack(ScoreRequest, data)


def _note_missing(desk: Desk, request_id: str, store: str, what: str) -> str:
    """Something is not in our store: is it another store than the client's, or gone from the same?"""
    ours = _lasting(desk.store.identity)
    if ours != store:
        detail = f"its payload store {ours} is not the client's {store}; set REWARDQ_PAYLOAD_URL alike on both"
        return _leave_note(desk, request_id, "store", detail)
    return _leave_note(desk, request_id, "gone", what)


def _leave_note(desk: Desk, request_id: str, reason: Any, detail: str) -> str:
    note = Note(reason=reason, worker=desk.node, detail=detail)
    _lasting(lambda: desk.outcomes.leave_note(request_id, note))
    return f"not read: {reason}"


def _lasting(call: Any) -> Any:
    return persist(call, REDIS_AWAY_S)
