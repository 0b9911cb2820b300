"""Samples as a trainer submits them, what of a sample travels for a reward, and the key that is its identity."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.hashing import canonical, hash_of
from tasks.rewards import RewardSpec

MEDIA_FIELDS = ("image", "video", "audio", "condition_images", "condition_videos")
NUMBER_FIELDS = ("fps", "sample_rate")

KEY_DIGITS = 32
"""Hex digits of a sample's key."""

MAX_SHOWN_CHARS = 80
"""Of a prompt, in a sample's `repr`."""

_WITHHOLDABLE = (*MEDIA_FIELDS, "metadata", *NUMBER_FIELDS)


@dataclass(slots=True, eq=False)
class Sample:
    """A prompt and what was generated for it.

    `submit()` copies all but the media, which are kept by reference until they are encoded: do not change them before
    `client.flush()` or `collect()`. docs/samples.md says what is noticed.
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
    """Id of its prompt's group, over all ranks: a value, `ids[i]` of a tensor is its number. Samples of one group are
    compared. Unless given, samples with equal prompts and condition media are one group."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON-like; reaches the reward models that declare it."""
    fps: float | None = None
    """Frames a second of its videos. Goes where its video goes, and to reward models that declare it."""
    sample_rate: float | None = None
    """Of its audio, in Hz. Goes where its audio goes, and to reward models that declare it."""

    def __repr__(self) -> str:
        """Which media it has, not their values."""
        given = [name for name in MEDIA_FIELDS if getattr(self, name) is not None]
        prompt = self.prompt
        if len(prompt) > MAX_SHOWN_CHARS:
            prompt = f"{prompt[:MAX_SHOWN_CHARS]}..."
        group = "" if self.group is None else f", group={self.group!r}"
        return f"Sample({prompt!r}, {', '.join(given) or 'no media'}{group})"


def has_field(sample: Sample, name: str) -> bool:
    """Whether a sample has something in a field: an empty prompt, mapping or list counts as nothing."""
    value = getattr(sample, name)
    if name == "prompt":
        return bool(value.strip())
    if name == "metadata":
        return len(value) > 0
    if isinstance(value, list | tuple):
        return len(value) > 0
    return value is not None


@dataclass(frozen=True, slots=True)
class Beside:
    """What of a sample travels for one reward beside its prompt and media, and what of it stays behind."""

    metadata: dict[str, Any]
    fps: float | None
    sample_rate: float | None
    withheld: tuple[str, ...]
    """Fields that the sample has and that do not travel. A worker whose class declares one of them refuses the sample:
    the class would score it as a sample without that field."""

    def as_fields(self) -> dict[str, Any]:
        """By field of a `SampleRequest`."""
        return {
            "metadata": self.metadata,
            "fps": self.fps,
            "sample_rate": self.sample_rate,
            "withheld": self.withheld,
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
    identity: dict[str, Any] = {**numbers_of(sample, reward)}
    withheld = _withheld(sample, reward)
    if withheld:
        identity["withheld"] = list(withheld)
    return identity


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
    parts = [prompt, canonical(digests), canonical(metadata), list(slot)]
    if more:
        parts.append(canonical(more))
    return hash_of(parts, KEY_DIGITS)


def _withheld(sample: Sample, reward: RewardSpec) -> tuple[str, ...]:
    """The fields that a sample has and that do not travel for a class of the user's."""
    if reward.is_builtin:
        return ()
    return tuple(
        name
        for name in _WITHHOLDABLE
        if name not in reward.fields and has_field(sample, name)
    )
