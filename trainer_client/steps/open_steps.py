"""The open steps of a client: what was submitted in each split and not yet collected, and the sizes of its groups."""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.errors import InvalidSampleError
from tasks.rewards import RewardSpec, Split
from tasks.samples import Sample
from trainer_client.engine.model import Slot
from trainer_client.ticket import Ticket


@dataclass(slots=True)
class OpenStep:
    """What was submitted and not yet collected in one split."""

    number: int
    slots: list[Slot] = field(default_factory=list)
    num_submitted: int = 0
    submit_s: float = 0.0
    """Seconds that `submit()` held its callers, in all."""
    members: Counter[Any] = field(default_factory=Counter)
    """Samples of each group that this rank has submitted."""
    group_sizes: dict[Any, int | None] = field(default_factory=dict)
    prompts: dict[Any, tuple[str, ...]] = field(default_factory=dict)
    """The different prompts of each group, two of them at most."""
    _is_strict: bool = False
    is_emptied: bool = False
    """Tickets have collected all of it: the step ends unless more is submitted under its number."""

    def count_members(
        self,
        samples: Sequence[Sample | Slot],
        group_size: int | None,
        *,
        is_strict: bool = True,
    ) -> None:
        """Count samples into their groups, as far as the sizes of the groups are known.

        Args:
            is_strict: For groupwise rewards: a group is given its size in each call or in none, and its members count
                until the step ends, also those that tickets have collected. Otherwise a group is what is submitted and
                not yet collected.

        Raises:
            InvalidSampleError: A group would have more members than its size, or is given two sizes. Nothing is
                counted then.
        """
        groups = Counter(sample.group for sample in samples)
        sizes = dict(self.group_sizes)
        members = Counter(self.members)
        for group, num_new in groups.items():
            known = sizes.get(group, group_size)
            self._check_size(group, known, group_size, is_strict)
            size = group_size if known is None else known

            # For groupwise rewards "no size" is kept too, so that a later call that gives one is refused.
            if is_strict or size is not None:
                sizes[group] = size
            if group in sizes:
                members[group] += num_new
            if size is not None and members[group] > size:
                raise InvalidSampleError(
                    f"group {group!r} of step {self.number} would have {members[group]} members, group_size={size}; a "
                    "prompt that comes twice in a step needs another group= each time"
                )
        self._is_strict = is_strict
        self.members = members
        self.group_sizes = sizes

    @staticmethod
    def _check_size(
        group: Any, known: int | None, given: int | None, is_strict: bool
    ) -> None:
        """Raises `InvalidSampleError` if a group is given another size than it has."""
        both_are_known = known is not None and given is not None
        if known != given and (is_strict or both_are_known):
            raise InvalidSampleError(
                f"group {group!r} has group_size={known}, found group_size={given}"
            )

    def find_mixed_group(self, slots: Sequence[Slot]) -> Hashable | None:
        """A group of which these slots have another prompt than it had; None if there is none."""
        mixed = None
        for slot in slots:
            prompt = slot.sample.prompt if slot.sample is not None else ""
            known = self.prompts.setdefault(slot.group, (prompt,))
            if prompt not in known:
                self.prompts[slot.group] = (known[0], prompt)
                mixed = slot.group
        return mixed

    def add(self, slots: Sequence[Slot], held_s: float) -> None:
        """Add slots, whose `submit()` held its caller for `held_s` seconds."""
        self.slots += slots
        self.is_emptied = False
        self.num_submitted += len(slots)
        self.submit_s += held_s

    def remove(self, slots: Iterable[Slot]) -> None:
        """Remove slots, which are collected."""
        collected = set(slots)
        self.slots = [slot for slot in self.slots if slot not in collected]
        # A step whose tickets overlap is never empty. What it knows of groups must not grow with them.
        for slot in collected:
            self.prompts.pop(slot.group, None)
            if not self._is_strict:
                self._forget_member(slot.group)

    def _forget_member(self, group: Any) -> None:
        self.members[group] -= 1
        if self.members[group] <= 0:
            del self.members[group]
            self.group_sizes.pop(group, None)


class OpenSteps:
    """The open step of each split, and the number of its next. Not safe between threads by itself."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._open: dict[Split, OpenStep] = {}
        self._numbers: dict[Split, int] = {}

    def __iter__(self) -> Iterator[OpenStep]:
        return iter(list(self._open.values()))

    def get(self, split: Split) -> OpenStep | None:
        """The open step of a split."""
        return self._open.get(split)

    def slots_of(self, ticket: Ticket) -> list[Slot]:
        """The samples of a ticket as far as they are in the open step of its split."""
        step = self._open.get(ticket.split)
        if step is None:
            return []
        return [slot for slot in step.slots if slot.ticket == ticket.number]

    def number(self, split: Split) -> int:
        """The number of the open step, or of the next."""
        step = self._open.get(split)
        return step.number if step is not None else self._numbers.get(split, 0)

    def open(self, split: Split, number: int | None) -> OpenStep:
        """The open step of a split, or a new one; a step that tickets have emptied ends at another number.

        Raises:
            InvalidSampleError: Another step than `number` is open, or with several ranks no number was given, or it is
                not a whole number.
        """
        if number is not None:
            number = whole_number(number, "step")
        step = self._open.get(split)
        if step is not None and step.is_emptied and number != step.number:
            self.give_up(split)
            step = None

        if step is None:
            return self._open_new(split, number)
        if number is not None and number != step.number:
            raise InvalidSampleError(
                f"step={number}, but step {step.number} of split {split!r} is still open; collect() it first"
            )
        return step

    def _open_new(self, split: Split, number: int | None) -> OpenStep:
        if number is None and self._world_size > 1:
            raise InvalidSampleError(
                "with world_size > 1 submit() needs step=, the same on all ranks"
            )
        step = OpenStep(self.number(split) if number is None else number)
        self._open[split] = step
        self._numbers[split] = step.number
        return step

    def give_up(self, split: Split) -> OpenStep | None:
        """Close the open step whatever is in it, and return it; the next has another number."""
        step = self._open.pop(split, None)
        self._numbers[split] = self._numbers.get(split, 0) + 1
        return step

    def take_out(self, split: Split, slots: Sequence[Slot]) -> None:
        """Remove the slots of a ticket, which are collected; the step stays open for what else is submitted to it."""
        step = self._open.get(split)
        if step is not None:
            step.remove(slots)
            step.is_emptied = not step.slots

    def close(self, split: Split, slots: Sequence[Slot]) -> None:
        """Remove these slots, which are collected, and close the step unless another thread has submitted meanwhile.

        The samples of that thread are left to the next `collect()`.
        """
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
    """Check what a groupwise reward needs of `submit()`.

    Args:
        groups: Of each sample, numbered from `first`.

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
