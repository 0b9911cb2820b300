"""One `submit()`: its samples are checked, put into groups, and become slots of the open step."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks import media
from tasks.rewards import RewardSpec, Split
from tasks.samples import MEDIA_FIELDS, Sample
from trainer_client.engine.model import Slot
from trainer_client.steps.grouping import groups_of
from trainer_client.steps.open_steps import OpenStep, check_groups
from trainer_client.steps.sample_checks import check


@dataclass(frozen=True, slots=True)
class Added:
    """What one `submit()` has added to a step."""

    step: int
    start: int
    """Index of its first sample in the step of this rank."""
    slots: Sequence[Slot]
    """In the order of the samples."""
    mixed_group: Hashable | None
    """A group that got samples of another prompt than it had, if there is one."""


@dataclass(slots=True)
class Submission:
    """The samples of one `submit()`."""

    split: Split
    rewards: tuple[RewardSpec, ...]
    samples: Sequence[Sample]
    group_size: int | None
    ticket_number: int
    """Among the tickets of this client."""
    started: float
    """When `submit()` was called, on `time.monotonic()`."""
    checks_media: bool = True
    """REWARDQ_CHECK_MEDIA."""
    groups: Sequence[Hashable] = field(default=(), init=False)
    """Of each sample; known once the samples are checked."""

    @property
    def groupwise(self) -> RewardSpec | None:
        """The first reward that compares the samples of a group, if there is one."""
        return next((spec for spec in self.rewards if spec.is_groupwise), None)

    def check(self, first: int, rank: int, world_size: int, max_pixels: int) -> None:
        """Check the samples, take copies of them, and find their groups.

        Takes no lock: a pass over condition media may take long.

        Args:
            first: Error texts number the samples from here.

        Raises:
            InvalidSampleError: Says which sample, what was found and what is needed.
        """
        copies = []
        for i, sample in enumerate(self.samples):
            where = f"sample {first + i}"
            copies.append(check(sample, self.rewards, where, max_pixels))
        self.samples = copies
        self.groups = groups_of(self.samples, f"{rank}.{self.ticket_number}")
        if self.groupwise is not None:
            check_groups(
                self.groups, self.group_size, self.groupwise, world_size, first
            )

    def add_to(self, step: OpenStep) -> Added:
        """Make a slot of each sample and add the slots to the open step.

        Raises:
            InvalidSampleError: A group would have too many members, or has another size. The step is unchanged then.
        """
        slots = self._slots(step)
        is_strict = self.groupwise is not None
        step.count_members(slots, self.group_size, is_strict=is_strict)
        added = Added(
            step=step.number,
            start=step.num_submitted,
            slots=slots,
            mixed_group=step.find_mixed_group(slots),
        )
        step.add(slots, time.monotonic() - self.started)
        return added

    def _slots(self, step: OpenStep) -> list[Slot]:
        fields: set[str] = set()
        for spec in self.rewards:
            fields.update(spec.fields)

        slots = []
        pairs = zip(self.samples, self.groups, strict=True)
        for index, (sample, group) in enumerate(pairs, start=step.num_submitted):
            slot = Slot(
                split=self.split,
                step=step.number,
                index=index,
                group=group,
                sample=sample,
                held=self._hold(sample, fields),
                rewards=self.rewards,
                submitted_at=self.started,
                group_size=self.group_size,
                ticket=self.ticket_number,
            )
            slots.append(slot)
        return slots

    def _hold(self, sample: Sample, fields: set[str]) -> dict[str, Any]:
        """The media of a sample that travel, by reference."""
        num_spots = media.NUM_SPOTS if self.checks_media else 0
        held = {}
        for name in MEDIA_FIELDS:
            value = getattr(sample, name) if name in fields else None
            if value is not None:
                held[name] = media.hold(value, num_spots=num_spots)
        return held
