"""Samples as they travel: media as checked arrays, their digests, the bytes of each transport, the sample's keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
from PIL import Image

from tasks import media, outcomes
from tasks.errors import InvalidSampleError
from tasks.messages import Failure, MediaRef
from tasks.payloads import MAX_REQUEST_BYTES
from tasks.rewards import JPEG, RAW, RewardSpec
from tasks.samples import Beside, Sample, beside, identity_of, sample_key
from trainer_client.engine.model import Slot
from trainer_client.texts import words_of

NOTHING_BESIDE = Beside(metadata={}, fps=None, sample_rate=None, withheld=())

ENCODERS = {
    "image": media.encode_image,
    "video": media.encode_video,
    "audio": media.encode_audio,
}
LIST_ENCODERS = {
    "condition_images": media.encode_image,
    "condition_videos": media.encode_video,
}


SPARE_BYTES = 131_072
"""Of a request, for what is beside its prompts and metadata."""


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes of one array as they travel."""

    data: Any
    digest: str
    shape: tuple[int, ...]
    format: Any

    @property
    def num_bytes(self) -> int:
        """How much room it takes in the payload store."""
        return memoryview(self.data).nbytes

    def as_ref(self, name: str) -> MediaRef:
        """What a request says of it, where it is stored under `name`."""
        return MediaRef(
            name=name, digest=self.digest, shape=self.shape, format=self.format
        )


