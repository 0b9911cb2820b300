"""Turns the samples of a chunk into what a model is called with: fields decoded, media as PIL images or tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks import media
from tasks.messages import Failure, MediaRef, Outcome, RewardCall, SampleRequest
from tasks.payloads import Data
from tasks.samples import MEDIA_FIELDS, NUMBER_FIELDS
from workers.base import GroupwiseRewardModel, RewardModel
from workers.loading.signature import (
    Signature,
    is_ours,
    lacks_all_media,
    signature_of,
    unsent,
)
from workers.loading.tracebacks import user_line
from workers.scoring.outputs import failed, outcome_of

Inputs = dict[str, Any]
"""The fields of one sample, decoded."""


def inputs_of(
    model: RewardModel,
    call: RewardCall,
    samples: Sequence[SampleRequest],
    payloads: Mapping[str, Data],
) -> list[Inputs | Outcome]:
    """What the model is called with for each sample, or why it cannot be.

    A group of which one member cannot be given to the model as it is has no reward at all: among the others each member
    would have another reward.
    """
    try:
        signature = signature_of(model)
    except Exception as error:  # a property of a class is the user's code
        return [outcome_of(error, user_line(error, call.model))] * len(samples)
    if isinstance(model, GroupwiseRewardModel):
        failure = unsent(call.model, signature, samples)
        if failure is not None:
            return [Outcome(failure=failure)] * len(samples)
    inputs: list[Inputs | Outcome] = []
    for sample in samples:
        failure = _lacks(model, signature, call, sample)
        if failure is not None:
            inputs.append(Outcome(failure=failure))
        else:
            inputs.append(_decode_or_failure(model, signature, sample, payloads))
    return inputs


def _lacks(
    model: RewardModel, signature: Signature, call: RewardCall, sample: SampleRequest
) -> Failure | None:
    """Why a sample cannot be given to a model: it has not what the model needs."""
    failure = unsent(call.model, signature, [sample])
    if failure is not None:
        return failure
    if is_ours(model):
        missing = []
        for name in model.required_fields:
            if name in MEDIA_FIELDS and sample.media.get(name) in (None, ()):
                missing.append(name)
        lacking = " and ".join(missing)
    else:
        lacking = lacks_all_media(signature, sample)
    if not lacking:
        return None
    message = f"{call.model} needs {lacking}, which the sample has not"
    return Failure(kind="invalid", message=message)


def _decode_or_failure(
    model: RewardModel,
    signature: Signature,
    sample: SampleRequest,
    payloads: Mapping[str, Data],
) -> Inputs | Outcome:
    try:
        return _decode_sample(signature, sample, payloads, model.use_tensor_inputs)
    except Exception as error:  # a payload that is not what its reference says must not take its neighbours with it
        return failed(f"its media cannot be decoded: {type(error).__name__}: {error}")


def _decode_sample(
    signature: Signature,
    sample: SampleRequest,
    payloads: Mapping[str, Data],
    as_tensor: bool,
) -> Inputs:
    """The fields that a model takes, media as PIL images or tensors; None where the sample has none."""
    inputs: Inputs = {"prompt": sample.prompt}
    for name in signature.fields:
        if name in MEDIA_FIELDS:
            inputs[name] = _decode_field(sample.media.get(name), payloads, as_tensor)
        elif name in ("metadata", *NUMBER_FIELDS):
            inputs[name] = getattr(sample, name)
    return inputs


def _decode_field(
    refs: MediaRef | tuple[MediaRef, ...] | None,
    payloads: Mapping[str, Data],
    as_tensor: bool,
) -> Any:
    if refs is None:
        return None
    if isinstance(refs, MediaRef):
        return _decode_media(refs, payloads, as_tensor)
    many = [_decode_media(ref, payloads, as_tensor) for ref in refs]
    if as_tensor and len({tuple(one.shape) for one in many}) == 1:
        import torch

        return torch.stack(many)
    return many


def _decode_media(ref: MediaRef, payloads: Mapping[str, Data], as_tensor: bool) -> Any:
    """One image, video or waveform, as a model takes it."""
    array = _array(ref, payloads[ref.name])
    if ref.format == "float32":
        if as_tensor:
            return media.to_waveform(array)
        array.flags.writeable = False  # samples of equal audio share it
        return array
    if as_tensor:
        return media.to_tensor(array)
    if array.ndim == 3:
        return media.to_pil(array)
    return [media.to_pil(frame) for frame in array]


def _array(ref: MediaRef, data: Data) -> Any:
    """The bytes of a payload as an array: float32 `(C, T)`, uint8 `(H, W, 3)` or `(T, H, W, 3)`.

    Raises:
        ValueError: The reference declares another shape than the bytes have.
    """
    if ref.format == "jpeg":
        return _frames(ref, data)
    dtype = np.dtype(np.float32 if ref.format == "float32" else np.uint8)
    needed = math.prod(ref.shape) * dtype.itemsize
    if needed != len(data):
        raise ValueError(
            f"shape {ref.shape} as {ref.format} needs {needed} bytes, found {len(data)}"
        )
    return np.frombuffer(data, dtype).reshape(ref.shape)


def _frames(ref: MediaRef, data: Data) -> Any:
    """The JPEG files of a payload, each of the declared size, which is looked at before its pixels are decoded."""
    frames = media.split_frames(data)
    is_video = len(ref.shape) == 4
    num_frames = ref.shape[0] if is_video else 1
    if len(frames) != num_frames:
        raise ValueError(
            f"shape {ref.shape} needs {num_frames} frames, found {len(frames)}"
        )
    size_HW = ref.shape[-3], ref.shape[-2]
    return np.stack([media.from_jpeg(frame, size_HW) for frame in frames]).reshape(
        ref.shape
    )
