"""Runs reward models: from the samples of a chunk to their outcomes, a batch at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.errors import BusyError, StaleCodeError
from tasks.messages import Failure, Outcome, RewardCall, SampleRequest
from tasks.payloads import Data
from tasks.settings import Settings
from workers.base import GroupwiseRewardModel
from workers.loading.cache import LoadedModel, ModelCache
from workers.scoring.batches import Batch, BatchScorer, Watch
from workers.scoring.decoding import inputs_of
from workers.scoring.origin import code_of, environment
from workers.scoring.outputs import Scored


def _no_watch(
    _samples: Sequence[SampleRequest], _timeout_s: float
) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class _Run:
    """What all samples of one run share."""

    model: LoadedModel
    call: RewardCall
    payloads: Mapping[str, Data]


class ModelRunner:
    """Runs reward models for the scoring task. Safe between threads: one decodes while another holds a model's lock.

    Args:
        settings: The worker's.
        watch: Entered around each call of a model; the worker's watchdog, where there is one.
        lose_device: Called when a call has broken the process's GPU for good; a worker ends, without an answer.
        start_anew: Called when a request asks for newer code than this process has loaded; its worker ends.
    """

    def __init__(
        self,
        settings: Settings,
        watch: Watch = _no_watch,
        lose_device: Callable[[RuntimeError], None] = lambda _loss: None,
        start_anew: Callable[[StaleCodeError], None] = lambda _error: None,
    ) -> None:
        self.models = ModelCache(settings)
        self._scorer = BatchScorer(settings.device, watch, lose_device)
        self._start_anew = start_anew

    def is_loaded(self, call: RewardCall) -> bool:
        """Whether the model is in memory."""
        return self.models.is_loaded(call)

    @contextlib.contextmanager
    def lend(self, call: RewardCall) -> Iterator[LoadedModel]:
        """The model, in memory within the context.

        Raises:
            ModelLoadError: The model cannot be loaded.
            StaleCodeError: This process has loaded other code than is asked for. It takes no further task.
        """
        try:
            with self.models.lend(call) as model:
                yield model
        except StaleCodeError as error:
            self._start_anew(error)
            raise

    def admit(self, model: LoadedModel) -> None:
        """Raises `BusyError` if the model cannot be asked now."""
        model.model.admit()

    def run(
        self,
        model: LoadedModel,
        call: RewardCall,
        samples: Sequence[SampleRequest],
        payloads: Mapping[str, Data],
    ) -> Iterator[dict[str, Outcome]]:
        """Outcomes by address, a batch at a time; one for each sample in all. Never raises for a sample.

        Raises:
            BusyError: The model could not be asked for some; the others' outcomes were yielded.
            ModelLoadError, StaleCodeError: As for `lend`: the model imported more code meanwhile.
        """
        run = _Run(model, call, payloads)
        is_groupwise = isinstance(model.model, GroupwiseRewardModel)
        fit, unfit = [], {}
        for sample in samples:
            if bool(sample.members) == is_groupwise:
                fit.append(sample)
            else:
                unfit[sample.address] = Outcome(failure=_unfit(call, is_groupwise))
        if unfit:
            yield unfit
        if is_groupwise:
            for group in fit:
                yield {group.address: self._outcome_of_group(run, group)}
        else:
            yield from self._outcomes_of_samples(run, fit)

    def _outcome_of_group(self, run: _Run, group: SampleRequest) -> Outcome:
        members = [member for member in group.members if member.failure is None]
        scored = iter(self._score(run, members, group))
        outcomes = []
        for member in group.members:
            if member.failure is not None:
                outcomes.append(Outcome(failure=member.failure))
                continue
            outcome = next(scored)
            if isinstance(outcome, BusyError):
                raise outcome
            outcomes.append(outcome)
        return Outcome(members=tuple(outcomes))

    def _outcomes_of_samples(
        self, run: _Run, samples: Sequence[SampleRequest]
    ) -> Iterator[dict[str, Outcome]]:
        left = list(samples)
        while left:
            size = min(run.call.batch_size, run.model.max_batch)
            batch, left = left[:size], left[size:]
            outcomes: dict[str, Outcome] = {}
            busy: list[BusyError] = []
            for sample, one in zip(batch, self._score(run, batch), strict=True):
                if isinstance(one, BusyError):
                    busy.append(one)
                else:
                    outcomes[sample.address] = one
            yield outcomes
            if busy:
                raise busy[0]

    def _score(
        self,
        run: _Run,
        samples: Sequence[SampleRequest],
        group: SampleRequest | None = None,
    ) -> list[Scored]:
        """Decode and score these samples in one call; outcomes say where they were computed."""
        if not samples:
            return []
        started_s = time.perf_counter()
        batch = Batch(run.model, run.call, group)
        inputs = inputs_of(run.model.model, run.call, samples, run.payloads)
        for sample, one in zip(samples, inputs, strict=True):
            if not isinstance(one, Outcome):
                batch.add(sample, one)
        decoded_s = time.perf_counter()
        scored = iter(self._scorer.score(batch) if batch.samples else ())
        outcomes = [one if isinstance(one, Outcome) else next(scored) for one in inputs]
        # A call may import what it needs. By then that file may have been edited.
        self.models.check_code(run.call)
        origin = self._origin(run, decoded_s - started_s, decoded_s)
        return [_with_origin(outcome, origin) for outcome in outcomes]

    def _origin(self, run: _Run, decode_s: float, decoded_s: float) -> dict[str, Any]:
        """Where a batch was computed, and how long that took."""
        origin = {**environment(), **code_of(run.call)}
        if run.model.device:
            origin["device"] = run.model.device
        if run.model.load_warnings:
            origin["load_warnings"] = list(run.model.load_warnings)
        origin["model_version"] = run.call.version
        origin["decode_s"] = round(decode_s, 4)
        origin["score_s"] = round(time.perf_counter() - decoded_s, 4)
        return origin


def _with_origin(outcome: Scored, origin: Mapping[str, Any]) -> Scored:
    if isinstance(outcome, BusyError):
        return outcome
    return outcome.model_copy(update={"origin": origin})


def _unfit(call: RewardCall, is_groupwise: bool) -> Failure:
    """The trainer did not know whether the class takes samples or groups."""
    kind, taken_for = "pointwise", "groupwise"
    if is_groupwise:
        kind, taken_for = taken_for, kind
    return Failure(
        kind="failed",
        message=f"{call.model} is {kind}, but the trainer took it for {taken_for} since it could not read its "
        f"source; say `kind: {kind}` in the config",
    )
