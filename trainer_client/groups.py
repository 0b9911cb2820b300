"""Groups being filled: members of one prompt come together, are sealed under a digest, and go as one entry.

On one rank a group is sealed here, once `group_size` members are there or the step is collected. With several ranks
its slots are in Redis (`tasks.groups.GroupSlots`), and whichever rank completes it sends it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks import outcomes
from tasks.groups import GroupSlots, Registered, digest, draw_pairs
from tasks.messages import Failure, SampleRequest
from tasks.outcomes import ClientOutcomes
from tasks.rewards import RewardSpec, Split
from trainer_client.board import Board, Chunk, Entry, Place, Slot

OVERDUE_S = 1.0
"""While someone waits, pointwise samples wait at most so long for the group that would carry them."""

SlotPlace = tuple[int, int]
"""(rank, index in the step of that rank); groups are in this order."""


@dataclass(slots=True, eq=False)
class Member:
    """One sample of this rank in a group."""

    slot: Slot
    key: str
    request: SampleRequest
    holder: Entry
    """Uses its payloads until the group has an entry of its own."""
    carried: list[Entry] = field(default_factory=list)
    """Entries of the same sample for the reward that is ranked: they go with the group, not by themselves."""


@dataclass(slots=True, eq=False)
class Group:
    """A group of one groupwise reward: on one rank until it is sealed, with several until its step is over."""

    spec: RewardSpec
    split: Split
    step: int
    id: Any
    size: int | None
    key: str
    """Where its slots are in Redis; empty on one rank."""
    members: dict[SlotPlace, Member] = field(default_factory=dict)
    opened_at: float = field(default_factory=time.monotonic)
    digest: str = ""
    entry: Entry | None = None
    places_seen: list[SlotPlace] = field(default_factory=list)
    """Slots that were filled, by this rank and others, when it was last asked."""

    @property
    def is_answered(self) -> bool:
        """Whether its outcome is known here."""
        return self.entry is not None and self.entry.outcome is not None


class Groups:
    """The groups of a client that wait for members. Safe between threads; calls with several ranks ask Redis."""

    def __init__(
        self, board: Board, run: str, rank: int, slots: GroupSlots | None
    ) -> None:
        self._board, self._run, self._rank, self._slots = board, run, rank, slots
        self._lock = threading.Lock()
        self._groups: dict[tuple[Any, ...], Group] = {}
        self._given_up: dict[tuple[Split, int, Any], Failure] = {}
        """By split, step and id, of groups that stay incomplete: what their members are told."""

    @property
    def may_carry(self) -> bool:
        """Whether entries of the ranked reward wait for their group: on one rank it is complete soon."""
        return self._slots is None

    def add(self, spec: RewardSpec, member: Member) -> list[Entry]:
        """A member has been encoded (or cannot be); returns the group's entry if that seals it."""
        slot = member.slot
        with self._lock:
            if slot.is_given_up:  # meanwhile; `forget` came before
                self._board.release(member.holder)
                return []
            group = self._groups.setdefault(
                (slot.split, slot.step, spec.name, slot.group),
                self._new_group(spec, slot),
            )
            group.members[self._rank, slot.index] = member
            is_full = group.size is not None and len(group.members) >= group.size
            given_up = self._given_up.get((slot.split, slot.step, slot.group))
        if given_up is not None:
            self._board.fail_reward(slot, spec, given_up)
            return []
        if self._slots is not None:
            return self._register(group, [member])
        return self._seal_here([group]) if is_full else []

    def release(self, places: Container[Place]) -> list[Entry]:
        """Someone waits in `collect()` for these steps: their groups of unknown size are as large as they are."""
        if self._slots is not None:
            return []
        with self._lock:
            groups = [
                g
                for g in self._groups.values()
                if g.size is None and (g.split, g.step) in places
            ]
        return self._seal_here(groups)

    def give_up(self, split: Split, step: int, incomplete: Mapping[Any, str]) -> None:
        """These groups (with the words for each) stay incomplete: their members have no groupwise reward, those that
        are still on their way here too."""
        reasons = {
            id_: Failure(kind="invalid", message=words)
            for id_, words in incomplete.items()
        }
        with self._lock:
            self._given_up.update(
                {(split, step, id_): reason for id_, reason in reasons.items()}
            )
            groups = [
                g
                for g in self._groups.values()
                if (g.split, g.step) == (split, step) and g.id in reasons
            ]
            members = [
                (g, member)
                for g in groups
                if g.entry is None
                for member in g.members.values()
            ]
        for group, member in members:
            self._board.fail_reward(member.slot, group.spec, reasons[group.id])

    def take_overdue(self) -> list[Entry]:
        """Carried entries whose group does not get full: they go by themselves."""
        with self._lock:
            late = [
                g
                for g in self._groups.values()
                if time.monotonic() - g.opened_at > OVERDUE_S
            ]
            taken = [e for g in late for m in g.members.values() for e in m.carried]
            for group in late:
                for member in group.members.values():
                    member.carried = []
            return taken

    def poll(self, *, register: bool) -> list[Entry]:
        """Several ranks: ask which groups others have sealed; `register` puts our members there again, after a Redis
        that was emptied. Returns entries that are new here."""
        if self._slots is None:
            return []
        with self._lock:
            groups = [
                g for g in self._groups.values() if g.members and not g.is_answered
            ]
        new = (
            [e for g in groups for e in self._register(g, list(g.members.values()))]
            if register
            else []
        )
        for group, found in zip(
            groups, self._slots.digests([g.key for g in groups]), strict=True
        ):
            if found and (
                found != group.digest or _is_unjoined(group, group.members.values())
            ):
                new += self._seal_shared(group, found)
        return new

    def put_back_answered(self, results: ClientOutcomes) -> None:
        """Several ranks: put what this rank has its answer of into a Redis that was emptied. Others may have none yet,
        and the media of this rank's members are freed."""
        if self._slots is None:
            return
        with self._lock:
            groups = [
                (g, g.entry, list(g.members.values()))
                for g in self._groups.values()
                if g.entry is not None
            ]
        answered = [
            (g, entry, entry.outcome, members)
            for g, entry, members in groups
            if entry.outcome is not None
        ]
        are_there = results.are_there([entry.address for _, entry, _, _ in answered])
        digests = self._slots.digests([group.key for group, *_ in answered])
        for (group, entry, outcome, members), is_there, found in zip(
            answered, are_there, digests, strict=True
        ):
            if not is_there:
                results.put_back(entry.address, outcome)
            if not found:
                self._slots.put_back(
                    group.key,
                    group.digest,
                    self._rank,
                    self._board.client_id,
                    entry.attempt,
                )
                self._register(group, members)

    def ask(self, entry: Entry) -> None:
        """Let the entry of a group of several ranks ask for the attempt that the others ask for, and know the message
        that one has sent."""
        assert self._slots is not None
        entry.attempt, entry.sent_number = self._slots.ask(
            entry.group_key,
            outcomes.key_of(entry.address),
            self._rank,
            self._board.client_id,
            entry.attempt,
        )

    def tell_number(self, chunk: Chunk) -> None:
        """Tell the other ranks which message was sent for a group."""
        for entry in chunk.entries:
            if self._slots is not None and entry.group_key:
                self._slots.set_number(entry.group_key, chunk.number)

    def look_at_slots(self) -> None:
        """Ask which slots of incomplete groups other ranks have filled, for `why_open`. May raise what Redis does."""
        with self._lock:
            groups = [g for g in self._groups.values() if g.entry is None]
        if self._slots is not None:
            for group, places in zip(
                groups, self._slots.filled_slots([g.key for g in groups]), strict=True
            ):
                group.places_seen = places

    def why_open(self, slot: Slot, spec: RewardSpec) -> str | None:
        """If a slot's group has no entry yet since members are missing: which are there, as far as is known."""
        group = self._groups.get((slot.split, slot.step, spec.name, slot.group))
        if group is None or group.entry is not None:
            return None
        places = sorted({*group.members, *group.places_seen})
        if (
            group.size is None or len(places) >= group.size
        ):  # no member is missing: it waits for something else
            return None
        ranks: dict[int, list[int]] = {}
        for rank, index in places:
            ranks.setdefault(rank, []).append(index)
        there = "; ".join(
            f"rank {rank}: samples {', '.join(map(str, found))}"
            for rank, found in ranks.items()
        )
        return (
            f"group {group.id!r} of step {group.step} has {len(places)} of {group.size} members, "
            f"{group.size - len(places)} missing ({there} are there)"
        )

    def forget(self, slots: Iterable[Slot]) -> None:
        """These slots are collected, or given up."""
        slots = list(slots)
        gone = set(map(id, slots))
        with self._lock:
            for slot in slots:
                self._given_up.pop((slot.split, slot.step, slot.group), None)
            for key, group in list(self._groups.items()):
                left = {
                    p: m for p, m in group.members.items() if id(m.slot) not in gone
                }
                for member in group.members.values():
                    if id(member.slot) in gone:
                        self._board.release(member.holder)
                group.members = left
                if not left:
                    del self._groups[key]

    # --- private ---------------------------------------------------------------------------------

    def _new_group(self, spec: RewardSpec, slot: Slot) -> Group:
        key = ""
        if self._slots is not None:
            name = hashlib.sha256(_text_of(slot.group).encode()).hexdigest()[:16]
            key = self._slots.key(slot.split, slot.step, spec.fingerprint, name)
        return Group(spec, slot.split, slot.step, slot.group, slot.group_size, key)

    def _seal_here(self, groups: Sequence[Group]) -> list[Entry]:
        new = []
        for group in groups:
            with self._lock:
                if group.entry is not None:
                    continue
                members = dict(sorted(group.members.items()))
                group.digest = digest([m.key for m in members.values()])
                entry = group.entry = self._entry(
                    group, {p: (m.key, m.request) for p, m in members.items()}
                )
                self._groups.pop(
                    (group.split, group.step, group.spec.name, group.id), None
                )
            new += self._join(group, entry, members)
        return new

    def _register(self, group: Group, members: Sequence[Member]) -> list[Entry]:
        """Put members into their slots; the entry if that completes the group."""
        assert self._slots is not None
        for member in members:
            place = (self._rank, member.slot.index)
            found = self._slots.register(
                group.key,
                place,
                member.key,
                member.request,
                group.size or 0,
                group.spec.fingerprint,
            )
            if found.state in ("full", "scored", "size"):
                self._refuse(group, member, found)
            elif found.state == "sealed" and (
                found.digest != group.digest or _is_unjoined(group, [member])
            ):
                return self._seal_shared(group, found.digest)
        return []

    def _refuse(self, group: Group, member: Member, found: Registered) -> None:
        where = f"run {self._run!r}, step {group.step}, group {group.id!r}"
        reasons = {
            "full": f"it has its {group.size} members already, this sample is one more; a prompt that comes twice in a "
            "step, over all ranks, needs another group= each time",
            "size": f"group_size={group.size} here, another rank said group_size={found.num_members}",
            "scored": f"the group was scored with another sample in this slot (rank {self._rank}, "
            f"sample {member.slot.index}); give this start of the job a launch= of its own",
        }
        message = f"{where}: {reasons[found.state]}"
        with self._lock:
            group.members.pop((self._rank, member.slot.index), None)
        self._board.fail_reward(
            member.slot, group.spec, Failure(kind="invalid", message=message)
        )
        self._board.release(member.holder)

    def _seal_shared(self, group: Group, found: str) -> list[Entry]:
        """A group that all ranks together have completed, or completed anew with another member."""
        assert self._slots is not None
        members = self._slots.members(group.key)
        if digest([key for key, _ in members.values()]) != found:
            return []  # changed between the two questions: the next one tells
        with self._lock:
            group.digest = found
            entry = group.entry = self._entry(group, members)
            own = dict(group.members)
        return self._join(group, entry, own)

    def _entry(
        self, group: Group, members: dict[SlotPlace, tuple[str, SampleRequest]]
    ) -> Entry:
        spec = group.spec
        assert group.digest, "a group has its digest before its entry"
        entry = Entry(outcomes.address(self._run, spec.fingerprint, group.digest), spec)
        entry.members = tuple(request for _, request in members.values())
        entry.places = {place: i for i, place in enumerate(members)}
        entry.group_key = group.key
        if spec.how == "wins":
            keys = [key for key, _ in members.values()]
            fit = [i for i, m in enumerate(entry.members) if m.failure is None]
            entry.pairs = tuple(
                (fit[a], fit[b])
                for a, b in draw_pairs(
                    group.digest, len(fit), spec.options["opponents"]
                )
            )
            entry.comparisons = tuple(
                _comparison(
                    self._run,
                    spec,
                    entry.members[a],
                    entry.members[b],
                    keys[a],
                    keys[b],
                )
                for a, b in entry.pairs
            )
        return entry

    def _join(
        self, group: Group, entry: Entry, members: Mapping[SlotPlace, Member]
    ) -> list[Entry]:
        """Give the group's members of this rank its entry; returns it if it is new. Another thread may be at it too."""
        known = self._board.join_group(entry, group.spec.name, members)
        with self._lock:
            if group.entry is entry:
                group.entry = known
        return [known] if known is entry else []


def _text_of(group: Any) -> str:
    """The same for a group's id on all ranks, whatever kind of text or integer each has."""
    return f"text {group}" if isinstance(group, str) else f"integer {int(group)}"


def _is_unjoined(group: Group, members: Iterable[Member]) -> bool:
    """Whether some came after the group had its entry: it was sealed with what a process before this one submitted."""
    return any(
        group.spec.name not in (m.slot.entries or {})
        for m in list(members)
        if m.slot.problem is None
    )


def _comparison(
    run: str,
    spec: RewardSpec,
    first: SampleRequest,
    second: SampleRequest,
    first_key: str,
    second_key: str,
) -> SampleRequest:
    """Two members as one sample of the judge that compares them: each of its media fields has those of both."""
    key = hashlib.sha256(f"{first_key} {second_key}".encode()).hexdigest()[:32]
    media: dict[str, Any] = {
        name: (ref, second.media[name])
        for name, ref in first.media.items()
        if name in second.media and not isinstance(ref, tuple)
    }
    return SampleRequest(
        address=outcomes.address(run, spec.fingerprint, key),
        prompt=first.prompt,
        media=media,
        attempt=first.attempt,
    )
