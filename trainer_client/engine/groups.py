"""The life of a group, from its first member to its plan: filled, sealed under a digest, given its outcome to await.

On one rank a group is sealed here, once `group_size` members are there or its step is collected. With several ranks its
slots are in Redis (`tasks.groups.GroupSlots`), and whichever rank completes it sends it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from tasks import outcomes
from tasks.groups import Registered, digest, draw_pairs
from tasks.messages import Failure, SampleRequest
from tasks.rewards import RewardSpec, Split
from trainer_client.engine.model import (
    NEVER,
    Awaited,
    GroupPlan,
    Member,
    RankIndex,
    Slot,
    StepKey,
)

OVERDUE_S = 1.0
"""While someone waits, pointwise samples wait at most so long for the group that would carry them."""

SharedKey = Callable[[Split, int, str, str], str]
"""Where a group's slots over ranks are: of split, step, the reward's fingerprint, and a name of the group."""


@dataclass(slots=True, eq=False)
class Group:
    """A group of one groupwise reward: on one rank until it is sealed, with several until its step is over."""

    spec: RewardSpec
    split: Split
    step: int
    id: Any
    size: int | None
    opened_at: float
    shared_key: str = ""
    """Where its slots over ranks are in Redis; empty on one rank."""
    members: dict[RankIndex, Member] = field(default_factory=dict)
    """Those of this rank."""
    digest: str = ""
    awaited: Awaited | None = None
    """Its outcome, once it is sealed."""
    is_reading: bool = False
    """Its members are being read from Redis."""

    @property
    def step_key(self) -> StepKey:
        """The step that it belongs to."""
        return self.split, self.step

    @property
    def is_answered(self) -> bool:
        """Whether its outcome is known here."""
        return self.awaited is not None and self.awaited.outcome is not None

    def has_answer_of(self, address: str) -> bool:
        """Whether its outcome at this address is known here. Asked for once more it would be another attempt's."""
        awaited = self.awaited
        if awaited is None or awaited.outcome is None:
            return False
        return awaited.address == address

    @property
    def carries(self) -> bool:
        """Whether outcomes of its members wait for it."""
        return any(member.carried for member in self.members.values())

    @property
    def is_full(self) -> bool:
        """Whether all members are there, those of this rank alone."""
        return self.size is not None and len(self.members) >= self.size

    @property
    def is_awaited(self) -> bool:
        """Whether a member here waits for its outcome; also one that comes after the others have it."""
        if self.is_answered:
            return not all(self.has_joined(m) for m in self.members.values())
        return bool(self.members)

    def has_joined(self, member: Member) -> bool:
        """Whether a member has the group's outcome to await; not so one that came after the group was sealed: with what
        a process before this one had submitted."""
        if member.slot.problem is not None or member.slot.is_given_up:
            return True
        return self.spec.name in member.slot.awaited


