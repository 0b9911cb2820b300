"""A sample's media as they travel: checked arrays, their digests, the bytes of each transport."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tasks import media
from tasks.rewards import JPEG, RAW, RewardSpec
from trainer_client.board import Slot


@dataclass(slots=True)
class Encoded:
    """One media field of a sample as checked arrays, with the digest of each."""

    arrays: list[Any]
    is_list: bool
    digests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.digests = [media.digest(a) for a in self.arrays]

    def identity(self) -> list[Any]:
        """What of it goes into the sample's key."""
        return [
            [list(a.shape), d] for a, d in zip(self.arrays, self.digests, strict=True)
        ]

    def as_payloads(self, name: str, transport: str) -> list[Content]:
        """Its arrays as they travel."""
        return [
            as_payload(a, d, name, transport)
            for a, d in zip(self.arrays, self.digests, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes of one array as they travel."""

    data: Any
    digest: str
    shape: tuple[int, ...]
    format: Any


def encode(slot: Slot) -> dict[str, Encoded]:
    """The media of a slot's sample that travel, as checked arrays. Raises `InvalidSampleError`."""
    encoders = {
        "image": media.encode_image,
        "video": media.encode_video,
        "audio": media.encode_audio,
    }
    encoded = {}
    for name, held in slot.held.items():
        where = f"sample {slot.index}: {name}"
        single = encoders.get(name)
        if single is not None:
            encoded[name] = Encoded([single(held, where)], is_list=False)
            continue
        one = media.encode_image if name == "condition_images" else media.encode_video
        encoded[name] = Encoded(
            [one(h, f"{where}[{i}]") for i, h in enumerate(held.value)], is_list=True
        )
    return encoded


def transport_of(spec: RewardSpec) -> str:
    """How pixels travel for a reward: raw, or JPEG where a local reward says so. (A judge's format is the worker's.)"""
    return JPEG if spec.image_format == JPEG and not spec.is_judge else RAW


def as_payload(array: Any, digest: str, name: str, transport: str) -> Content:
    """The bytes of an array (of this digest) as they travel; an array's own bytes are not hashed a second time."""
    if name == "audio":
        return Content(memoryview(array).cast("B"), digest, array.shape, "float32")
    if transport == RAW:
        return Content(memoryview(array).cast("B"), digest, array.shape, "raw")
    frames = array if array.ndim == 4 else array[None]
    data = media.join_frames([media.to_jpeg(frame) for frame in frames])
    return Content(data, media.digest(data), array.shape, "jpeg")
