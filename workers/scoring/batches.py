"""Calls a model with a batch. If the call raises, the batch is split until only the offending sample fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from tasks.errors import BusyError
from tasks.messages import Outcome, RewardCall, SampleRequest
from workers.base import Unscored
from workers.loading.cache import LoadedModel
from workers.loading.device import free_memory, is_out_of_memory, loss_of_device
from workers.loading.signature import signature_of
from workers.loading.tracebacks import tracebacks, user_line
from workers.scoring.decoding import Inputs
from workers.scoring.outputs import Scored, outcome_of, outcomes_of

Watch = Callable[[Sequence[SampleRequest], float], AbstractContextManager[None]]
"""Entered around a call of a model: for whom it is made, and how many seconds it may take."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that a model is called with at once."""

    model: LoadedModel
    call: RewardCall
    group: SampleRequest | None = None
    """The group of which the samples are the members; a group is never split."""
    samples: list[SampleRequest] = field(default_factory=list)
    inputs: list[Inputs] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    def add(self, sample: SampleRequest, inputs: Inputs) -> None:
        """Add a sample and what the model is called with for it."""
        self.samples.append(sample)
        self.inputs.append(inputs)

    def part(self, start: int, size: int) -> Batch:
        """`size` of the samples from the one at `start`, or what is left of them."""
        end = start + size
        samples, inputs = self.samples[start:end], self.inputs[start:end]
        return Batch(self.model, self.call, self.group, samples, inputs)

    @property
    def answers(self) -> Sequence[SampleRequest]:
        """Who gets the reason if the call fails or hangs: each sample, or the group as a whole."""
        return self.samples if self.group is None else [self.group]

    @property
    def timeout_s(self) -> float:
        """How long the call may take."""
        return self.call.timeout_s * len(self)

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The inputs by field, each a list with a value for each sample."""
        columns: dict[str, list[Any]] = {name: [] for name in self.inputs[0]}
        for name, column in columns.items():
            column += [one[name] for one in self.inputs]
        return columns


@dataclass(frozen=True, slots=True)
class _Raised:
    """What a call raised."""

    outcome: Outcome
    did_not_fit: bool
    """Into the device's memory."""


class BatchScorer:
    """Calls models with batches.

    Args:
        device: The GPU, as REWARDQ_DEVICE names it.
        watch: Entered around each call.
        lose_device: Called when a call has broken the process's GPU for good.
    """

    def __init__(
        self, device: str, watch: Watch, lose_device: Callable[[RuntimeError], None]
    ) -> None:
        self._device, self._watch, self._lose_device = device, watch, lose_device

    def score(self, batch: Batch) -> list[Scored]:
        """What became of each sample.

        If the call raises, the batch is halved, down to the sample that alone fails. A batch that does not fit into the
        device's memory bounds the batches after it, unless it has a sample that does not fit even alone.
        """
        try:
            return self._call(batch)
        except KeyboardInterrupt as error:
            return [outcome_of(error)] * len(batch)  # not split: Ctrl-C is for all
        except BusyError as error:
            return [error] * len(batch)
        except BaseException as error:
            # A reward model is the user's code and may raise anything.
            raised = self._read(batch, error)
        # Not within the except: the error's frames hold what the call had on the device.
        return self._after(batch, raised)

    def _call(self, batch: Batch) -> list[Scored]:
        model = batch.model
        given = signature_of(model.model).call_with(batch.columns)
        lock = contextlib.nullcontext() if model.model.thread_safe else model.lock
        with lock, self._watch(batch.answers, batch.timeout_s):
            # A tensor on a GPU is computed by the time it is read, not when the model returns it.
            return outcomes_of(model.model(**given), len(batch))  # type: ignore[operator]

    def _read(self, batch: Batch, error: BaseException) -> _Raised:
        with self._watch(batch.answers, batch.timeout_s):
            loss = loss_of_device(self._device)  # waits for what the call has begun
        if loss is not None:
            # Else every later sample would fail, with an error that is not its own.
            self._lose_device(loss)
        did_not_fit = is_out_of_memory(error)
        will_be_split = did_not_fit and len(batch) > 1
        if not isinstance(error, Unscored) and not will_be_split:
            tracebacks.write("raised", batch.call.model, error)
        return _Raised(
            outcome_of(error, user_line(error, batch.call.model)), did_not_fit
        )

    def _after(self, batch: Batch, raised: _Raised) -> list[Scored]:
        """Answer a sample that raised alone, or a group; score the halves of any other batch."""
        model, num_samples = batch.model, len(batch)
        half = max(1, num_samples // 2)
        max_batch, num_too_large = model.max_batch, model.num_too_large
        if raised.did_not_fit:
            if num_samples == 1:
                model.num_too_large += 1
            else:
                model.max_batch = min(model.max_batch, half)
            free_memory()
        if num_samples == 1 or batch.group is not None:
            return [raised.outcome] * num_samples

        scored: list[Scored] = []
        while len(scored) < num_samples:
            size = min(half, model.max_batch)
            scored += self.score(batch.part(len(scored), size))
        if model.num_too_large > num_too_large:
            # One sample did not fit even alone, which says nothing of what others of this size need.
            model.max_batch = max_batch
        return scored
