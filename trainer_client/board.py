"""What a client waits for: submitted samples, the outcomes they need, the messages under way, the payloads in use.

A *slot* is one submitted sample in its place; an *entry* is one outcome that is awaited, shared by all slots that need
the same; a *chunk* is a message under way. All changes happen under the board's one lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.messages import Failure, MediaRef, Outcome, SampleRequest
from tasks.rewards import RewardSpec, Split
from tasks.samples import Beside, Sample, beside
from trainer_client.ticket import ChunkRecord, SlotRecord

ELSEWHERE = "of another rank:"
"""Before the name of a chunk whose message another rank sent; there is no request of that name."""

Place = tuple[Split, int]
"""A step of a split."""


@dataclass(slots=True, eq=False)
class Payload:
    """Media bytes in the store under a name of their own; freed when no entry uses them any more."""

    name: str
    digest: str
    num_users: int = 0
    stored: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True, eq=False)
class Slot:
    """One submitted sample in its place (split, step, index)."""

    split: Split
    step: int
    index: int
    group: Any
    sample: Sample | None
    """None once everything is answered, so that its media can go."""
    held: dict[str, Any]
    """Its media by field, as `media.hold` keeps them."""
    rewards: tuple[RewardSpec, ...]
    submitted_at: float
    group_size: int | None = None
    ticket: int = 0
    """Number of the ticket that it is of."""
    entries: dict[str, Entry] | None = None
    """By reward name; None until it is encoded. A groupwise reward's comes when its group is sealed."""
    places: dict[str, int] = field(default_factory=dict)
    """By name of a groupwise reward: which member of its group this is."""
    problem: Failure | None = None
    """Why it cannot be scored at all; then there are no entries."""
    is_given_up: bool = False
    """Nobody waits for it any more: collected, or cancelled, perhaps before it was encoded."""

    @property
    def place(self) -> Place:
        """The step it belongs to."""
        return self.split, self.step

    @property
    def addresses(self) -> dict[str, tuple[str, int, int]] | None:
        """By reward name: address, attempt, place in a group (-1: it is by itself); None until all are known."""
        if self.entries is None or len(self.entries) < len(self.rewards):
            return None
        return {
            name: (e.address, e.attempt, self.places.get(name, -1))
            for name, e in self.entries.items()
        }

    @property
    def is_done(self) -> bool:
        """Whether every reward has its outcome."""
        return all(self.is_done_for(spec.name) for spec in self.rewards)

    def is_done_for(self, reward: str) -> bool:
        """Whether this reward has its outcome."""
        entry = (self.entries or {}).get(reward)
        return self.problem is not None or (
            entry is not None and entry.outcome is not None
        )

    def has_failed_for(self, reward: str) -> bool:
        """Whether the outcome of this reward is there and is a failure."""
        entry = (self.entries or {}).get(reward)
        outcome = entry.outcome if entry is not None else None
        if outcome is not None and outcome.members:
            outcome = outcome.members[self.places[reward]]
        return self.problem is not None or (
            outcome is not None and outcome.failure is not None
        )

    @property
    def known_entries(self) -> list[Entry]:
        """Its entries at this moment: other threads give it more meanwhile."""
        return list((self.entries or {}).values())

    @property
    def is_sent(self) -> bool:
        """Whether all that it needs is in a message, or answered."""
        return self.addresses is not None and all(
            e.outcome is not None or e.chunk is not None for e in self.known_entries
        )

    def record(self) -> SlotRecord:
        """What a pickled ticket keeps of it. What was never put in a message counts as not sent."""
        return SlotRecord(
            self.index,
            self.group,
            self.addresses if self.is_sent else None,
            self.problem,
        )

    def chunk_records(self) -> list[ChunkRecord]:
        """The messages under way for it, those that another rank sent among them."""
        return [
            chunk.record()
            for chunk in (e.chunk for e in self.known_entries)
            if chunk is not None
        ]


