"""The open steps of a client: what was submitted in each split and not yet collected, and how many are in a group."""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.errors import InvalidSampleError
from tasks.rewards import RewardSpec, Split
from tasks.samples import Sample
from trainer_client.engine.model import Slot
from trainer_client.ticket import Ticket


@dataclass(slots=True)
class Step:
    """What was submitted and not yet collected in one split."""

    number: int
    slots: list[Slot] = field(default_factory=list)
    num_submitted: int = 0
    submit_s: float = 0.0
    members: Counter[Any] = field(default_factory=Counter)
    """Samples of each group that this rank has submitted."""
    group_sizes: dict[Any, int | None] = field(default_factory=dict)
    prompts: dict[Any, tuple[str, ...]] = field(default_factory=dict)
    """The different prompts of each group, the first two of them."""
    _is_strict: bool = False
    is_emptied: bool = False
    """All of it was collected by tickets: it ends unless more is submitted under its number."""

    def count_members(
        self,
        samples: Sequence[Sample | Slot],
        group_size: int | None,
        *,
        is_strict: bool = True,
    ) -> None:
        """Count samples into their groups, as far as the size of these is known.

        Args:
            is_strict: A group is given its size in each call or in none, as groupwise rewards need it, and what tickets
                have collected of it counts on. Else a group is what is submitted and not yet collected.

        Raises:
            InvalidSampleError: A group would have more members than its size, or is given two sizes.
        """
        self._is_strict = is_strict
        groups = [sample.group for sample in samples]
        sizes = dict(self.group_sizes)
        for group in dict.fromkeys(groups):
            size = sizes.get(group, group_size)
            if size != group_size and (is_strict or None not in (size, group_size)):
                raise InvalidSampleError(
                    f"group {group!r} has group_size={size}, found group_size={group_size}"
                )
            if is_strict or size is not None or group_size is not None:
                sizes[group] = group_size if size is None else size
        members = self.members + Counter(group for group in groups if group in sizes)
        for group in dict.fromkeys(groups):
            size = sizes.get(group)
            if size is not None and members[group] > size:
                raise InvalidSampleError(
                    f"group {group!r} of step {self.number} would have {members[group]} members, group_size={size}; a "
                    "prompt that comes twice in a step needs another group= each time"
                )
        self.members = members
        self.group_sizes = sizes

    def find_mixed_group(self, slots: Sequence[Slot]) -> Hashable | None:
        """A group that these samples give another prompt than it had; None if there is none."""
        mixed = None
        for slot in slots:
            prompt = slot.sample.prompt if slot.sample is not None else ""
            known = self.prompts.setdefault(slot.group, (prompt,))
            if prompt not in known:
                self.prompts[slot.group] = (known[0], prompt)
                mixed = slot.group
        return mixed

    def add(self, slots: Sequence[Slot], held_s: float) -> None:
        """Take up slots, whose `submit()` took `held_s`."""
        self.slots += slots
        self.is_emptied = False
        self.num_submitted += len(slots)
        self.submit_s += held_s

    def remove(self, slots: Iterable[Slot]) -> None:
        """These are collected."""
        collected = set(slots)
        self.slots = [s for s in self.slots if s not in collected]
        for slot in (
            collected
        ):  # a step whose tickets overlap is never empty, and must not grow with them
            self.prompts.pop(slot.group, None)
            if not self._is_strict:
                self._forget_member(slot.group)

    def _forget_member(self, group: Any) -> None:
        self.members[group] -= 1
        if self.members[group] <= 0:
            del self.members[group]
            self.group_sizes.pop(group, None)


class Steps:
    """The open step of each split, and the number of its next. Not safe between threads by itself."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._open: dict[Split, Step] = {}
        self._numbers: dict[Split, int] = {}

    def get(self, split: Split) -> Step | None:
        """The open step of a split."""
        return self._open.get(split)

    def slots_of(self, ticket: Ticket) -> list[Slot]:
        """The samples of a ticket as far as they are in the open step of its split."""
        step = self._open.get(ticket.split)
        return (
            [slot for slot in step.slots if slot.ticket == ticket.number]
            if step is not None
            else []
        )

    def number(self, split: Split) -> int:
        """The number of the open step, or of the next."""
        step = self._open.get(split)
        return step.number if step is not None else self._numbers.get(split, 0)

    def open(self, split: Split, number: int | None) -> Step:
        """The open step of a split, or a new one; one that tickets have emptied ends at another number.

        Raises:
            InvalidSampleError: Another number than `number` is open, or with several ranks none was given, or it is no
                whole number.
        """
        number = number if number is None else whole_number(number, "step")
        step = self._open.get(split)
        if step is not None and step.is_emptied and number != step.number:
            self.give_up(split)
            step = None
        if step is None:
            if number is None and self._world_size > 1:
                raise InvalidSampleError(
                    "with world_size > 1 submit() needs step=, the same on all ranks"
                )
            step = self._open[split] = Step(
                self.number(split) if number is None else number
            )
            self._numbers[split] = step.number
        elif number is not None and number != step.number:
            raise InvalidSampleError(
                f"step={number}, but step {step.number} of split {split!r} is still open; collect() it first"
            )
        return step

    def give_up(self, split: Split) -> Step | None:
        """Close the open step whatever is in it, and return it; the next has another number."""
        step = self._open.pop(split, None)
        self._numbers[split] = self._numbers.get(split, 0) + 1
        return step

    def take_out(self, split: Split, slots: Sequence[Slot]) -> None:
        """These slots of a ticket are collected; the step stays open for what else is submitted under its number."""
        step = self._open.get(split)
        if step is not None:
            step.remove(slots)
            step.is_emptied = not step.slots

    def close(self, split: Split, slots: Sequence[Slot]) -> None:
        """These slots are collected. What another thread submitted meanwhile is the next `collect()`'s."""
        step = self._open.get(split)
        if step is not None:
            step.remove(slots)
            if step.slots:
                step.submit_s = 0.0
                return
        self.give_up(split)


def whole_number(value: Any, name: str) -> int:
    """`value` as an int. Raises `InvalidSampleError` unless it is a whole number, of Python or numpy."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidSampleError(
            f"{name} must be a whole number, found {value!r} ({type(value).__name__})"
        )
    return int(value)


def check_group_size(group_size: int | None) -> None:
    """Raises `InvalidSampleError` unless a group can have this size."""
    if group_size is not None and whole_number(group_size, "group_size") < 1:
        raise InvalidSampleError(f"group_size must be at least 1, found {group_size}")


def check_groups(
    groups: Sequence[Hashable],
    group_size: int | None,
    reward: RewardSpec,
    world_size: int,
    first: int,
) -> None:
    """Check what a groupwise reward needs of `submit()`; the samples of these groups are numbered from `first`.

    Raises:
        InvalidSampleError: Says which sample, what was found and what is needed.
    """
    needed_by = f"reward {reward.name!r} ({reward.reward_model}) compares the samples of a group"
    if group_size is None and world_size > 1:
        raise InvalidSampleError(
            f"{needed_by}: with world_size > 1 submit() needs group_size="
        )
    for i, group in enumerate(groups):
        if world_size > 1 and not isinstance(group, str | numbers.Integral):
            raise InvalidSampleError(
                f"sample {first + i}: with world_size > 1 group= must be text or an integer, the same on all "
                f"ranks; found a {type(group).__name__}"
            )
