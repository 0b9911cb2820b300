"""Decode, batch, call the model: from the samples of a chunk to outcomes."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np

from tasks import media
from tasks.catalog import CATALOG
from tasks.errors import BusyError, StaleCodeError
from tasks.messages import Failure, MediaRef, Outcome, RewardCall, SampleRequest
from tasks.samples import MEDIA_FIELDS, NUMBER_FIELDS
from tasks.settings import Settings
from workers.base import GroupwiseRewardModel, RewardModel, Unscored, whole
from workers.process.code import LOADED
from workers.process.loading import (
    LoadedModel,
    Models,
    free_memory,
    is_out_of_memory,
    loss_of_device,
)
from workers.scoring.arguments import (
    Taking,
    is_ours,
    lacks_all_media,
    taking_of,
    unsent,
)
from workers.scoring.outputs import Scored, failed, outcome_of, outcomes_of
from workers.scoring.tracebacks import place_in, tracebacks

Watch = Callable[
    [Sequence[SampleRequest], float], contextlib.AbstractContextManager[None]
]

Inputs = dict[str, Any]
"""The fields of one sample, decoded."""


class ModelRunner:
    """Runs reward models for the scoring task. Safe between threads: one decodes while another holds a model's lock."""

    def __init__(self, settings: Settings) -> None:
        self.models = Models(settings)
        self._device = settings.device
        self.watch: Watch = lambda _samples, _timeout_s: contextlib.nullcontext()
        """Entered around each call of a model; the worker's watchdog, where there is one."""
        self.lose_device: Callable[[RuntimeError], None] = lambda _loss: None
        """Called when a call has broken the process's GPU for good; a worker ends, without an answer."""
        self.start_anew: Callable[[StaleCodeError], None] = lambda _error: None
        """Called when a request asks for newer code than this process has loaded; its worker ends."""

    def is_loaded(self, call: RewardCall) -> bool:
        """Whether the model is in memory."""
        return self.models.is_loaded(call)

    @contextlib.contextmanager
    def lend(self, call: RewardCall) -> Iterator[LoadedModel]:
        """The model, in memory within the context. Raises `ModelLoadError` and `StaleCodeError`, with which a worker
        takes no further task."""
        try:
            with self.models.lend(call) as model:
                yield model
        except StaleCodeError as error:
            self.start_anew(error)
            raise

    def admit(self, model: LoadedModel) -> None:
        """Raises `BusyError` if the model cannot be asked now."""
        model.model.admit()

    def run(
        self,
        model: LoadedModel,
        call: RewardCall,
        samples: Sequence[SampleRequest],
        payloads: Mapping[str, bytes],
    ) -> Iterator[dict[str, Outcome]]:
        """Outcomes by address, a batch at a time; one for each sample in all.

        Raises:
            BusyError: The model could not be asked for some; the others' outcomes were yielded.
        """
        is_groupwise = isinstance(model.model, GroupwiseRewardModel)
        unfit = [s for s in samples if bool(s.members) != is_groupwise]
        if unfit:
            yield {
                s.address: Outcome(failure=_unfit(call, is_groupwise)) for s in unfit
            }
        for group in (s for s in samples if s.members and is_groupwise):
            members = [m for m in group.members if m.failure is None]
            with whole(group):
                outcomes = (
                    self._batch(model, call, members, payloads) if members else []
                )
            scored = {id(m): o for m, o in zip(members, outcomes, strict=True)}
            yield {
                group.address: Outcome(
                    members=tuple(_member(m, scored) for m in group.members)
                )
            }
        singles = [s for s in samples if not s.members and not is_groupwise]
        while singles:
            size = min(call.batch_size, model.max_batch)
            batch, singles = singles[:size], singles[size:]
            outcomes = self._batch(model, call, batch, payloads)
            yield {
                s.address: o
                for s, o in zip(batch, outcomes, strict=True)
                if isinstance(o, Outcome)
            }
            for busy in (o for o in outcomes if isinstance(o, BusyError)):
                raise busy

    def _batch(
        self,
        model: LoadedModel,
        call: RewardCall,
        samples: Sequence[SampleRequest],
        payloads: Mapping[str, bytes],
    ) -> list[Scored]:
        """Decode and score these samples in one call; outcomes say where they were computed."""
        started = time.perf_counter()
        inputs = _inputs_of_all(model.model, call, samples, payloads)
        decode_s = time.perf_counter() - started
        ready = [
            (s, i)
            for s, i in zip(samples, inputs, strict=True)
            if not isinstance(i, Outcome)
        ]
        scored = iter(
            self._score(model, call, [s for s, _ in ready], [i for _, i in ready])
            if ready
            else ()
        )
        outcomes = [i if isinstance(i, Outcome) else next(scored) for i in inputs]
        self.models.check_code(
            call
        )  # a call may import what it needs: by then it may have been edited
        origin = {
            **where_computed(),
            **_code_of(call),
            **({"device": model.device} if model.device else {}),
            **(
                {"load_warnings": list(model.load_warnings)}
                if model.load_warnings
                else {}
            ),
            "model_version": call.version,
            "decode_s": round(decode_s, 4),
            "score_s": round(time.perf_counter() - started - decode_s, 4),
        }
        return [
            o.model_copy(update={"origin": origin}) if isinstance(o, Outcome) else o
            for o in outcomes
        ]

    def _score(
        self,
        model: LoadedModel,
        call: RewardCall,
        samples: Sequence[SampleRequest],
        inputs: Sequence[Inputs],
    ) -> list[Scored]:
        """What became of each input. A batch that raises is halved, down to the sample that alone fails.

        One that does not fit into the device's memory bounds the batches after it, unless it has a sample that does not
        fit even alone.
        """
        try:
            return self._call(model, call, samples, inputs)
        except KeyboardInterrupt as error:
            return [outcome_of(error)] * len(inputs)
        except BusyError as error:
            return [error] * len(inputs)
        except (
            BaseException
        ) as error:  # a reward model is the user's code and may raise anything
            with self.watch(
                samples, call.timeout_s
            ):  # it waits for what the call has begun there
                loss = loss_of_device(self._device)
            if (
                loss is not None
            ):  # else every later sample would fail, with an error that is not its own
                self.lose_device(loss)
            outcome, did_not_fit = (
                outcome_of(error, _place_in(error, call)),
                is_out_of_memory(error),
            )
            if not isinstance(error, Unscored) and not (
                did_not_fit and len(inputs) > 1
            ):
                tracebacks.write("raised", call.model, error)
        half, before, num_too_large = (
            max(1, len(inputs) // 2),
            model.max_batch,
            model.num_too_large,
        )
        if did_not_fit:
            if len(inputs) == 1:
                model.num_too_large += 1
            else:
                model.max_batch = min(model.max_batch, half)
            free_memory()  # not before: the error's frames hold what the call had on the device
        if len(inputs) == 1 or isinstance(model.model, GroupwiseRewardModel):
            return [outcome] * len(inputs)
        scored: list[Scored] = []
        while len(scored) < len(inputs):
            part = slice(len(scored), len(scored) + min(half, model.max_batch))
            scored += self._score(model, call, samples[part], inputs[part])
        if (
            model.num_too_large > num_too_large
        ):  # of what others of this size need, that says nothing
            model.max_batch = before
        return scored

    def _call(
        self,
        model: LoadedModel,
        call: RewardCall,
        samples: Sequence[SampleRequest],
        inputs: Sequence[Inputs],
    ) -> list[Scored]:
        columns = {name: [one[name] for one in inputs] for name in inputs[0]}
        given = taking_of(model.model).call_with(columns)
        lock = contextlib.nullcontext() if model.model.thread_safe else model.lock
        with lock, self.watch(samples, call.timeout_s):
            # A tensor on a GPU is computed by the time it is read, not when the model returns it.
            return outcomes_of(model.model(**given), len(inputs))  # type: ignore[operator]


def decode(
    taking: Taking,
    sample: SampleRequest,
    payloads: Mapping[str, bytes],
    *,
    as_tensor: bool = False,
) -> Inputs:
    """The fields that a model takes, media as PIL images or tensors; None where the sample has none."""
    inputs: Inputs = {"prompt": sample.prompt}
    for name in taking.fields:
        if name in MEDIA_FIELDS:
            inputs[name] = _decode_field(sample.media.get(name), payloads, as_tensor)
        elif name in ("metadata", *NUMBER_FIELDS):
            inputs[name] = getattr(sample, name)
    return inputs


@cache
def where_computed() -> dict[str, Any]:
    """What a reward may depend on besides its inputs: versions of the libraries in this environment."""
    versions = {"python": platform.python_version()}
    for name in (
        "rewardq",
        "torch",
        "transformers",
        "open_clip_torch",
        "onnxruntime",
        "rapidocr",
        "pillow",
        "openai",
    ):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions}


