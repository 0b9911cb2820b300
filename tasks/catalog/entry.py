"""What a catalog entry is: all that a trainer must know of a reward model without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

GPU = "gpu"
"""Queue of models that run in the worker."""

VLM = "vlm"
"""Queue of whatever waits on the network."""

How = Literal["each", "model", "rank", "wins"]
"""How a reward is computed: `each` sample by itself (pointwise), or groupwise: a `model` is given the whole group,
members are put in `rank` by another reward, or a judge compares them two at a time and counts `wins`."""

ImageFormat = Literal["", "png", "jpeg", "webp"]

IMAGE_OR_VIDEO = ("image", "video")
"""An alternative in `ModelEntry.required`."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a built-in: its type (as pydantic checks it), default, and a line for the user."""

    type: Any
    default: Any
    doc: str
    is_answer: bool = True
    """Whether the reward may depend on it. An option that only says how a server is asked is no part of the
    fingerprint."""
    reads: str = ""
    """The option names a file on the trainer's host, whose text goes into the option of this name, and so into the
    message."""
    is_needed: bool = False
    """Whether a config must give it."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """What a trainer must know of a reward model without importing it.

    `required` is a list of alternatives: each inner tuple needs at least one of its fields.
    `version` changes whenever the same sample would get another reward, and is part of the fingerprint.
    """

    path: str
    queue: str
    required: tuple[tuple[str, ...], ...]
    version: str
    doc: str
    optional: tuple[str, ...] = ()
    options: Mapping[str, Option] = field(default_factory=dict)
    extra: str | None = None
    how: How = "each"
    part: str = ""
    """For `how="rank"`: the reward model whose scores are ranked."""
    batch_size: int = 16
    max_batch_size: int = 1_000_000
    """A chunk holds at most so many samples, whatever `batch_size` says."""
    image_format: ImageFormat = ""
    """How images reach a judge unless the config says otherwise; empty for a local model."""
    timeout_s: float = 600.0
    uses_dtype: bool = False
    sampled: str | None = None
    """Name of the option that makes answers random when above 0 (a judge's temperature)."""
    is_yours: bool = False
    """Whether the user's own code computes it: `version` does not change with that code."""

    @property
    def is_judge(self) -> bool:
        """Whether it asks an API, in an image format of its own."""
        return self.image_format != ""

    @property
    def is_local(self) -> bool:
        """Whether the worker's own device computes it."""
        return self.queue == GPU

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field of a sample that travels for this model."""
        return (*(name for group in self.required for name in group), *self.optional)
