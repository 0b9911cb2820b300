"""What `submit()` takes of a sample, and checks before anything is sent: types, shapes, dtypes and the fields a reward
needs."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from tasks import media
from tasks.errors import InvalidSampleError
from tasks.rewards import RewardSpec
from tasks.samples import MEDIA_FIELDS, Sample, has_field
from trainer_client.steps.group_ids import plain_id
from trainer_client.steps.plain_data import (
    NotPlainError,
    plain_copy,
    plain_text,
    value_of,
)
from trainer_client.texts import shorten, words_of

MAX_NUMBER = 1e9
"""Frames a second, and Hz; above it a number means something else, nanoseconds for example."""

MAX_PATH_CHARS = 200
"""Of a place in metadata, in an error's text."""

_IMAGE_FIELDS = tuple(name for name in MEDIA_FIELDS if name != "audio")


def check(
    sample: Sample, rewards: Sequence[RewardSpec], where: str, max_pixels: int
) -> Sample:
    """The sample as it is now, checked: types, shapes, dtypes and the fields that `rewards` require.

    Its prompt, metadata, numbers, group and lists are copied, and may be changed by the caller afterwards. Its media
    are the caller's. Nothing passes over pixels.

    Raises:
        InvalidSampleError: Names the sample, the field, what was found and what is needed.
    """
    if not isinstance(sample, Sample):
        raise InvalidSampleError(
            f"{where}: needs a Sample, found a {type(sample).__name__}"
        )
    try:
        return _checked_copy(sample, rewards, where, max_pixels)
    except InvalidSampleError:
        raise
    except Exception as error:
        # Whatever media, mappings and ids of the user's classes raise when they are looked at.
        raise InvalidSampleError(
            f"{where}: cannot be looked at: {words_of(error)}"
        ) from error


def _checked_copy(
    sample: Sample, rewards: Sequence[RewardSpec], where: str, max_pixels: int
) -> Sample:
    copy = Sample(
        prompt=_plain_prompt(sample.prompt, where),
        image=sample.image,
        video=_own_list(sample.video),
        audio=sample.audio,
        condition_images=_own_list(sample.condition_images),
        condition_videos=_own_lists(sample.condition_videos),
        group=plain_id(sample.group, where),
        metadata=_plain_metadata(sample.metadata, where),
        fps=_plain_number(sample.fps, f"{where}: fps", "frames a second"),
        sample_rate=_plain_number(sample.sample_rate, f"{where}: sample_rate", "Hz"),
    )
    _check_media(copy, where, max_pixels)
    for reward in rewards:
        _check_required(copy, reward, where)
        _check_edges(copy, reward, where)
    return copy


def _own_list(value: Any) -> Any:
    """A list of its own with the same media in it; what is no list is returned as it is."""
    return list(value) if isinstance(value, list | tuple) else value


def _own_lists(value: Any) -> Any:
    """The same of a list of videos, each of which may be a list of frames."""
    if not isinstance(value, list | tuple):
        return value
    return [_own_list(video) for video in value]


def _plain_prompt(prompt: Any, where: str) -> str:
    if not isinstance(prompt, str):
        raise InvalidSampleError(
            f"{where}: prompt must be text, found a {type(prompt).__name__}"
        )
    try:
        return plain_text(prompt)
    except NotPlainError as error:
        raise InvalidSampleError(f"{where}: prompt {error.problem}") from None


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


def _plain_number(value: Any, where: str, unit: str) -> float | None:
    """A number in (0, MAX_NUMBER], a whole one as an int, or None. Raises `InvalidSampleError`; NaN is outside."""
    value = value_of(value)
    if value is None:
        return None
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number and 0 < value <= MAX_NUMBER:
        return int(value) if float(value).is_integer() else float(value)
    found = repr(value)[:40] if is_number else f"a {type(value).__name__}"
    raise InvalidSampleError(f"{where} needs a number above 0 ({unit}), found {found}")


def _plain_metadata(metadata: Any, where: str) -> dict[str, Any]:
    if not isinstance(metadata, Mapping):
        raise InvalidSampleError(
            f"{where}: metadata must be a mapping, found a {type(metadata).__name__}"
        )
    try:
        copied: dict[str, Any] = plain_copy(metadata)
    except NotPlainError as error:
        raise InvalidSampleError(
            f"{where}: metadata{_shown(error.path)} {error.problem}; "
            "needs text keys and text, numbers, booleans, None, lists, mappings"
        ) from None
    return copied


def _shown(path: str) -> str:
    """The beginning of a path into metadata: of what contains itself it is long, and repeats."""
    return shorten(path, MAX_PATH_CHARS)
