"""Decode, batch, call the model, and turn what it returns into outcomes: a finite reward or a reason, never between."""

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
from tasks.messages import Failure, MediaRef, Outcome, RewardCall, SampleRequest
from tasks.samples import MEDIA_FIELDS
from tasks.settings import Settings
from workers.base import RewardModel, RewardModelOutput, Unscored
from workers.loading import LoadedModel, Models

MAX_MESSAGE_CHARS = 2000
"""A reason longer than this is cut; a model's traceback or a server's page is not a message."""

Watch = Callable[[Sequence[SampleRequest], float], contextlib.AbstractContextManager[None]]

Inputs = dict[str, Any]
"""The fields of one sample, decoded."""


class ModelRunner:
    """Runs reward models for the scoring task. Safe between threads: one decodes while another holds a model's lock."""

    def __init__(self, settings: Settings) -> None:
        self.models = Models(settings)
        self.watch: Watch = lambda _samples, _timeout_s: contextlib.nullcontext()
        """Entered around each call of a model; the worker's watchdog, where there is one."""

    def is_loaded(self, call: RewardCall) -> bool:
        """Whether the model is in memory."""
        return self.models.is_loaded(call)

    def load(self, call: RewardCall) -> LoadedModel:
        """The model in memory. Raises `ModelLoadError`."""
        return self.models.load(call)

    def run(
        self, model: LoadedModel, call: RewardCall, samples: Sequence[SampleRequest], payloads: Mapping[str, bytes]
    ) -> Iterator[dict[str, Outcome]]:
        """Outcomes by address, a batch at a time; one for each sample in all."""
        size = min(call.batch_size, model.max_batch)
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            started = time.perf_counter()
            inputs = [decode(model.model, s, payloads) for s in batch]
            decode_s = time.perf_counter() - started
            outcomes = self._score(model, call, batch, inputs)
            origin = {
                **where_computed(),
                "model_version": call.version,
                "decode_s": round(decode_s, 4),
                "score_s": round(time.perf_counter() - started - decode_s, 4),
            }
            yield {s.address: o.model_copy(update={"origin": origin}) for s, o in zip(batch, outcomes, strict=True)}

    def _score(
        self, model: LoadedModel, call: RewardCall, samples: Sequence[SampleRequest], inputs: Sequence[Inputs]
    ) -> list[Outcome]:
        """One outcome for each input. A batch that raises is halved, down to the sample that alone fails."""
        try:
            output = self._call(model, call, samples, inputs)
        except KeyboardInterrupt as error:
            return [_outcome_of(error)] * len(inputs)
        except (Exception, SystemExit) as error:  # a reward model is the user's code and may raise anything
            if _is_out_of_memory(error):
                _free_device_memory()
                model.max_batch = max(1, len(inputs) // 2)
            if len(inputs) == 1:
                return [_outcome_of(error)]
            half = len(inputs) // 2
            first = self._score(model, call, samples[:half], inputs[:half])
            return first + self._score(model, call, samples[half:], inputs[half:])
        return outcomes_of(output, len(inputs))

    def _call(
        self, model: LoadedModel, call: RewardCall, samples: Sequence[SampleRequest], inputs: Sequence[Inputs]
    ) -> Any:
        columns = {name: [one[name] for one in inputs] for name in inputs[0]}
        given = {name: None if name != "prompt" and all(v is None for v in c) else c for name, c in columns.items()}
        lock = contextlib.nullcontext() if model.model.thread_safe else model.lock
        with lock, self.watch(samples, call.timeout_s):
            return model.model(**given)  # type: ignore[operator]


def decode(model: RewardModel, sample: SampleRequest, payloads: Mapping[str, bytes]) -> Inputs:
    """The fields that a model declares, media as PIL images or tensors; None where the sample has none."""
    declared = dict.fromkeys((*model.required_fields, *model.optional_fields))
    inputs: Inputs = {"prompt": sample.prompt}
    for name in declared:
        if name in MEDIA_FIELDS:
            inputs[name] = _decode_field(sample.media.get(name), payloads, model.use_tensor_inputs)
        elif name == "metadata":
            inputs[name] = sample.metadata
    return inputs


def outcomes_of(output: Any, num_samples: int) -> list[Outcome]:
    """Outcomes of what a model returned for `num_samples` samples.

    A tensor, an array or a list of `num_samples` finite numbers are rewards. Any other length or shape is a reason for
    all, a NaN, an infinity, None or no number a reason for its sample.
    """
    rewards = output.rewards if isinstance(output, RewardModelOutput) else output
    extra = output.extra_info if isinstance(output, RewardModelOutput) else None
    values = _listed(rewards)
    if values is None or len(values) != num_samples:
        found = f"{len(values)}" if values is not None else _shape_of(rewards)
        reason = Failure(kind="failed", message=f"the model returned {found} rewards for {num_samples} samples")
        return [Outcome(failure=reason)] * num_samples
    return [_outcome(value, _info_of(extra, i, num_samples)) for i, value in enumerate(values)]


@cache
def where_computed() -> dict[str, Any]:
    """What a reward may depend on besides its inputs: versions of the libraries in this environment."""
    versions = {"python": platform.python_version()}
    for name in ("rewardq", "torch", "transformers", "open_clip_torch", "onnxruntime", "rapidocr", "pillow", "openai"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions}


# --- private -------------------------------------------------------------------------------------


def _decode_field(refs: MediaRef | tuple[MediaRef, ...] | None, payloads: Mapping[str, bytes], as_tensor: bool) -> Any:
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
        return array
    if as_tensor:
        return media.to_tensor(array)
    return media.to_pil(array) if array.ndim == 3 else [media.to_pil(frame) for frame in array]


def _listed(rewards: Any) -> list[Any] | None:
    """Rewards as a list, or None if they are not one-dimensional."""
    if media.is_tensor(rewards):
        rewards = rewards.detach().float().cpu().numpy()
    if isinstance(rewards, np.ndarray):
        return rewards.tolist() if rewards.ndim == 1 else None
    if isinstance(rewards, list | tuple):
        return list(rewards)
    return None


def _shape_of(rewards: Any) -> str:
    shape = getattr(rewards, "shape", None)
    return f"shape {tuple(shape)}" if shape is not None else f"a {type(rewards).__name__} of"


def _outcome(value: Any, info: dict[str, Any]) -> Outcome:
    if isinstance(value, Unscored):
        return _outcome_of(value)
    if media.is_tensor(value) or isinstance(value, np.generic | np.ndarray):
        value = value.item() if value.size == 1 or getattr(value, "ndim", 1) == 0 else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        reason = Failure(kind="failed", message=f"the model returned {type(value).__name__} where a number is needed")
        return Outcome(failure=reason, info=info)
    if not np.isfinite(value):
        return Outcome(failure=Failure(kind="failed", message=f"the model returned {value}"), info=info)
    return Outcome(reward=float(value), info=info)


def _outcome_of(error: BaseException) -> Outcome:
    if isinstance(error, Unscored):
        return Outcome(failure=Failure(kind=error.kind, message=_cut(error.message)), info=_plain(error.info))
    kind: Any = "timeout" if isinstance(error, TimeoutError) else "failed"
    return Outcome(failure=Failure(kind=kind, message=_cut(f"{type(error).__name__}: {error}")))


def _info_of(extra: Mapping[str, Any] | None, i: int, num_samples: int) -> dict[str, Any]:
    """What `extra_info` says of sample `i`."""
    info = {}
    for name, values in (extra or {}).items():
        is_list = isinstance(values, list | tuple) or hasattr(values, "shape")
        of_each = is_list and len(values) == num_samples
        info[str(name)] = _plain(values[i] if of_each else values)
    return info


def _plain(value: Any) -> Any:
    """`value` as msgpack carries it."""
    if value is None or isinstance(value, bool | str | bytes):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else str(value)
    if isinstance(value, float):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    to_list: Callable[[], Any] | None = getattr(value, "tolist", None)
    return to_list() if to_list is not None else repr(value)[:MAX_MESSAGE_CHARS]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_CHARS else f"{text[:MAX_MESSAGE_CHARS]}... ({len(text)} characters)"


def _is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in str(error)


def _free_device_memory() -> None:
    import torch

    torch.cuda.empty_cache()