# --- private -------------------------------------------------------------------------------------


def _inputs_of_all(
    model: RewardModel,
    call: RewardCall,
    samples: Sequence[SampleRequest],
    payloads: Mapping[str, bytes],
) -> list[Inputs | Outcome]:
    """What the model is called with for each sample, or why it cannot be.

    A group of which one member cannot be given to the model as it is has no reward at all: among the others it would
    have another.
    """
    try:
        taking = taking_of(model)
    except Exception as error:  # a property of a class is the user's code
        return [outcome_of(error, _place_in(error, call))] * len(samples)
    if isinstance(model, GroupwiseRewardModel):
        failure = unsent(call.model, taking, samples)
        if failure is not None:
            return [Outcome(failure=failure)] * len(samples)
    return [_inputs_of(model, taking, call, sample, payloads) for sample in samples]


def _inputs_of(
    model: RewardModel,
    taking: Taking,
    call: RewardCall,
    sample: SampleRequest,
    payloads: Mapping[str, bytes],
) -> Inputs | Outcome:
    failure = unsent(call.model, taking, [sample])
    if failure is not None:
        return Outcome(failure=failure)
    lacking = lacks_all_media(taking, sample)
    if is_ours(model):
        lacking = " and ".join(
            n
            for n in model.required_fields
            if n in MEDIA_FIELDS and sample.media.get(n) in (None, ())
        )
    if lacking:
        return failed(
            f"{call.model} needs {lacking}, which the sample has not", "invalid"
        )
    try:
        return decode(taking, sample, payloads, as_tensor=model.use_tensor_inputs)
    except Exception as error:  # a payload that is not what its reference says must not take its neighbours with it
        return failed(f"its media cannot be decoded: {type(error).__name__}: {error}")


