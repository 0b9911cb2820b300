"""What the engine keeps: submitted samples, the outcomes that they await, the messages under way, the payloads in use.

Plain data. Only `EngineState` writes it, within `apply`. Other threads read what a `Slot` says of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.messages import Failure, MediaRef, Outcome, SampleRequest
from tasks.rewards import RewardSpec, Split
from tasks.samples import Beside, Sample
from trainer_client.engine.states import (
    ENDED,
    PayloadStage,
    SentBy,
    SlotStage,
    State,
)
from trainer_client.ticket import DeliveryRecord, SlotRecord, SlotSnapshot

NEVER = float("inf")
"""The time at which something is due that is not due at all."""

StepKey = tuple[Split, int]
"""A step of a split."""

RankIndex = tuple[int, int]
"""(rank, index in the step of that rank): where a member of a group was submitted. Groups are in this order."""


@dataclass(slots=True, eq=False)
class Payload:
    """Media bytes that are, or will be, in the store under a name of their own."""

    name: str
    digest: str
    stage: PayloadStage
    content: Any = None
    """The bytes (`encoding.Content`), until they are stored."""
    users: dict[PayloadUser, None] = field(default_factory=dict)
    """Whoever needs it. Without users it is freed, under way at the moment it has arrived."""
    is_foreign: bool = False
    """Whether an earlier process has stored it."""


@dataclass(slots=True, eq=False)
class PayloadUser:
    """What needs payloads: an awaited outcome, or a member of a group that is not complete."""

    payloads: list[Payload] = field(default_factory=list, kw_only=True)
    source: Slot | None = field(default=None, kw_only=True)
    """The sample whose encoding made it, until its media are stored."""

    @property
    def has_media_stored(self) -> bool:
        """Whether all that it needs is in the store."""
        return all(p.stage is PayloadStage.STORED for p in self.payloads)


@dataclass(slots=True, eq=False)
class GroupPlan:
    """How the outcome of a sealed group is computed."""

    members: tuple[SampleRequest, ...]
    """In slot order."""
    index_of: dict[RankIndex, int]
    """Which member was submitted where."""
    shared_key: str = ""
    """Where its slots over ranks are in Redis; empty on one rank."""
    comparisons: tuple[SampleRequest, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    """Of members that are compared two at a time: those requests, and whom each compares."""
    carried: list[Awaited] = field(default_factory=list)
    """Outcomes of its parts that somebody awaits too: the group's message is theirs as well."""

    @property
    def parts(self) -> tuple[SampleRequest, ...]:
        """Whose claims say that a worker has the group in hand."""
        return self.comparisons or self.members

    def num_scored(self, how: str) -> int:
        """How many requests are scored by themselves before the group's outcome is made of theirs."""
        if how == "wins":
            return len(self.comparisons)
        return sum(member.failure is None for member in self.members)

    def take_media_of(self, newer: GroupPlan) -> None:
        """The same members are stored under other names by now: a rank was started again, or came late."""
        self.members = _with_attempts_of(self.members, newer.members)
        self.comparisons = _with_attempts_of(self.comparisons, newer.comparisons)


def _with_attempts_of(
    known: tuple[SampleRequest, ...], newer: tuple[SampleRequest, ...]
) -> tuple[SampleRequest, ...]:
    """The newer requests, for the attempts that are known to be asked for."""
    requests = []
    for before, request in zip(known, newer, strict=True):
        if before.attempt != request.attempt:
            request = request.model_copy(update={"attempt": before.attempt})
        requests.append(request)
    return tuple(requests)


@dataclass(slots=True, eq=False)
class Awaited(PayloadUser):
    """An outcome that is awaited, by all slots that need the same."""

    address: str
    spec: RewardSpec
    prompt: str = ""
    beside: Beside | None = None
    """What travels of the sample beside prompt and media; None of a group."""
    text_bytes: int = 0
    """Of its prompt and metadata in a request; 0 of a group."""
    attempt: int = 1
    """The attempt that is asked for: a failure of an earlier one is no answer."""
    media: dict[str, MediaRef | tuple[MediaRef, ...]] = field(default_factory=dict)
    group: GroupPlan | None = None
    slots: list[Slot] = field(default_factory=list)
    state: State | None = None
    """Changed by `EngineState` alone, along `TRANSITIONS`. None until it is awaited."""
    delivery: Delivery | None = None
    outcome: Outcome | None = None
    is_hit: bool = False
    """Answered without being sent."""
    num_sends: int = 0
    """How often it was put into a message."""
    answered_at: float = 0.0

    @property
    def is_ended(self) -> bool:
        """Whether nothing is awaited any more."""
        return self.state in ENDED

    @property
    def in_hand_addresses(self) -> list[str]:
        """Addresses of which a claim says that a worker has it in hand: of a group also those of its parts."""
        if self.group is None:
            return [self.address]
        return [self.address, *(p.address for p in self.group.parts if p.address)]

    def accepts(self, outcome: Outcome) -> bool:
        """Whether `outcome` answers the attempt that is asked for."""
        return outcome.is_final or outcome.attempt >= self.attempt


