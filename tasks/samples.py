"""Samples as a trainer submits them: their fields, their cheap checks, and the key that is their identity."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from tasks import media
from tasks.errors import InvalidSampleError
from tasks.rewards import RewardSpec

MEDIA_FIELDS = ("image", "video", "audio", "condition_images", "condition_videos")

MAX_SHOWN_CHARS = 80
"""Of a prompt, in a sample's `repr`."""
NUMBER_FIELDS = ("fps", "sample_rate")

MAX_NUMBER = 1e9
"""Frames a second, and Hz; above it a number means something else, nanoseconds for example."""

MAX_DEPTH = 64
"""Mappings and lists in metadata may be nested so deep."""


@dataclass(slots=True, eq=False)
class Sample:
    """A prompt and what was generated for it.

    Media are kept by reference until they are encoded; do not change them before `client.flush()` or `collect()`.
    """

    prompt: str = ""
    image: Any = None
    """PIL, uint8 `(H, W, 3)`, or float `(3, H, W)` in [0, 1]; numpy or torch."""
    video: Any = None
    """A list of images of one size, uint8 `(T, H, W, 3)`, or float `(T, 3, H, W)` in [0, 1]."""
    audio: Any = None
    """A float waveform `(T,)` or `(C, T)`."""
    condition_images: Sequence[Any] | None = None
    """Images that the generator was given (the source of an edit first)."""
    condition_videos: Sequence[Any] | None = None
    group: Hashable = None
    """Id of its prompt's group, over all ranks; samples of one group are compared. Unless given, equal prompts and
    condition media are one."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON-like; reaches the reward models that declare it."""
    fps: float | None = None
    """Frames a second of its videos. Goes where its video goes, and to reward models that declare it."""
    sample_rate: float | None = None
    """Of its audio, in Hz. Goes where its audio goes, and to reward models that declare it."""

    def __repr__(self) -> str:
        """Which media it has, not their values."""
        given = [name for name in MEDIA_FIELDS if getattr(self, name) is not None]
        prompt = (
            self.prompt
            if len(self.prompt) <= MAX_SHOWN_CHARS
            else f"{self.prompt[:MAX_SHOWN_CHARS]}..."
        )
        group = "" if self.group is None else f", group={self.group!r}"
        return f"Sample({prompt!r}, {', '.join(given) or 'no media'}{group})"


@dataclass(frozen=True, slots=True)
class Beside:
    """What of a sample travels for one reward beside its prompt and media, and what of it stays behind."""

    metadata: dict[str, Any]
    fps: float | None
    sample_rate: float | None
    withheld: tuple[str, ...]
    """Fields that the sample has and that do not travel. A worker whose class declares one refuses: it would take the
    sample for one without."""

    def as_fields(self) -> dict[str, Any]:
        """By field of a `SampleRequest`."""
        return {
            name: getattr(self, name)
            for name in ("metadata", "fps", "sample_rate", "withheld")
        }


def beside(sample: Sample, reward: RewardSpec) -> Beside:
    """What of `sample` goes to `reward` beside its prompt and media."""
    given = numbers_of(sample, reward)
    return Beside(
        metadata=dict(sample.metadata) if "metadata" in reward.fields else {},
        fps=given.get("fps"),
        sample_rate=given.get("sample_rate"),
        withheld=_withheld(sample, reward),
    )


def numbers_of(sample: Sample, reward: RewardSpec) -> dict[str, float]:
    """The numbers of `sample` that travel for `reward`, by field; a whole number as an int."""
    found = {}
    for name in NUMBER_FIELDS:
        value = getattr(sample, name)
        if value is not None and name in reward.fields:
            found[name] = int(value) if float(value).is_integer() else float(value)
    return found


def identity_of(sample: Sample, reward: RewardSpec) -> dict[str, Any]:
    """What of `sample`, beside prompt, media and metadata, makes its reward another."""
    withheld = _withheld(sample, reward)
    return {
        **numbers_of(sample, reward),
        **({"withheld": list(withheld)} if withheld else {}),
    }


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
    if not isinstance(sample.prompt, str):
        raise InvalidSampleError(
            f"{where}: prompt must be text, found a {type(sample.prompt).__name__}"
        )
    _check_text(sample.prompt, f"{where}: prompt")
    if sample.image is not None:
        media.check_image(sample.image, f"{where}: image", max_pixels)
    if sample.video is not None:
        media.check_video(sample.video, f"{where}: video", max_pixels)
    if sample.audio is not None:
        media.check_audio(sample.audio, f"{where}: audio")
    for i, image in enumerate(
        _listed(sample.condition_images, f"{where}: condition_images")
    ):
        media.check_image(image, f"{where}: condition_images[{i}]", max_pixels)
    for i, video in enumerate(
        _listed(sample.condition_videos, f"{where}: condition_videos")
    ):
        media.check_video(video, f"{where}: condition_videos[{i}]", max_pixels)
    _check_metadata(sample.metadata, where)
    for name, unit in (("fps", "frames a second"), ("sample_rate", "Hz")):
        _check_number(getattr(sample, name), f"{where}: {name}", unit)
    _check_group(sample.group, where)
    for reward in rewards:
        _check_required(sample, reward, where)
        _check_edges(sample, reward, where)


