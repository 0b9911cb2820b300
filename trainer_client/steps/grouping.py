"""The group of each submitted sample: the one it names, else that of its prompt and its condition media."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any

import msgpack

from tasks import media
from tasks.errors import InvalidSampleError
from tasks.samples import Sample

CONDITION_FIELDS = ("condition_images", "condition_videos")

ID_DIGITS = 16
"""Hex digits of a digest in a group's id."""

MAX_ID_CHARS = 200
"""A longer prompt goes into its group's id by its beginning and its digest: ids are in tickets and in error texts."""


def groups_of(samples: Sequence[Sample], place: str) -> list[Hashable]:
    """The group of each sample, in their order.

    A sample without `group` is with all samples of an equal prompt and equal condition media. The id is text, the same
    on all ranks: the prompt (a long one cut), and the digest of the condition media where there are any. To tell
    whether those are equal takes a pass over their pixels, here on the caller's thread, once for each object; a sample
    with `group` is spared that.

    Args:
        samples: Checked samples.
        place: What no other call of this run has alike. A sample whose condition media cannot be read is a group by
            itself under this name: with whom it would have to be compared is unknown.
    """
    digests: dict[int, list[Any]] = {}
    return [
        sample.group
        if sample.group is not None
        else _group_of(sample, f"{place}.{i}", digests)
        for i, sample in enumerate(samples)
    ]


def _group_of(sample: Sample, place: str, digests: dict[int, list[Any]]) -> str:
    values = {name: getattr(sample, name) for name in CONDITION_FIELDS}
    given = {
        name: list(value)
        for name, value in values.items()
        if value is not None and len(value)
    }
    prompt = _short(sample.prompt)
    if not given:
        return prompt
    try:
        identity = [
            [name, [_identity(name, one, digests) for one in listed]]
            for name, listed in given.items()
        ]
    except InvalidSampleError:
        return f"{prompt} [unreadable condition {place}]"
    digest = hashlib.sha256(msgpack.packb(identity)).hexdigest()[:ID_DIGITS]
    return f"{prompt} [condition {digest}]"


def _short(prompt: str) -> str:
    if len(prompt) <= MAX_ID_CHARS:
        return prompt
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:ID_DIGITS]
    return f"{prompt[:MAX_ID_CHARS]}... [prompt {digest}]"


def _identity(name: str, value: Any, digests: dict[int, list[Any]]) -> list[Any]:
    """Shape and digest of one condition; `digests` has them by the object's `id`."""
    known = digests.get(id(value))
    if known is None:
        encode = (
            media.encode_image if name == "condition_images" else media.encode_video
        )
        pixels = encode(media.hold(value), name)
        known = digests[id(value)] = [list(pixels.shape), media.digest(pixels)]
    return known