@dataclass(slots=True, eq=False)
class Slot:
    """One submitted sample in its position (split, step, index)."""

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
    stage: SlotStage = SlotStage.QUEUED
    encoded: Any = None
    """Its media as they travel (`encoding.EncodedSample`), while they are looked up and stored."""
    unsettled: dict[PayloadUser, None] = field(default_factory=dict)
    """What of it is on its way into the store."""
    awaited: Mapping[str, Awaited] = field(default_factory=dict)
    """By reward name; a groupwise reward's comes when its group is sealed. Replaced as a whole, never changed: other
    threads read it."""
    member_index: dict[str, int] = field(default_factory=dict)
    """By name of a groupwise reward: which member of its group this is."""
    problem: Failure | None = None
    """Why it cannot be scored at all; then nothing is awaited."""
    is_given_up: bool = False
    """Nobody waits for it any more: collected, or cancelled, perhaps before it was encoded."""
    snapshot: SlotSnapshot | None = None

    @property
    def step_key(self) -> StepKey:
        """The step that it belongs to."""
        return self.split, self.step

    @property
    def is_done(self) -> bool:
        """Whether every reward has its outcome."""
        return all(self.is_done_for(spec.name) for spec in self.rewards)

    def is_done_for(self, reward: str) -> bool:
        """Whether this reward has its outcome."""
        if self.problem is not None:
            return True
        awaited = self.awaited.get(reward)
        return awaited is not None and awaited.outcome is not None

    def outcome_for(self, reward: str) -> Outcome | None:
        """The outcome of this reward, of a group its own member's; None until it is there."""
        if self.problem is not None:
            return Outcome(failure=self.problem)
        awaited = self.awaited.get(reward)
        outcome = awaited.outcome if awaited is not None else None
        if outcome is not None and outcome.members:
            return outcome.members[self.member_index[reward]]
        return outcome

    def has_failed_for(self, reward: str) -> bool:
        """Whether the outcome of this reward is there and is a failure."""
        outcome = self.outcome_for(reward)
        return outcome is not None and outcome.failure is not None

    @property
    def is_sent(self) -> bool:
        """Whether all that it needs is in a message, or answered."""
        if len(self.awaited) < len(self.rewards):
            return False
        return all(
            a.outcome is not None or a.delivery is not None
            for a in self.awaited.values()
        )

    def take_snapshot(self) -> None:
        """Say anew what a ticket keeps of it. What was never put in a message counts as not sent."""
        addresses = None
        if self.is_sent:
            addresses = {
                name: (a.address, a.attempt, self.member_index.get(name, -1))
                for name, a in self.awaited.items()
            }
        record = SlotRecord(self.index, self.group, addresses, self.problem)
        deliveries = {
            a.delivery.request: a.delivery.record
            for a in self.awaited.values()
            if a.delivery is not None
        }
        self.snapshot = SlotSnapshot(record, tuple(deliveries.values()))


@dataclass(slots=True, eq=False)
class Delivery:
    """One message under way, for those of its outcomes that are not there yet. A group's chord is one delivery."""

    request: str
    """Name of its request in the payload store; of another rank's group a name that nothing has."""
    label: str
    """For people: `OCR x 16, run demo step 3`."""
    spec: RewardSpec
    sent_by: SentBy
    awaited: list[Awaited]
    """Those without an outcome."""
    pause_s: float
    """If it is lost it is sent again so long after it was sent. Grows with each loss."""
    number: int = 0
    """Of its message in its queue; of a chord, of the last part's."""
    part_requests: tuple[str, ...] = ()
    """Of a chord: the requests of its parts."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of its requests that were stored, by name: a message that is sent again says them. Replaced as a whole, never
    changed: the publisher reads it."""
    state: State = State.PUBLISHING
    sent_at: float = 0.0
    look_at: float = 0.0
    """When to look next whether it is lost."""
    is_missed: bool = False
    """At the last look it was neither answered, claimed nor queued."""
    was_claimed: bool = False
    """At an earlier look a worker had it in hand."""
    is_being_checked: bool = False
    """Of an earlier process: it is being asked whether its request is still in the store."""
    is_unheld: bool = False
    """At the last such look no rank had members in the slots of a group of it."""
    awaited_when_sent: tuple[Awaited, ...] = ()
    """Whom its request is for, a group's own outcome first. Never changed: the backend composes the request of it."""
    record: DeliveryRecord = field(init=False)
    """What a pickled ticket keeps of it."""

    def __post_init__(self) -> None:
        self.awaited_when_sent = tuple(self.awaited)
        self.take_record()

    def take_record(self) -> None:
        """Say anew what a ticket keeps of it."""
        self.record = DeliveryRecord(
            request=self.request,
            label=self.label,
            queue=self.spec.queue,
            number=self.number,
            fingerprint=self.spec.fingerprint,
            addresses=tuple(a.address for a in self.awaited),
            is_other_ranks=self.sent_by
            in (SentBy.OTHER_RANK, SentBy.OTHER_RANK_EARLIER),
            digest=self.digests.get(self.request, ""),
        )

    @property
    def in_flight(self) -> list[Awaited]:
        """What a worker is to answer: not what was lost and is on its way into another message."""
        sent = (State.IN_FLIGHT, State.THROTTLED)
        return [awaited for awaited in self.awaited if awaited.state in sent]

    @property
    def requests(self) -> tuple[str, ...]:
        """Names of all its requests in the payload store."""
        return self.request, *self.part_requests


@dataclass(slots=True, eq=False)
class Member(PayloadUser):
    """One sample of this rank in a group that is being filled."""

    slot: Slot
    spec: RewardSpec
    """The groupwise reward."""
    key: str
    """The sample's key for the reward of the parts."""
    address: str
    """Of its own outcome, for the reward of the parts."""
    prompt: str
    beside: Beside
    request: SampleRequest | None = None
    """What workers are told of it; made once its media are stored."""
    failure: Failure | None = None
    """Why it cannot be scored; the others are scored without it."""
    media: dict[str, MediaRef | tuple[MediaRef, ...]] = field(default_factory=dict)
    carried: list[Awaited] = field(default_factory=list)
    """Outcomes of the same sample for the reward that is ranked: they go with the group."""
    num_registrations: int = 0
    """Calls under way that put it into its slot over ranks."""
