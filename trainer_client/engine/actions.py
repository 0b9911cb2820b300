"""What the engine asks for: `EngineState.apply` returns actions, `Backend.perform` performs them, events result.

A call that fails since a server is away is made again, with growing pauses: every action may run twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from tasks.messages import Outcome
from tasks.rewards import RewardSpec
from trainer_client.engine.model import Awaited, Delivery, Member, RankIndex, Slot


class Lane(Enum):
    """The threads that perform actions. Actions of one lane but the pool's are performed one by one, in order.

    Each lane is one thread, so that a server that hangs holds up what needs it and little else: while the broker is
    away outcomes are still read, and while the payload store is away the rank lock is still extended.
    """

    POOL = "pool"
    """`sender_threads` threads: encode, store. The CPU's work, and the bytes."""
    PUBLISH = "publish"
    """Requests and messages."""
    POLL = "poll"
    """Whatever only the result backend answers."""
    UPKEEP = "upkeep"
    """What comes every few seconds and asks several servers."""


class Purpose(Enum):
    """Why outcomes are asked for."""

    FIRST = "before they are sent: an outcome that is there is not computed again"
    POLL = "their messages have left the queue"
    EVERYTHING = "now and then, also of what is still queued"


@dataclass(frozen=True, slots=True)
class Encode:
    """Encode a sample. Result: `SampleEncoded`."""

    lane: ClassVar[Lane] = Lane.POOL
    slot: Slot


@dataclass(frozen=True, slots=True)
class Store:
    """Store a payload. Result: `PayloadStored` or `PayloadRefused`."""

    lane: ClassVar[Lane] = Lane.POOL
    name: str
    content: Any


@dataclass(frozen=True, slots=True)
class Lost:
    """An outcome whose message was lost, and where its media are, or can be made again."""

    awaited: Awaited
    digest_of: Mapping[str, str]
    """By the name of each of its payloads."""
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class Restore:
    """Store again what is gone of the media of outcomes that were lost. Result: `Restored`."""

    lane: ClassVar[Lane] = Lane.POOL
    lost: Sequence[Lost]


@dataclass(frozen=True, slots=True)
class LookUp:
    """Ask for outcomes. Result: `OutcomesFound`."""

    lane: ClassVar[Lane] = Lane.POLL
    addresses: Sequence[str]
    purpose: Purpose


@dataclass(frozen=True, slots=True)
class LookUpGroup:
    """Ask what is known of a sealed group. Result: `GroupLookedUp`."""

    lane: ClassVar[Lane] = Lane.POLL
    group: Awaited
    question: str
    """Its name: the same where the call is made again."""


@dataclass(frozen=True, slots=True)
class ReadNumbers:
    """Ask how far the messages of queues have come. Result: `NumbersRead`."""

    lane: ClassVar[Lane] = Lane.POLL
    queues: Sequence[str]


@dataclass(frozen=True, slots=True)
class ReadNotes:
    """Ask what workers say of requests, and forget what they said. Result: `NotesRead`."""

    # Of the two servers that it asks one is the payload store, which may hang: the poll lane extends the rank lock.
    lane: ClassVar[Lane] = Lane.UPKEEP
    requests: Sequence[tuple[Delivery, str]]


@dataclass(frozen=True, slots=True)
class Publish:
    """Send new messages. Result: `Published`."""

    lane: ClassVar[Lane] = Lane.PUBLISH
    deliveries: Sequence[Delivery]


@dataclass(frozen=True, slots=True)
class PublishAgain:
    """Send the message of one of a delivery's requests again, as it was. Result: `Published`."""

    lane: ClassVar[Lane] = Lane.PUBLISH
    delivery: Delivery
    request: str


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A delivery that may be lost, as it was when it was looked at."""

    delivery: Delivery
    number: int
    awaited: tuple[Awaited, ...]


@dataclass(frozen=True, slots=True)
class InspectDeliveries:
    """Ask whether deliveries are queued, claimed or answered. Result: `DeliveriesInspected`."""

    lane: ClassVar[Lane] = Lane.UPKEEP
    suspicions: Sequence[Suspicion]


@dataclass(frozen=True, slots=True)
class MeasureStore:
    """Ask how many bytes are in the payload store, and whether any of `queues` has messages.

    Result: `StoreMeasured`.
    """

    lane: ClassVar[Lane] = Lane.UPKEEP
    queues: Sequence[str]


@dataclass(frozen=True, slots=True)
class Renew:
    """Let payloads live on. Result: `Renewed`."""

    lane: ClassVar[Lane] = Lane.UPKEEP
    names: Sequence[str]


@dataclass(frozen=True, slots=True)
class Free:
    """Drop payloads. Result: `Freed`."""

    lane: ClassVar[Lane] = Lane.UPKEEP
    names: Sequence[str]


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """Ask whether the request of an earlier process is still in the store. Result: `RequestChecked`."""

    lane: ClassVar[Lane] = Lane.UPKEEP
    delivery: Delivery
    shared_keys: Mapping[Awaited, str]
    """Of its groups that several ranks have filled: where their slots are in Redis."""


@dataclass(frozen=True, slots=True)
class SentRequest:
    """A request of an earlier process."""

    name: str
    digest: str
    """Of its bytes; empty if the ticket does not know."""
    is_group: bool


@dataclass(frozen=True, slots=True)
class ReadRequests:
    """Read which payloads the requests of an earlier process name. Result: `RequestsRead`."""

    lane: ClassVar[Lane] = Lane.UPKEEP
    requests: Sequence[SentRequest]
    slots_of: Mapping[str, Sequence[Slot]]
    """By address, the samples of the ticket: a request may be for other tickets too, whose payloads are not read."""


@dataclass(frozen=True, slots=True)
class RegisterMember:
    """Put a member into its slot over ranks. Result: `MemberRegistered`."""

    lane: ClassVar[Lane] = Lane.POLL
    shared_key: str
    position: RankIndex
    member: Member
    group_size: int


@dataclass(frozen=True, slots=True)
class ReadDigests:
    """Ask which groups over ranks are sealed. Result: `DigestsRead`."""

    lane: ClassVar[Lane] = Lane.POLL
    shared_keys: Sequence[str]


@dataclass(frozen=True, slots=True)
class ReadMembers:
    """Read all members of a group over ranks. Result: `MembersRead`."""

    lane: ClassVar[Lane] = Lane.POLL
    shared_key: str
    digest: str
    """Under which it is sealed now."""


@dataclass(frozen=True, slots=True)
class AnsweredGroup:
    """A group over ranks that this rank has the answer of."""

    shared_key: str
    digest: str
    address: str
    attempt: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class PutGroupsBack:
    """Put what this rank has its answer of into a Redis that was emptied. Result: `GroupsPutBack`."""

    lane: ClassVar[Lane] = Lane.UPKEEP
    groups: Sequence[AnsweredGroup]


@dataclass(frozen=True, slots=True)
class Announce:
    """An outcome has arrived: let those know who compare answers. Performed by the loop itself; no result."""

    spec: RewardSpec
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Warn:
    """The log is to say something, once. Performed by the loop itself; no result."""

    words: str


Action = (
    Encode
    | Store
    | Restore
    | LookUp
    | LookUpGroup
    | ReadNumbers
    | ReadNotes
    | Publish
    | PublishAgain
    | InspectDeliveries
    | MeasureStore
    | Renew
    | Free
    | CheckRequest
    | ReadRequests
    | RegisterMember
    | ReadDigests
    | ReadMembers
    | PutGroupsBack
    | Announce
    | Warn
)