@dataclass(slots=True)
class EncodedField:
    """One media field of a sample as checked arrays."""

    arrays: list[Any]
    digests: list[str]
    is_list: bool

    @property
    def identity(self) -> list[Any]:
        """What of it goes into the sample's key."""
        return [
            [list(array.shape), digest]
            for array, digest in zip(self.arrays, self.digests, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a sample is for one reward."""

    key: str
    address: str
    """Of its outcome: for a groupwise reward, for the reward of the group's parts."""
    beside: Beside
    text_bytes: int = 0
    """Of its prompt and of what travels of its metadata, in a request."""


@dataclass(slots=True)
class EncodedSample:
    """A sample, ready to be looked up, stored and sent."""

    prompt: str
    identities: dict[str, Identity]
    """By reward name."""
    contents: dict[tuple[str, str], list[Content]] = field(default_factory=dict)
    """By media field and transport."""
    lists: frozenset[str] = frozenset()
    """The fields that are lists of media."""
    problem: Failure | None = None
    """Why it cannot be scored."""
    hint: str = ""
    """What the log may say of it: it can be scored, and something of it may not be as the user thinks."""

    @property
    def num_bytes(self) -> int:
        """Of all its contents."""
        return sum(c.num_bytes for some in self.contents.values() for c in some)

    def all_contents(self) -> dict[str, Content]:
        """Every content by its digest."""
        return {c.digest: c for some in self.contents.values() for c in some}

    def fields_for(self, spec: RewardSpec) -> dict[str, list[Content]]:
        """By media field, what of it travels for a reward."""
        transport = transport_of(spec)
        return {
            name: contents
            for (name, way), contents in self.contents.items()
            if way == transport and name in spec.fields
        }


def transport_of(spec: RewardSpec) -> str:
    """How pixels travel for a reward: raw, or JPEG where a local reward says so. (A judge's format is the worker's.)"""
    return JPEG if spec.image_format == JPEG and not spec.is_judge else RAW


@dataclass(frozen=True, slots=True)
class SampleEncoder:
    """Encodes the samples of one rank of one run. Safe between threads: it keeps nothing."""

    run: str
    rank: int
    max_request_bytes: int = MAX_REQUEST_BYTES
    """A sample whose prompt and metadata have as much is invalid."""

    def encode(self, slot: Slot, sample: Sample) -> EncodedSample:
        """The media of a slot's sample, and its identity for each reward; what is wrong with them is its `problem`.

        Never raises: whatever the sample raises is its own outcome, and no other sample's.
        """
        try:
            fields = _encode_fields(slot)
            identities = self._identities(slot, sample, fields)
            too_large = self._too_large(slot, identities)
            if too_large is not None:
                return self._unfit(slot, too_large)
            return EncodedSample(
                prompt=sample.prompt,
                identities=identities,
                contents=_contents_of(slot, fields),
                lists=frozenset(name for name, one in fields.items() if one.is_list),
                hint=_hint_of(slot),
            )
        except InvalidSampleError as error:
            return self._unfit(slot, Failure(kind="invalid", message=str(error)))
        except Exception as error:
            # Tensors and images of the user's classes, and no memory for a large one.
            words = f"sample {slot.index} cannot be encoded: {words_of(error)}"
            return self._unfit(slot, Failure(kind="failed", message=words))

    def _too_large(
        self, slot: Slot, identities: Mapping[str, Identity]
    ) -> Failure | None:
        """Why a sample cannot be put into a request, which is one value in the payload store."""
        num_bytes = max((one.text_bytes for one in identities.values()), default=0)
        if num_bytes < self.max_request_bytes - SPARE_BYTES:
            return None
        words = (
            f"sample {slot.index}: its prompt and metadata have {num_bytes} bytes, and a request takes "
            f"{self.max_request_bytes - SPARE_BYTES}; images, videos and audio go into the fields for them"
        )
        return Failure(kind="invalid", message=words)

    def _identities(
        self, slot: Slot, sample: Sample, fields: Mapping[str, EncodedField]
    ) -> dict[str, Identity]:
        digests = {name: one.identity for name, one in fields.items()}
        identities = {}
        for spec in slot.rewards:
            scored = spec.part if spec.is_groupwise else spec
            key = sample_key(
                sample.prompt,
                digests,
                sample.metadata,
                self._position(slot) if scored.counts_slot else (),
                identity_of(sample, scored),
            )
            address = outcomes.address(self.run, scored.fingerprint, key)
            own = beside(sample, spec)
            num_bytes = len(sample.prompt.encode()) + len(msgpack.packb(own.metadata))
            identities[spec.name] = Identity(key, address, own, num_bytes)
        return identities

    def _unfit(self, slot: Slot, problem: Failure) -> EncodedSample:
        """A sample that cannot be scored. It is like no other, and is known by its position alone."""
        key = sample_key("", {}, {}, self._position(slot))
        identities = {}
        for spec in slot.rewards:
            scored = spec.part if spec.is_groupwise else spec
            address = outcomes.address(self.run, scored.fingerprint, key)
            identities[spec.name] = Identity(key, address, NOTHING_BESIDE)
        return EncodedSample("", identities, problem=problem)

    def _position(self, slot: Slot) -> tuple[Any, ...]:
        return slot.split, slot.step, self.rank, slot.index


def _encode_fields(slot: Slot) -> dict[str, EncodedField]:
    """The media of a slot's sample as checked arrays. Raises `InvalidSampleError`."""
    fields = {}
    for name, held in slot.held.items():
        where = f"sample {slot.index}: {name}"
        if name in ENCODERS:
            arrays = [ENCODERS[name](held, where)]
        else:
            encode = LIST_ENCODERS[name]
            arrays = [encode(h, f"{where}[{i}]") for i, h in enumerate(held.value)]
        digests = [media.digest(array) for array in arrays]
        # An array that needed no copy may have been changed while its digest was computed.
        media.check_unchanged(held, where)
        fields[name] = EncodedField(arrays, digests, is_list=name in LIST_ENCODERS)
    return fields


def _hint_of(slot: Slot) -> str:
    """What to say of images whose files say that they are to be turned."""
    for name, held in slot.held.items():
        several = held.value if isinstance(held.value, tuple) else (held,)
        for one in several:
            is_image = isinstance(one.value, Image.Image)
            orientation = media.orientation_of(one.value) if is_image else 1
            if orientation != 1:
                return (
                    f"sample {slot.index}: {name}: its file says EXIF orientation {orientation}, which is not applied: "
                    "pixels are scored as they are stored. PIL.ImageOps.exif_transpose(image) turns them. "
                    "(Said once; other samples may have it too.)"
                )
    return ""


def _contents_of(
    slot: Slot, fields: Mapping[str, EncodedField]
) -> dict[tuple[str, str], list[Content]]:
    """The bytes of each field for each transport that a reward of the slot uses."""
    contents: dict[tuple[str, str], list[Content]] = {}
    for spec in slot.rewards:
        scored = spec.part if spec.is_groupwise else spec
        transport = transport_of(scored)
        for name, one in fields.items():
            if name in scored.fields and (name, transport) not in contents:
                contents[name, transport] = _as_contents(one, name, transport)
    return contents


def _as_contents(one: EncodedField, name: str, transport: str) -> list[Content]:
    pairs = zip(one.arrays, one.digests, strict=True)
    return [_as_content(array, digest, name, transport) for array, digest in pairs]


def _as_content(array: Any, digest: str, name: str, transport: str) -> Content:
    """The bytes of an array (of this digest) as they travel; an array's own bytes are not hashed a second time."""
    if name == "audio":
        return Content(memoryview(array).cast("B"), digest, array.shape, "float32")
    if transport == RAW:
        return Content(memoryview(array).cast("B"), digest, array.shape, "raw")
    frames = array if array.ndim == 4 else array[None]
    data = media.join_frames([media.to_jpeg(frame) for frame in frames])
    return Content(data, media.digest(data), array.shape, "jpeg")


def refs_of(
    contents: Sequence[Content], names: Sequence[str], *, is_list: bool
) -> MediaRef | tuple[MediaRef, ...]:
    """What a request says of one field's contents, which are stored under these names."""
    refs = tuple(c.as_ref(name) for c, name in zip(contents, names, strict=True))
    return refs if is_list else refs[0]