def sample_key(
    prompt: str,
    digests: Mapping[str, Any],
    metadata: Mapping[str, Any],
    slot: tuple[Any, ...] = (),
    more: Mapping[str, Any] | None = None,
) -> str:
    """The identity of a sample: 32 hex digits of its prompt, media, metadata and what `more` there is of it.

    Args:
        digests: For each media field that travels, `(shape, digest)` or a list of them.
        more: As `identity_of` says; a sample without keeps the key that it always had.
        slot: (split, step, rank, index), for a judge whose answers are random and must differ between equal samples.
    """
    parts = [prompt, _canonical(digests), _canonical(metadata), list(slot)]
    if more:
        parts.append(_canonical(more))
    return hashlib.sha256(msgpack.packb(parts)).hexdigest()[:32]


def _check_required(sample: Sample, reward: RewardSpec, where: str) -> None:
    for alternatives in reward.required:
        if not any(_has(sample, name) for name in alternatives):
            raise InvalidSampleError(
                f"{where}: reward {reward.name!r} ({reward.reward_model}) needs {' or '.join(alternatives)}, "
                f"found {_missing(sample, alternatives[0])}{_advice(sample, reward)}"
            )


def _check_edges(sample: Sample, reward: RewardSpec, where: str) -> None:
    """Raise for an image that cannot be a file of the format in which this reward is sent images."""
    if reward.image_format not in media.LONGEST_EDGE:
        return
    for name in (n for n in MEDIA_FIELDS if n != "audio" and n in reward.fields):
        value = getattr(sample, name)
        listed = value if name.startswith("condition_") else (value,)
        for one in listed or ():
            why = (
                None
                if one is None
                else media.too_long_for(reward.image_format, *media.size_of(one))
            )
            if why is not None:
                raise InvalidSampleError(
                    f"{where}: {name}: {why}, and reward {reward.name!r} has image_format: {reward.image_format}"
                )


_WITHHELD = (*MEDIA_FIELDS, "metadata", *NUMBER_FIELDS)


def _withheld(sample: Sample, reward: RewardSpec) -> tuple[str, ...]:
    """The fields that a sample has and that do not travel for a class of the user's."""
    if reward.is_builtin:
        return ()
    return tuple(
        name for name in _WITHHELD if name not in reward.fields and _has(sample, name)
    )


def _has(sample: Sample, name: str) -> bool:
    value = getattr(sample, name)
    if name == "prompt":
        return bool(value.strip())
    if name == "metadata":
        return len(value) > 0
    return value is not None and (not isinstance(value, list | tuple) or len(value) > 0)


def _missing(sample: Sample, name: str) -> str:
    return f"an empty prompt {sample.prompt!r}" if name == "prompt" else "none"


def _advice(sample: Sample, reward: RewardSpec) -> str:
    """What a class of the user's that takes something else has to say."""
    if reward.is_builtin:
        return ""
    there = ", ".join(
        [
            "prompt",
            *(name for name in (*MEDIA_FIELDS, "metadata") if _has(sample, name)),
        ]
    )
    return (
        f"; if it scores what the sample has, let its required_fields say so: [{there}]"
    )


def _listed(value: Any, where: str) -> Sequence[Any]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise InvalidSampleError(
            f"{where}: needs a list, found a {type(value).__name__}"
        )
    return value


def _check_text(text: str, where: str) -> None:
    if (bad := _not_text(text)) is not None:
        raise InvalidSampleError(f"{where} {bad}")


def _not_text(text: str) -> str | None:
    """Why `text` cannot be encoded (a lone surrogate), or None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"is no valid Unicode: {error.reason} at {error.start}"
    return None


def _check_group(group: Any, where: str) -> None:
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
    if isinstance(group, numbers.Real) and group != group:
        raise InvalidSampleError(
            f"{where}: group is NaN, which equals nothing; None groups by the prompt"
        )


def _check_number(value: Any, where: str, unit: str) -> None:
    """Raise `InvalidSampleError` unless `value` is None or a number in (0, MAX_NUMBER]; NaN is none."""
    if value is None:
        return
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_NUMBER:
        found = repr(value)[:40] if is_number else f"a {type(value).__name__}"
        raise InvalidSampleError(
            f"{where} needs a number above 0 ({unit}), found {found}"
        )


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, Mapping):
        raise InvalidSampleError(
            f"{where}: metadata must be a mapping, found a {type(metadata).__name__}"
        )
    bad = _not_plain(metadata, "metadata")
    if bad is not None:
        raise InvalidSampleError(
            f"{where}: {bad}; needs text keys and text, numbers, booleans, None, lists, mappings"
        )


def _not_plain(value: Any, path: str, depth: int = 0) -> str | None:
    """Where and what in `value` is not JSON-like, or None."""
    if depth > MAX_DEPTH:
        return f"metadata is nested more than {MAX_DEPTH} deep"
    if isinstance(value, str):
        bad = _not_text(value)
        return bad and f"{path} {bad}"
    if value is None or isinstance(value, bool | int | float):
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            return f"{path} is an integer of more than 64 bits"
        return None
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str) or _not_text(key) is not None:
                return f"{path} has the key {key!r}" + (
                    " of no valid Unicode" if isinstance(key, str) else ""
                )
            if (bad := _not_plain(item, f"{path}[{key!r}]", depth + 1)) is not None:
                return bad
        return None
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            if (bad := _not_plain(item, f"{path}[{i}]", depth + 1)) is not None:
                return bad
        return None
    return f"{path} is a {type(value).__name__}"


def _canonical(value: Any) -> Any:
    """Mappings in the order of their keys, so that equal content gives equal bytes."""
    if isinstance(value, Mapping):
        return {key: _canonical(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    return value
