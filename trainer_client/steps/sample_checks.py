"""What `submit()` checks of a sample before anything is sent: types, shapes, dtypes and the fields a reward needs."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from tasks import media
from tasks.errors import InvalidSampleError
from tasks.rewards import RewardSpec
from tasks.samples import MEDIA_FIELDS, Sample, has_field

MAX_NUMBER = 1e9
"""Frames a second, and Hz; above it a number means something else, nanoseconds for example."""

MAX_DEPTH = 64
"""Mappings and lists in metadata may be nested so deep."""

_IMAGE_FIELDS = tuple(name for name in MEDIA_FIELDS if name != "audio")


def check(
    sample: Sample, rewards: Sequence[RewardSpec], where: str, max_pixels: int
) -> None:
    """Check types, shapes, dtypes and the fields that `rewards` require; no pass over pixels.

    Raises:
        InvalidSampleError: Names the sample, the field, what was found and what is needed.
    """
    if not isinstance(sample, Sample):
        raise InvalidSampleError(
            f"{where}: needs a Sample, found a {type(sample).__name__}"
        )
    _check_prompt(sample.prompt, where)
    _check_media(sample, where, max_pixels)
    _check_metadata(sample.metadata, where)
    _check_number(sample.fps, f"{where}: fps", "frames a second")
    _check_number(sample.sample_rate, f"{where}: sample_rate", "Hz")
    _check_group(sample.group, where)
    for reward in rewards:
        _check_required(sample, reward, where)
        _check_edges(sample, reward, where)


def _check_prompt(prompt: Any, where: str) -> None:
    if not isinstance(prompt, str):
        raise InvalidSampleError(
            f"{where}: prompt must be text, found a {type(prompt).__name__}"
        )
    problem = _not_text(prompt)
    if problem is not None:
        raise InvalidSampleError(f"{where}: prompt {problem}")


def _check_media(sample: Sample, where: str, max_pixels: int) -> None:
    if sample.image is not None:
        media.check_image(sample.image, f"{where}: image", max_pixels)
    if sample.video is not None:
        media.check_video(sample.video, f"{where}: video", max_pixels)
    if sample.audio is not None:
        media.check_audio(sample.audio, f"{where}: audio")

    images = _listed(sample.condition_images, f"{where}: condition_images")
    for i, image in enumerate(images):
        media.check_image(image, f"{where}: condition_images[{i}]", max_pixels)

    videos = _listed(sample.condition_videos, f"{where}: condition_videos")
    for i, video in enumerate(videos):
        media.check_video(video, f"{where}: condition_videos[{i}]", max_pixels)


def _listed(value: Any, where: str) -> Sequence[Any]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise InvalidSampleError(
            f"{where}: needs a list, found a {type(value).__name__}"
        )
    return value


def _check_required(sample: Sample, reward: RewardSpec, where: str) -> None:
    for alternatives in reward.required:
        if any(has_field(sample, name) for name in alternatives):
            continue
        is_prompt = alternatives[0] == "prompt"
        found = f"an empty prompt {sample.prompt!r}" if is_prompt else "none"
        raise InvalidSampleError(
            f"{where}: reward {reward.name!r} ({reward.reward_model}) needs {' or '.join(alternatives)}, "
            f"found {found}{_advice(sample, reward)}"
        )


def _advice(sample: Sample, reward: RewardSpec) -> str:
    """What a class of the user's that takes something else has to say."""
    if reward.is_builtin:
        return ""
    given = [name for name in (*MEDIA_FIELDS, "metadata") if has_field(sample, name)]
    fields = ", ".join(["prompt", *given])
    return f"; if it scores what the sample has, let its required_fields say so: [{fields}]"


def _check_edges(sample: Sample, reward: RewardSpec, where: str) -> None:
    """Raise for an image that cannot be a file of the format in which this reward is sent images."""
    if reward.image_format not in media.LONGEST_EDGE:
        return
    for name in _IMAGE_FIELDS:
        if name not in reward.fields:
            continue
        for image in _images_of(sample, name):
            problem = media.too_long_for(reward.image_format, *media.size_of(image))
            if problem is not None:
                raise InvalidSampleError(
                    f"{where}: {name}: {problem}, and reward {reward.name!r} has image_format: {reward.image_format}"
                )


def _images_of(sample: Sample, name: str) -> Sequence[Any]:
    """The images or videos that a field has."""
    value: Any = getattr(sample, name)
    if value is None:
        return ()
    return list(value) if name.startswith("condition_") else [value]


def _check_group(group: Any, where: str) -> None:
    """Raise for an id that does not equal itself or that no dict takes: it would put each sample in its own group."""
    try:
        hash(group)
    except TypeError:
        raise InvalidSampleError(
            f"{where}: group must be hashable, a number or a text for example, found a {type(group).__name__}"
        ) from None
    if media.is_tensor(group):
        raise InvalidSampleError(
            f"{where}: group must be a number or a text for example, found a tensor, which equals no other tensor; "
            "give its number: group=int(...)"
        )
    is_nan = isinstance(group, numbers.Real) and group != group
    if is_nan:
        raise InvalidSampleError(
            f"{where}: group is NaN, which equals nothing; None groups by the prompt"
        )


def _check_number(value: Any, where: str, unit: str) -> None:
    """Raise `InvalidSampleError` unless `value` is None or a number in (0, MAX_NUMBER]; NaN is outside of it."""
    if value is None:
        return
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number and 0 < value <= MAX_NUMBER:
        return
    found = repr(value)[:40] if is_number else f"a {type(value).__name__}"
    raise InvalidSampleError(f"{where} needs a number above 0 ({unit}), found {found}")


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, Mapping):
        raise InvalidSampleError(
            f"{where}: metadata must be a mapping, found a {type(metadata).__name__}"
        )
    problem = _not_plain(metadata, "metadata")
    if problem is not None:
        raise InvalidSampleError(
            f"{where}: {problem}; needs text keys and text, numbers, booleans, None, lists, mappings"
        )


def _not_plain(value: Any, path: str, depth: int = 0) -> str | None:
    """Where and what in `value` is not JSON-like, or None."""
    if depth > MAX_DEPTH:
        return f"metadata is nested more than {MAX_DEPTH} deep"
    if isinstance(value, Mapping):
        return _not_plain_in_mapping(value, path, depth)
    if isinstance(value, list | tuple):
        return _not_plain_in_list(value, path, depth)
    return _not_plain_scalar(value, path)


def _not_plain_in_mapping(
    mapping: Mapping[Any, Any], path: str, depth: int
) -> str | None:
    for key, item in mapping.items():
        if not isinstance(key, str):
            return f"{path} has the key {key!r}"
        if _not_text(key) is not None:
            return f"{path} has the key {key!r} of no valid Unicode"
        problem = _not_plain(item, f"{path}[{key!r}]", depth + 1)
        if problem is not None:
            return problem
    return None


def _not_plain_in_list(items: Sequence[Any], path: str, depth: int) -> str | None:
    for i, item in enumerate(items):
        problem = _not_plain(item, f"{path}[{i}]", depth + 1)
        if problem is not None:
            return problem
    return None


def _not_plain_scalar(value: Any, path: str) -> str | None:
    if isinstance(value, str):
        problem = _not_text(value)
        return None if problem is None else f"{path} {problem}"
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return f"{path} is an integer of more than 64 bits"
    if value is None or isinstance(value, bool | int | float):
        return None
    return f"{path} is a {type(value).__name__}"


def _not_text(text: str) -> str | None:
    """Why `text` cannot be encoded (a lone surrogate), or None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"is no valid Unicode: {error.reason} at {error.start}"
    return None