class Groups:
    """The groups of this rank that wait for members, or for the other ranks.

    Args:
        shared_key: Of several ranks, names where the slots of a group are in Redis. None on one rank.
    """

    def __init__(self, run: str, rank: int, shared_key: SharedKey | None) -> None:
        self._run, self._rank, self._shared_key = run, rank, shared_key
        self._groups: dict[tuple[Any, ...], Group] = {}
        self._by_shared_key: dict[str, Group] = {}
        self._given_up: dict[tuple[Split, int, Any], Failure] = {}
        """By split, step and id, of groups that stay incomplete: what their members are told."""

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(list(self._groups.values()))

    @property
    def is_shared(self) -> bool:
        """Whether other ranks have members of the same groups."""
        return self._shared_key is not None

    @property
    def may_carry(self) -> bool:
        """Whether the outcomes of its parts wait for a group: on one rank it is complete soon."""
        return self._shared_key is None

    def add(self, member: Member, now: float) -> Group:
        """A member's media are stored, or it cannot be scored; returns its group."""
        slot = member.slot
        key = (slot.split, slot.step, member.spec.name, slot.group)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = self._new_group(member, now)
            if group.shared_key:
                self._by_shared_key[group.shared_key] = group
        group.members[self._rank, slot.index] = member
        return group

    def position_of(self, member: Member) -> RankIndex:
        """Where this rank submitted a member."""
        return self._rank, member.slot.index

    def of_member(self, member: Member) -> Group | None:
        """The group that a member is in, while it is."""
        slot = member.slot
        key = (slot.split, slot.step, member.spec.name, slot.group)
        group = self._groups.get(key)
        if group is None or group.members.get(self.position_of(member)) is not member:
            return None
        return group

    def of_shared_key(self, shared_key: str) -> Group | None:
        """The group whose slots over ranks are there, while it is remembered."""
        return self._by_shared_key.get(shared_key)

    def why_given_up(self, slot: Slot) -> Failure | None:
        """What the members of a slot's group are told, if that stays incomplete."""
        return self._given_up.get((slot.split, slot.step, slot.group))

    def of_unknown_size(self, steps: Set[StepKey]) -> list[Group]:
        """Groups of these steps that are as large as they are."""
        if self.is_shared:
            return []
        return [g for g in self if g.size is None and g.step_key in steps]

    def give_up_incomplete(
        self, split: Split, step: int, words: Mapping[Any, str]
    ) -> list[tuple[Group, Member, Failure]]:
        """These groups stay incomplete: their members, and those that are still on their way, have no groupwise reward.

        Returns:
            The members that are there, with their group, and what each is told.
        """
        reasons = {
            id_: Failure(kind="invalid", message=text) for id_, text in words.items()
        }
        for id_, reason in reasons.items():
            self._given_up[split, step, id_] = reason

        told = []
        for group in self:
            is_concerned = group.step_key == (split, step) and group.id in reasons
            if not is_concerned or group.awaited is not None:
                continue
            for member in group.members.values():
                told.append((group, member, reasons[group.id]))
        return told

    def take_overdue(self, now: float) -> list[Awaited]:
        """Outcomes whose group does not get full: they go by themselves."""
        taken: list[Awaited] = []
        for group in self:
            if now < group.opened_at + OVERDUE_S:
                continue
            for member in group.members.values():
                taken += member.carried
                member.carried = []
        return taken

    def overdue_at(self) -> float:
        """When outcomes that wait for their group next go by themselves."""
        times = [group.opened_at + OVERDUE_S for group in self if group.carries]
        return min(times, default=NEVER)

    def unanswered(self) -> list[Group]:
        """Of several ranks, those with members here that wait for the group's outcome."""
        return [group for group in self if group.is_awaited]

    def answered(self) -> list[Group]:
        """Of several ranks, those whose outcome this rank has while others may not."""
        return [g for g in self if g.shared_key and g.is_answered]

    def seal(self, group: Group) -> Awaited:
        """Seal a group of one rank with the members that it has; returns the outcome that they await."""
        members = dict(sorted(group.members.items()))
        group.digest = digest([member.key for member in members.values()])
        known = {
            position: (member.key, _request_of(member))
            for position, member in members.items()
        }
        self._forget_group(group)
        return self._awaited_of(group, known)

    def seal_shared(
        self, group: Group, members: Mapping[RankIndex, tuple[str, SampleRequest]]
    ) -> Awaited:
        """A group that all ranks together have completed, or completed anew with another member."""
        group.digest = digest([key for key, _ in members.values()])
        known = dict(members)
        # What Redis has of a member of ours may be from before this rank was started again, and name media of
        # the process that is gone: nobody could store them again.
        for position, member in group.members.items():
            key, _ = known.get(position, ("", None))
            if key == member.key and member.request is not None:
                known[position] = (key, member.request)
        return self._awaited_of(group, known)

    def refuse(self, group: Group, member: Member, found: Registered) -> Failure:
        """Take out a member that its group does not take; returns what it is told."""
        group.members.pop(self.position_of(member), None)
        where = f"run {self._run!r}, step {group.step}, group {group.id!r}"
        reasons = {
            "full": (
                f"it has its {group.size} members already, this sample is one more; a prompt that comes twice in a "
                "step, over all ranks, needs another group= each time"
            ),
            "size": (
                f"group_size={group.size} here, another rank said group_size={found.num_members}"
            ),
            "scored": (
                f"the group was scored with another sample in this slot (rank {self._rank}, "
                f"sample {member.slot.index}); give this start of the job a launch= of its own"
            ),
        }
        return Failure(kind="invalid", message=f"{where}: {reasons[found.state]}")

    def forget(self, slots: Collection[Slot]) -> list[Member]:
        """These slots are collected, or given up; returns the members that they were."""
        gone: list[Member] = []
        wanted = set(slots)
        for slot in slots:
            self._given_up.pop((slot.split, slot.step, slot.group), None)
        for group in self:
            for position, member in list(group.members.items()):
                if member.slot in wanted:
                    gone.append(member)
                    del group.members[position]
            if not group.members:
                self._forget_group(group)
        return gone

    def why_open(
        self, slot: Slot, reward: str, others: Sequence[RankIndex] = ()
    ) -> str | None:
        """If a slot's group is not sealed since members are missing: which are there, as far as is known.

        Args:
            others: Slots over ranks that are filled, as Redis said when it was last asked.
        """
        group = self._groups.get((slot.split, slot.step, reward, slot.group))
        if group is None or group.awaited is not None:
            return None
        positions = sorted({*group.members, *others})
        if group.size is None or len(positions) >= group.size:
            return None  # no member is missing: it waits for something else
        indices_of: dict[int, list[int]] = {}
        for rank, index in positions:
            indices_of.setdefault(rank, []).append(index)
        there = "; ".join(
            f"rank {rank}: samples {', '.join(map(str, indices))}"
            for rank, indices in indices_of.items()
        )
        return (
            f"group {group.id!r} of step {group.step} has {len(positions)} of {group.size} members, "
            f"{group.size - len(positions)} missing ({there} are there)"
        )

    def name_shared_key(self, slot: Slot, spec: RewardSpec) -> str:
        """Where the slots of a slot's group are in Redis, also of one that is not remembered; empty on one rank."""
        if self._shared_key is None:
            return ""
        name = hashlib.sha256(_text_of(slot.group).encode()).hexdigest()[:16]
        return self._shared_key(slot.split, slot.step, spec.fingerprint, name)

    def shared_key_of(self, slot: Slot, reward: str) -> str:
        """Where the slots of a slot's group are in Redis; empty if it has none, or none any more."""
        group = self._groups.get((slot.split, slot.step, reward, slot.group))
        return group.shared_key if group is not None else ""

    # --- private ---------------------------------------------------------------------

    def _new_group(self, member: Member, now: float) -> Group:
        slot, spec = member.slot, member.spec
        return Group(
            spec=spec,
            split=slot.split,
            step=slot.step,
            id=slot.group,
            size=slot.group_size,
            opened_at=now,
            shared_key=self.name_shared_key(slot, spec),
        )

    def _forget_group(self, group: Group) -> None:
        key = (group.split, group.step, group.spec.name, group.id)
        if self._groups.get(key) is group:
            del self._groups[key]
        self._by_shared_key.pop(group.shared_key, None)

    def _awaited_of(
        self, group: Group, members: Mapping[RankIndex, tuple[str, SampleRequest]]
    ) -> Awaited:
        spec = group.spec
        requests = tuple(request for _, request in members.values())
        plan = GroupPlan(
            members=requests,
            index_of={position: i for i, position in enumerate(members)},
            shared_key=group.shared_key,
        )
        if spec.how == "wins":
            keys = [key for key, _ in members.values()]
            self._draw_comparisons(plan, spec, group.digest, keys)
        address = outcomes.address(self._run, spec.fingerprint, group.digest)
        return Awaited(address, spec, group=plan)

    def _draw_comparisons(
        self, plan: GroupPlan, spec: RewardSpec, group_digest: str, keys: Sequence[str]
    ) -> None:
        """Which of the members that can be scored are compared with each other, and what a worker is asked of each."""
        fit = [i for i, one in enumerate(plan.members) if one.failure is None]
        drawn = draw_pairs(group_digest, len(fit), spec.options["opponents"])
        plan.pairs = tuple((fit[a], fit[b]) for a, b in drawn)
        comparisons = []
        for a, b in plan.pairs:
            key = hashlib.sha256(f"{keys[a]} {keys[b]}".encode()).hexdigest()[:32]
            address = outcomes.address(self._run, spec.fingerprint, key)
            comparisons.append(_comparison(address, plan.members[a], plan.members[b]))
        plan.comparisons = tuple(comparisons)


def _request_of(member: Member) -> SampleRequest:
    assert member.request is not None, "a member has its request before it is added"
    return member.request


def _text_of(group: Any) -> str:
    """The same for a group's id on all ranks, whatever kind of text or integer each has."""
    return f"text {group}" if isinstance(group, str) else f"integer {int(group)}"


def _comparison(
    address: str, first: SampleRequest, second: SampleRequest
) -> SampleRequest:
    """Two members as one sample of the judge that compares them: each of its media fields has those of both."""
    both: dict[str, Any] = {}
    for name, ref in first.media.items():
        if name in second.media and not isinstance(ref, tuple):
            both[name] = (ref, second.media[name])
    return SampleRequest(
        address=address, prompt=first.prompt, media=both, attempt=first.attempt
    )