@dataclass(slots=True, eq=False)
class Entry:
    """One outcome that is awaited."""

    address: str
    spec: RewardSpec
    prompt: str = ""
    beside: Beside | None = None
    """What travels of the sample beside prompt and media; None of a group."""
    attempt: int = 1
    outcome: Outcome | None = None
    is_hit: bool = False
    """Answered without being sent."""
    media: dict[str, MediaRef | tuple[MediaRef, ...]] = field(default_factory=dict)
    payloads: list[Payload] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    members: tuple[SampleRequest, ...] = ()
    """Of a group: its members in slot order."""
    places: dict[tuple[int, int], int] = field(default_factory=dict)
    """Of a group: (rank, index) of each member to its place."""
    comparisons: tuple[SampleRequest, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    """Of a group whose members are compared two at a time: those requests, and whom each compares."""
    carried: list[Entry] = field(default_factory=list)
    """Of a ranked group: entries of its parts that go with it."""
    group_key: str = ""
    """Of a group of several ranks: where its slots are."""
    sent_number: int = 0
    """Of a group that another rank sent: the number of its message."""
    num_sends: int = 0
    """How often it was put into a message."""
    chunk: Chunk | None = None
    answered_at: float = 0.0
    is_ended: bool = False
    """Answered, or wanted by nobody any more: it uses no payloads."""


@dataclass(slots=True, eq=False)
class Chunk:
    """One message under way, for the entries of it that have no outcome yet."""

    request: str
    label: str
    spec: RewardSpec
    number: int
    entries: list[Entry]
    sent_at: float
    look_at: float
    """When to look next whether it is lost (monotonic)."""
    pause_s: float
    """Wait this long before it is sent again once more."""
    is_missed: bool = False
    """Seen neither answered, claimed nor queued at the last look."""
    was_claimed: bool = False
    """Seen in a task's hands at an earlier look."""
    more_requests: tuple[str, ...] = ()
    """Of a chord: the requests of its header."""
    is_adopted: bool = False
    """Another process sent it; this one does not hold its media."""

    def record(self) -> ChunkRecord:
        """What a pickled ticket keeps of it."""
        addresses = tuple(e.address for e in self.entries)
        return ChunkRecord(
            self.request,
            self.label,
            self.spec.queue,
            self.number,
            self.spec.fingerprint,
            addresses,
        )


class Board:
    """Everything a client process waits for. Safe between threads; `changed` is notified whenever something arrives."""

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._entries: dict[str, Entry] = {}
        self._chunks: dict[str, Chunk] = {}
        self._payloads: dict[str, Payload] = {}
        self._adopted: dict[str, Payload] = {}
        """Payloads that another process stored, by name."""
        self._to_free: list[str] = []
        self.on_answer: Callable[[RewardSpec, Outcome], None] = lambda _spec, _outcome: (
            None
        )
        """Called with each outcome that arrives, outside of the lock."""
        self._num_names = 0
        self.num_unsent = 0
        """Samples accepted and not yet in a message."""
        self.trouble: str | None = None
        """What keeps the threads from going on at the moment (a Redis that is away), for people."""
        self.broken: BaseException | None = None
        """A bug of ours that ended a thread; every wait raises it."""

    # --- slots and entries -----------------------------------------------------------------------

    def join(
        self, slot: Slot, sample: Sample, wanted: Mapping[str, tuple[RewardSpec, str]]
    ) -> list[Entry]:
        """Give an encoded slot its entries; returns those that are new and still have to be looked up and sent.

        One that was given up meanwhile gets none.

        Args:
            wanted: By reward name, its spec and the address of this sample's outcome.
        """
        with self.lock:
            if slot.is_given_up:
                return []
            new, entries = [], {}
            for name, (spec, address) in wanted.items():
                entry = self._entries.get(address)
                if entry is None:
                    entry = self._entries[address] = Entry(
                        address, spec, sample.prompt, beside(sample, spec)
                    )
                    new.append(entry)
                if not any(s is slot for s in entry.slots):
                    entry.slots.append(slot)
                entries[name] = entry
            slot.entries = entries
            return new

    def join_group(
        self, entry: Entry, name: str, members: Mapping[tuple[int, int], Any]
    ) -> Entry:
        """Give the members of a sealed group its entry (or the one that is awaited already); returns that.

        The entry takes over the payloads and carried entries of its members. One that the group had before, with other
        members, is given up. A member that is none of the sealed (one too many) is left alone.
        """
        with self.lock:
            known = self._entries.setdefault(entry.address, entry)
            earlier: dict[str, Entry] = {}
            for place, member in members.items():
                slot = member.slot
                if place not in entry.places:
                    continue
                if slot.is_given_up:
                    self._end(member.holder)
                    continue
                if slot.entries is None or slot.problem is not None:
                    continue
                before = slot.entries.get(name)
                if before is not None and before.outcome is not None:
                    self._end(member.holder)
                    continue
                if before is not None and before is not known:
                    before.slots = [s for s in before.slots if s is not slot]
                    earlier[before.address] = before
                slot.places[name] = entry.places[
                    place
                ]  # of equal members in other places, the order is the same
                slot.entries[name] = (
                    known  # last: with it a ticket that is pickled now counts the slot as sent
                )
                if not any(s is slot for s in known.slots):
                    known.slots.append(slot)
                known.payloads += member.holder.payloads
                member.holder.payloads = []
                known.carried += member.carried
                member.carried = []
            for before in earlier.values():
                self._use_too(
                    known, before.payloads
                )  # which has those of its members that stayed the same
                if not before.slots:
                    self._end(before)
            if not known.slots:
                self._end(known)
            return known

    def fail_reward(self, slot: Slot, spec: RewardSpec, failure: Failure) -> None:
        """One reward of a slot cannot be had; its others can."""
        entry = Entry(address="", spec=spec, slots=[slot])
        with self.lock:
            slot.entries = slot.entries or {}
            slot.entries[spec.name] = entry
        self.answer({entry: Outcome(failure=failure)})

    def release(self, holder: Entry) -> None:
        """Use a holder's payloads no more."""
        with self.lock:
            self._end(holder)

    def adopt(self, slots: Iterable[Slot], chunks: Iterable[Chunk]) -> None:
        """Wait for what another process submitted: slots whose entries are made already, and their messages.

        A message may be for several tickets, and what it brings may be awaited here already.
        """
        with self.changed:
            for slot in slots:
                for name, entry in (slot.entries or {}).items():
                    known = self._entries.setdefault(entry.address, entry)
                    assert slot.entries is not None
                    slot.entries[name] = known
                    if not any(s is slot for s in known.slots):
                        known.slots.append(slot)
            for chunk in chunks:
                awaited = [self._entries.get(e.address) for e in chunk.entries]
                chunk.entries = [
                    e for e in awaited if e is not None and e.chunk is None
                ]
                if chunk.entries:
                    under_way = self._chunks.setdefault(chunk.request, chunk)
                    if under_way is not chunk:
                        under_way.entries += chunk.entries
                    for entry in chunk.entries:
                        entry.chunk = under_way
            self.changed.notify_all()

    def fail(self, slot: Slot, problem: Failure) -> None:
        """A slot that cannot be scored at all."""
        with self.changed:
            slot.problem = problem
            self._close(slot)
            self.changed.notify_all()

    def answer(
        self, outcomes: Mapping[Entry, Outcome], *, is_hit: bool = False
    ) -> None:
        """Outcomes have arrived: tell their slots, free what only they needed."""
        for entry, outcome in outcomes.items():
            self.on_answer(entry.spec, outcome)
        with self.changed:
            for entry, outcome in outcomes.items():
                if entry.outcome is not None:
                    continue
                entry.outcome, entry.is_hit, entry.answered_at = (
                    outcome,
                    is_hit,
                    time.monotonic(),
                )
                self._end(entry)
                for slot in entry.slots:
                    if slot.is_done:
                        self._close(slot)
            self.changed.notify_all()

    def abandon(self, slots: Iterable[Slot]) -> None:
        """Wait no more for these slots; what nobody else needs is freed and not sent (again)."""
        with self.lock:
            for slot in slots:
                slot.is_given_up = True
                for entry in (slot.entries or {}).values():
                    if slot in entry.slots:
                        entry.slots = [s for s in entry.slots if s is not slot]
                    if not entry.slots and entry.outcome is None:
                        self._end(entry)
                self._close(slot)

    def is_wanted(self, entry: Entry) -> bool:
        """Whether someone still waits for this entry."""
        with self.lock:
            return self._entries.get(entry.address) is entry

    # --- chunks ----------------------------------------------------------------------------------

    def send(self, chunks: Iterable[Chunk]) -> None:
        """These messages are under way; an entry belongs to the last one sent for it."""
        with self.changed:
            for chunk in chunks:
                chunk.entries = [e for e in chunk.entries if self.is_wanted(e)]
                for entry in chunk.entries:
                    self._leave_chunk(entry, chunk)
                    entry.num_sends += 1
                if chunk.entries:
                    self._chunks[chunk.request] = chunk
                else:
                    self._to_free += (chunk.request, *chunk.more_requests)
            self.changed.notify_all()

    def watch(self, entries: Iterable[Entry], pause_s: float) -> None:
        """Look after groups whose message another rank sent."""
        now = time.monotonic()
        with self.lock:
            for entry in entries:
                if self.is_wanted(entry):
                    entry.chunk = Chunk(
                        request=f"{ELSEWHERE}{entry.address}",
                        label="",
                        spec=entry.spec,
                        number=entry.sent_number,
                        entries=[entry],
                        sent_at=now,
                        look_at=now + pause_s,
                        pause_s=pause_s,
                    )
                    self._chunks[entry.chunk.request] = entry.chunk

    def chunks(self) -> list[Chunk]:
        """Messages under way that are not answered whole."""
        with self.lock:
            return list(self._chunks.values())

    # --- payloads --------------------------------------------------------------------------------

    def use(self, digest: str, entries: Iterable[Entry]) -> tuple[Payload, bool]:
        """The payload of this content for those of these entries that are still wanted, and whether the caller must
        store it: never where none is."""
        with self.lock:
            users = [entry for entry in entries if not entry.is_ended]
            payload = self._payloads.get(digest)
            is_new = payload is None and bool(users)
            if payload is None:
                payload = Payload(self.new_name(digest), digest)
            if is_new:
                self._payloads[digest] = payload
            for entry in users:
                self._use_too(entry, [payload])
            return payload, is_new

    def adopt_payload(self, name: str, digest: str, entry: Entry) -> None:
        """Let a payload that another process stored live for as long as this entry, or another, needs it."""
        with self.lock:
            if any(payload.name == name for payload in entry.payloads):
                return
            payload = self._adopted.setdefault(name, Payload(name, digest))
            payload.stored.set()
            self._use_too(entry, [payload])
            if entry.is_ended:
                self._end(entry)

    def has_stored(self, payload: Payload) -> None:
        """A payload is in the store, or was not stored since nobody needs it any more."""
        with self.lock:
            payload.stored.set()
            if payload.num_users == 0:  # freed while it was on its way
                self._to_free.append(payload.name)

    def new_name(self, suffix: str) -> str:
        """A name in the payload store that was never used before: freeing an old one takes no new one away."""
        with self.lock:
            self._num_names += 1
            return f"{self.client_id}.{self._num_names}.{suffix}"

    def names_in_use(self) -> list[str]:
        """Everything of ours in the payload store that is still needed."""
        with self.lock:
            mine = {p.name for p in self._payloads.values() if p.stored.is_set()}
            adopted = {
                p.name
                for e in self._entries.values()
                for p in e.payloads
                if p.stored.is_set()
            }
            requests = (
                name
                for c in self._chunks.values()
                for name in (c.request, *c.more_requests)
            )
            return [*(mine | adopted), *requests]

    def take_to_free(self) -> list[str]:
        """Names that nobody needs any more; the caller frees them."""
        with self.lock:
            names, self._to_free = self._to_free, []
            return names

    def free_later(self, names: Iterable[str]) -> None:
        """Names that could not be freed now."""
        with self.lock:
            self._to_free.extend(names)

    # --- threads ---------------------------------------------------------------------------------

    def count_unsent(self, change: int) -> None:
        """Samples were accepted (above 0) or have left in a message (below)."""
        with self.changed:
            self.num_unsent += change
            self.changed.notify_all()

    def break_with(self, error: BaseException) -> None:
        """A thread of ours ended by a bug."""
        with self.changed:
            self.broken = error
            self.changed.notify_all()

    # --- private, under the lock -----------------------------------------------------------------

    @staticmethod
    def _use_too(entry: Entry, payloads: Iterable[Payload]) -> None:
        for payload in payloads:
            payload.num_users += 1
            entry.payloads.append(payload)

    def _end(self, entry: Entry) -> None:
        if self._entries.get(entry.address) is entry:
            del self._entries[entry.address]
        entry.is_ended = True
        self._leave_chunk(entry)
        for payload in entry.payloads:
            payload.num_users -= 1
            if payload.num_users == 0:
                if self._payloads.get(payload.digest) is payload:
                    del self._payloads[payload.digest]
                self._adopted.pop(payload.name, None)
                self._to_free.append(payload.name)
        entry.payloads = []

    def _leave_chunk(self, entry: Entry, other: Chunk | None = None) -> None:
        chunk, entry.chunk = entry.chunk, other
        if chunk is None:
            return
        chunk.entries = [e for e in chunk.entries if e is not entry]
        if not chunk.entries and self._chunks.pop(chunk.request, None) is not None:
            self._to_free += (chunk.request, *chunk.more_requests)

    @staticmethod
    def _close(slot: Slot) -> None:
        slot.sample = None
        slot.held = {}
