"""The task that turns a chunk into outcomes: read, claim, score, write once.

It may run twice, late, or on another worker after a crash: claims and outcomes (see `tasks.outcomes`) keep the answer
one. What it cannot read it leaves to the client, by a note; it never raises for a sample.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.celery_app import SCORE, app
from tasks.errors import ModelLoadError, PayloadGoneError
from tasks.media import digest
from tasks.messages import Failure, MediaRef, Outcome, SampleRequest, ScoreRequest
from tasks.outcomes import USUAL_STARTS
from workers.scoring.messages import Desk, Message, lasting, new_token, on_desk

MOST_STARTS_ALONE = 3
"""A suspect that was started alone so often without an answer is given up."""

_place_for_a_suspect = threading.Lock()


@app.task(name=SCORE, bind=True)  # type: ignore[untyped-decorator]
def score(
    self: Any,
    label: str,
    request_id: str,
    wire: int,
    number: int = 0,
    store: str = "",
    *_later: Any,
) -> str:
    """Score the chunk of a request; returns a few words for people.

    Args:
        label: What it is, for logs and Flower; `OCR x 16, run demo step 3`.
        request_id, wire, number, store: As in `workers.scoring.messages.Message`.
    """
    message = Message(request_id, wire, number, store)
    return on_desk(
        self,
        label,
        message,
        ScoreRequest,
        lambda desk, request, now: Chunk(desk, request, now).score(),
    )


class Chunk:
    """One chunk on its way through this process."""

    def __init__(self, desk: Desk, request: ScoreRequest, taken_ms: int) -> None:
        self.desk, self.request, self.token = desk, request, new_token(desk.node)
        self.queued_s = max(0.0, (taken_ms - request.sent_ms) / 1000)
        self.num_scored = self.num_failed = 0
        self.fetch_s = 0.0
        self.left: set[str] = set()
        """Addresses claimed by us and unanswered."""

    def score(self) -> str:
        """Load, claim, fetch, run, write.

        Raises:
            BusyError: The model cannot be asked now; what is not answered is given back.
            PayloadGoneError: Media are not in the store; all claims are given back.
            StaleCodeError: This process has loaded other code than is asked for; all claims are given back.
        """
        call, runner = self.request.reward, self.desk.runner
        if not runner.is_loaded(call) and not self._unanswered():
            return "answered already"
        try:
            with runner.lend(call) as model:
                return self._score_by(model)
        except ModelLoadError as error:
            return self._fail_all(str(error))

    def _score_by(self, model: Any) -> str:
        self.desk.runner.admit(model)
        claimed = self._claim()
        if not claimed:
            return "answered or claimed already"
        self.left = {s.address for s, _ in claimed}
        self.desk.claims.hold(self.left, self.token)
        try:
            if _place_for_a_suspect.locked() and all(
                starts > USUAL_STARTS for _, starts in claimed
            ):
                return "suspects, sent back: another is being scored alone"
            payloads, self.fetch_s = self._fetch([s for s, _ in claimed])
            self._run(
                model, [s for s, starts in claimed if starts <= USUAL_STARTS], payloads
            )
            for sample in [s for s, starts in claimed if starts > USUAL_STARTS]:
                self._run_suspect(model, sample, payloads)
        finally:
            self.desk.claims.drop(self.left, self.token)
            if self.left:
                lasting(lambda: self.desk.outcomes.release(self.left, self.token))
        return self._words()

    def _run(
        self,
        model: Any,
        samples: Sequence[SampleRequest],
        payloads: Mapping[str, bytes],
    ) -> None:
        for outcomes in self.desk.runner.run(
            model, self.request.reward, samples, payloads
        ):
            self._write(outcomes)

    def _run_suspect(
        self, model: Any, sample: SampleRequest, payloads: Mapping[str, bytes]
    ) -> None:
        """Run a sample alone, at most one such in this process at a time; if the place is taken it goes back.

        One that ended its process each time is given up, but not before `timeout_s` has passed: what ends processes
        for a while (a host out of memory, a deployment) is not the sample's fault.
        """
        if not _place_for_a_suspect.acquire(blocking=False):
            return
        try:
            earlier, since_s = lasting(
                lambda: self.desk.outcomes.start_alone(
                    sample.address, MOST_STARTS_ALONE, self.token
                )
            )
            if earlier < MOST_STARTS_ALONE:
                self._run(model, [sample], payloads)
            elif since_s >= self.request.reward.timeout_s:
                message = f"its worker process ended without an answer each of the {earlier} times it was scored alone"
                self._write(
                    {
                        sample.address: Outcome(
                            failure=Failure(kind="failed", message=message)
                        )
                    }
                )
        finally:
            _place_for_a_suspect.release()

    def _unanswered(self) -> bool:
        samples = self.request.samples
        found = lasting(
            lambda: self.desk.outcomes.look_up([s.address for s in samples])
        )
        return any(
            o is None or (not o.is_final and o.attempt < s.attempt)
            for o, s in zip(found, samples, strict=True)
        )

    def _claim(self) -> list[tuple[SampleRequest, int]]:
        """The samples that are this task's to score, with their starts. Equal samples in a chunk are claimed once."""
        samples = list({s.address: s for s in self.request.samples}.values())
        addresses, attempts = [s.address for s in samples], [s.attempt for s in samples]
        claims = lasting(
            lambda: self.desk.outcomes.claim(
                addresses, attempts, self.token, self.request.deadline_ms
            )
        )
        pairs = zip(samples, claims or (), strict=claims is not None)
        return [(s, c.starts) for s, c in pairs if c.state == "claimed"]

    def _fetch(
        self, samples: Sequence[SampleRequest]
    ) -> tuple[dict[str, bytes], float]:
        names = list(dict.fromkeys(ref.name for s in samples for ref in _refs(s)))
        started = time.perf_counter()
        found = lasting(lambda: self.desk.store.get(names))
        fetched = {
            name: data
            for name, data in zip(names, found, strict=True)
            if data is not None
        }
        digests = {ref.name: ref.digest for s in samples for ref in _refs(s)}
        damaged = [
            name for name, data in fetched.items() if digest(data) != digests[name]
        ]
        if damaged:  # else the client finds it there, and sends the same again
            lasting(lambda: self.desk.store.free(damaged))
        missing = [name for name in names if name not in fetched or name in damaged]
        if missing:
            raise PayloadGoneError(missing)
        return fetched, time.perf_counter() - started

    def _write(self, outcomes: dict[str, Outcome]) -> None:
        times = {
            "queued_s": round(self.queued_s, 4),
            "fetch_s": round(self.fetch_s, 4),
            "worker": self.desk.node,
        }
        attempts = {s.address: s.attempt for s in self.request.samples}
        complete = {
            a: o.model_copy(
                update={"attempt": attempts[a], "origin": {**o.origin, **times}}
            )
            for a, o in outcomes.items()
        }
        lasting(lambda: self.desk.outcomes.write(complete, self.token))
        self.desk.claims.drop(
            complete, self.token
        )  # a Redis emptied from now on is not to have them claimed again
        self.left -= complete.keys()
        each = [one for o in outcomes.values() for one in o.members or (o,)]
        self.desk.tally.count(self.request.reward.name, each)
        self.num_scored += sum(one.reward is not None for one in each)
        self.num_failed += sum(one.reward is None for one in each)

    def _fail_all(self, message: str) -> str:
        claimed = self._claim()
        failure = Failure(kind="failed", message=message)
        self._write({s.address: Outcome(failure=failure) for s, _ in claimed})
        return self._words()

    def _words(self) -> str:
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        return f"{self.num_scored} scored{failed}"


def _refs(sample: SampleRequest) -> Iterator[MediaRef]:
    for one in sample.members or (sample,):
        for refs in one.media.values():
            yield from refs if isinstance(refs, tuple) else (refs,)
