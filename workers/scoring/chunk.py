"""The task that turns a chunk into outcomes: read, claim, score, write once.

The task may run twice, late, or on another worker after a crash: claims and outcomes (see `tasks.outcomes`) keep the
answer the same. If it cannot read its request, it leaves a note for the client. It never raises for a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.celery_app import SCORE, SCORE_ARGUMENTS, app, named
from tasks.errors import ModelLoadError, PayloadGoneError
from tasks.media import fits
from tasks.messages import MediaRef, Outcome, SampleRequest, ScoreRequest
from tasks.outcomes import USUAL_STARTS
from tasks.payloads import Data
from workers.scoring.chord import count_header
from workers.scoring.context import ScoringContext
from workers.scoring.handling import handle_task
from workers.scoring.outputs import failed
from workers.scoring.quarantine import MOST_STARTS_ALONE, decide, given_up
from workers.scoring.task_message import TaskMessage


@app.task(name=SCORE, bind=True)  # type: ignore[untyped-decorator]
def score(self: Any, *arguments: Any) -> str:
    """Score the chunk of a request; returns a few words for people.

    The arguments are those of `SCORE_ARGUMENTS`; a later client may send more.
    """
    said = named(SCORE_ARGUMENTS, arguments)
    try:
        return handle_task(self, said, ScoreRequest, score_chunk)
    finally:
        count_header(self)


def score_chunk(
    context: ScoringContext, _message: TaskMessage, request: ScoreRequest, taken_ms: int
) -> str:
    """Score a chunk; the work of the task."""
    return ChunkScorer(context, request, taken_ms).score()


class ChunkScorer:
    """Scores one chunk.

    Args:
        context: What the process scores with.
        request: The chunk.
        taken_ms: When its message was taken, on Redis's clock.
    """

    def __init__(
        self, context: ScoringContext, request: ScoreRequest, taken_ms: int
    ) -> None:
        self.context, self.request, self.token = context, request, context.new_token()
        self.queued_s = max(0.0, (taken_ms - request.sent_ms) / 1000)
        self.num_scored = self.num_failed = 0
        self.fetch_s = 0.0
        self.left: set[str] = set()
        """Addresses that this task has claimed and not answered yet."""

    def score(self) -> str:
        """Load, claim, fetch, run, write; returns a few words for people.

        Raises:
            BusyError: The model cannot be asked now. Claims of samples without an answer are released.
            PayloadGoneError: Media are not in the store. All claims are released.
            StaleCodeError: This process has loaded other code than is asked for. All claims are released.
        """
        call, runner = self.request.reward, self.context.runner
        if not runner.is_loaded(call) and not self._has_unanswered():
            return "answered already"
        try:
            with runner.lend(call) as model:
                return self._score_by(model)
        except ModelLoadError as error:
            return self._fail_all(str(error))

    def _score_by(self, model: Any) -> str:
        self.context.runner.admit(model)
        claimed = self._claim()
        if not claimed:
            return "answered or claimed already"
        self.left = {sample.address for sample, _ in claimed}
        self.context.claims.hold(self.left, self.token)
        try:
            return self._score_claimed(model, claimed)
        finally:
            self._release_left()

    def _score_claimed(
        self, model: Any, claimed: Sequence[tuple[SampleRequest, int]]
    ) -> str:
        """Score claimed samples, given with their starts: the usual ones together, then each suspect alone."""
        usual = [sample for sample, starts in claimed if starts <= USUAL_STARTS]
        suspects = [sample for sample, starts in claimed if starts > USUAL_STARTS]
        if not usual and self.context.quarantine.is_occupied:
            return "suspects, sent back: another is being scored alone"
        payloads = self._fetch([*usual, *suspects])
        self._run(model, usual, payloads)
        for suspect in suspects:
            self._run_suspect(model, suspect, payloads)
        return self._words()

    def _release_left(self) -> None:
        """Release the claims of samples that are not answered."""
        self.context.claims.drop(self.left, self.token)
        if self.left:
            self.context.retry(
                lambda: self.context.outcomes.release(self.left, self.token)
            )

    def _run(
        self,
        model: Any,
        samples: Sequence[SampleRequest],
        payloads: Mapping[str, Data],
    ) -> None:
        reward = self.request.reward
        for outcomes in self.context.runner.run(model, reward, samples, payloads):
            self._write(outcomes)

    def _run_suspect(
        self, model: Any, sample: SampleRequest, payloads: Mapping[str, Data]
    ) -> None:
        """Do with a suspect what the quarantine decides. The claim of a suspect that is sent back is released."""
        with self.context.quarantine.entered() as is_free:
            if not is_free:
                return

            earlier, since_s = self.context.retry(
                lambda: self.context.outcomes.start_alone(
                    sample.address, MOST_STARTS_ALONE, self.token
                )
            )
            decision = decide(earlier, since_s, self.request.reward.timeout_s)
            if decision == "score alone":
                self._run(model, [sample], payloads)
            elif decision == "give up":
                self._write({sample.address: Outcome(failure=given_up(earlier))})

    def _has_unanswered(self) -> bool:
        addresses = [sample.address for sample in self.request.samples]
        found = self.context.retry(lambda: self.context.outcomes.look_up(addresses))
        for outcome, sample in zip(found, self.request.samples, strict=True):
            if not answers(outcome, sample.attempt):
                return True
        return False

    def _claim(self) -> list[tuple[SampleRequest, int]]:
        """The samples that are this task's to score, with their starts. Equal samples in a chunk are claimed once."""
        samples = list({s.address: s for s in self.request.samples}.values())
        addresses = [sample.address for sample in samples]
        attempts = [sample.attempt for sample in samples]
        claims = self.context.retry(
            lambda: self.context.outcomes.claim(
                addresses, attempts, self.token, self.request.deadline_ms
            )
        )
        if claims is None:  # the deadline has passed
            return []
        claimed = []
        for sample, claim in zip(samples, claims, strict=True):
            if claim.state == "claimed":
                claimed.append((sample, claim.starts))
        return claimed

    def _fetch(self, samples: Sequence[SampleRequest]) -> dict[str, Data]:
        """The media of samples, by name in the store.

        Raises:
            PayloadGoneError: Some are not there, or are other bytes than the client put there.
        """
        clock, store = self.context.clock, self.context.store
        started = clock.monotonic()
        digests = {}
        for sample in samples:
            for ref in _refs(sample):
                digests[ref.name] = ref.digest
        names = list(digests)
        found = self.context.retry(lambda: store.get(names))

        fetched, missing, damaged = {}, [], []
        for name, data in zip(names, found, strict=True):
            if data is None:
                missing.append(name)
            elif not fits(data, digests[name]):
                missing.append(name)
                damaged.append(name)
            else:
                fetched[name] = data
        if damaged:
            # Else the client would find them there, and send the same again.
            self.context.retry(lambda: store.free(damaged))
        if missing:
            raise PayloadGoneError(missing)
        self.fetch_s = clock.monotonic() - started
        return fetched

    def _write(self, outcomes: Mapping[str, Outcome]) -> None:
        """Write outcomes by address, and let their claims go."""
        times = {
            "queued_s": round(self.queued_s, 4),
            "fetch_s": round(self.fetch_s, 4),
            "worker": self.context.node,
        }
        samples = {sample.address: sample for sample in self.request.samples}
        complete = {}
        for address, outcome in outcomes.items():
            answered = {
                "attempt": samples[address].attempt,
                "shared_key": samples[address].shared_key,
                "origin": {**outcome.origin, **times},
            }
            complete[address] = outcome.model_copy(update=answered)
        self.context.retry(lambda: self.context.outcomes.write(complete, self.token))
        # Not at the end of the chunk: if Redis is emptied meanwhile, an extension would claim them again for nobody.
        self.context.claims.drop(complete, self.token)
        self.left -= complete.keys()
        self._count(outcomes)

    def _count(self, outcomes: Mapping[str, Outcome]) -> None:
        """Count what was written; a group counts its members."""
        each: list[Outcome] = []
        for outcome in outcomes.values():
            each += outcome.members or (outcome,)
        self.context.tally.count(self.request.reward.name, each)
        num_scored = sum(one.reward is not None for one in each)
        self.num_scored += num_scored
        self.num_failed += len(each) - num_scored

    def _fail_all(self, message: str) -> str:
        outcome = failed(message)
        claimed = self._claim()
        self._write({sample.address: outcome for sample, _ in claimed})
        return self._words()

    def _words(self) -> str:
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        return f"{self.num_scored} scored{failed}"


def answers(outcome: Outcome | None, attempt: int) -> bool:
    """Whether an outcome answers a request for this attempt: a reward always does, a failure if it is as late."""
    return outcome is not None and (outcome.is_final or outcome.attempt >= attempt)


def _refs(sample: SampleRequest) -> Iterator[MediaRef]:
    for one in sample.members or (sample,):
        for refs in one.media.values():
            yield from refs if isinstance(refs, tuple) else (refs,)
