"""The group of each submitted sample: its `group`, or the samples with the same prompt and condition media."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any

import msgpack

from tasks import media
from tasks.rewards import RewardSpec, Split
from tasks.samples import Sample
from trainer_client.texts import shorten

CONDITION_FIELDS = ("condition_images", "condition_videos")

ID_DIGITS = 16
"""Hex digits of a digest in a group's id."""

MAX_ID_CHARS = 200
"""Of a longer prompt, its group's id has the beginning and the digest: ids are in tickets and in error texts."""


def are_compared(split: Split, rewards: Sequence[RewardSpec]) -> bool:
    """Whether the samples of a group are compared: by advantages, or by a groupwise reward."""
    return split == "train" or any(spec.is_groupwise for spec in rewards)


def groups_of(samples: Sequence[Sample], call_name: str) -> list[Hashable]:
    """The group of each sample, in their order.

    A sample without `group` is with all samples of an equal prompt and equal condition media. The id is text, the same
    on all ranks: the prompt (a long one cut), and the digest of the condition media where there are any. To tell
    whether condition media are equal takes a pass over their pixels, here on the caller's thread, once for each object.
    A sample with `group` is spared that.

    Args:
        samples: Checked samples.
        call_name: Differs for each call of this run. A sample whose condition media cannot be read is a group by itself
            under this name: with which samples it should be compared is unknown.
    """
    digests: dict[int, list[Any]] = {}
    groups: list[Hashable] = []
    for i, sample in enumerate(samples):
        if sample.group is not None:
            groups.append(sample.group)
        else:
            groups.append(_group_of(sample, f"{call_name}.{i}", digests))
    return groups


def _group_of(sample: Sample, own_name: str, digests: dict[int, list[Any]]) -> str:
    """The group's id of a sample without `group`; `own_name` is the group's if its condition media cannot be read."""
    prompt = _prompt_id(sample.prompt)
    identity = []
    try:
        for name in CONDITION_FIELDS:
            condition = getattr(sample, name)
            if condition is not None and len(condition):
                parts = [_identity(name, value, digests) for value in condition]
                identity.append([name, parts])
    except Exception:  # its own outcome says why, once it is encoded
        return f"{prompt} [unreadable condition {own_name}]"

    if not identity:
        return prompt
    digest = hashlib.sha256(msgpack.packb(identity)).hexdigest()[:ID_DIGITS]
    return f"{prompt} [condition {digest}]"


def _prompt_id(prompt: str) -> str:
    if len(prompt) <= MAX_ID_CHARS:
        return prompt
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:ID_DIGITS]
    return f"{shorten(prompt, MAX_ID_CHARS)} [prompt {digest}]"


def _identity(name: str, value: Any, digests: dict[int, list[Any]]) -> list[Any]:
    """Shape and digest of one condition image or video; `digests` has those known, by the object's `id`."""
    known = digests.get(id(value))
    if known is not None:
        return known

    is_image = name == "condition_images"
    encode = media.encode_image if is_image else media.encode_video
    pixels = encode(media.hold(value), name)
    identity = digests[id(value)] = [list(pixels.shape), media.digest(pixels)]
    return identity