def _code_of(call: RewardCall) -> dict[str, str]:
    """The code of a class of the user's."""
    digest = "" if call.model in CATALOG else LOADED.digest(call.model, call.code)
    return {"code": digest} if digest else {}


def _place_in(error: BaseException, call: RewardCall) -> str:
    """Where in the user's code an error came by; of a built-in it says nothing to the user."""
    return "" if call.model in CATALOG else place_in(error, call.model)


def _unfit(call: RewardCall, is_groupwise: bool) -> Failure:
    """The trainer did not know whether the class takes samples or groups."""
    kinds = ("groupwise", "pointwise") if is_groupwise else ("pointwise", "groupwise")
    return Failure(
        kind="failed",
        message=f"{call.model} is {kinds[0]}, but the trainer took it for {kinds[1]} since it could not read its "
        f"source; say `kind: {kinds[0]}` in the config",
    )


def _member(member: SampleRequest, scored: Mapping[int, Scored]) -> Outcome:
    """A member's outcome in its group's."""
    if member.failure is not None:
        return Outcome(failure=member.failure)
    outcome = scored[id(member)]
    if isinstance(outcome, BusyError):
        raise outcome
    return outcome


def _decode_field(
    refs: MediaRef | tuple[MediaRef, ...] | None,
    payloads: Mapping[str, bytes],
    as_tensor: bool,
) -> Any:
    if refs is None:
        return None
    if isinstance(refs, MediaRef):
        return _present(_pixels(refs, payloads), refs, as_tensor)
    many = [_present(_pixels(ref, payloads), ref, as_tensor) for ref in refs]
    if as_tensor and len({tuple(one.shape) for one in many}) == 1:
        import torch

        return torch.stack(many)
    return many


def _pixels(ref: MediaRef, payloads: Mapping[str, bytes]) -> Any:
    data = payloads[ref.name]
    if ref.format == "float32":
        return np.frombuffer(data, np.float32).reshape(ref.shape)
    if ref.format == "raw":
        return np.frombuffer(data, np.uint8).reshape(ref.shape)
    frames = [media.from_jpeg(frame) for frame in media.split_frames(data)]
    return np.stack(frames).reshape(ref.shape)


def _present(array: Any, ref: MediaRef, as_tensor: bool) -> Any:
    if ref.format == "float32":
        return media.to_waveform(array) if as_tensor else array
    if as_tensor:
        return media.to_tensor(array)
    return (
        media.to_pil(array)
        if array.ndim == 3
        else [media.to_pil(frame) for frame in array]
    )
