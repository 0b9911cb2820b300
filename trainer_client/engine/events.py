"""What the engine is told: by the loop, by callers' threads, or by the backend as the result of an action.

`EngineState.apply` takes one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.messages import Failure, Heartbeat, Note, Outcome, SampleRequest
from tasks.rewards import Split
from trainer_client.engine.actions import Purpose, Suspicion
from trainer_client.engine.encoding import EncodedSample
from trainer_client.engine.model import Awaited, Delivery, Member, Slot, StepKey

# --- of callers --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submitted:
    """Samples to score."""

    slots: Sequence[Slot]


@dataclass(frozen=True, slots=True)
class WaitBegan:
    """Somebody waits: in `collect()` for these steps, or in `flush()` or `submit()` for what is not sent."""

    waiter: int
    steps: frozenset[StepKey] = frozenset()


@dataclass(frozen=True, slots=True)
class WaitEnded:
    """The wait of this number is over."""

    waiter: int


@dataclass(frozen=True, slots=True)
class SlotsGivenUp:
    """Nobody waits for these samples any more: they are collected, or cancelled."""

    slots: Sequence[Slot]


@dataclass(frozen=True, slots=True)
class GroupsIncomplete:
    """These groups of a step will get no further member: by id, the words for each."""

    split: Split
    step: int
    words: Mapping[Any, str]


@dataclass(frozen=True, slots=True)
class TicketResumed:
    """What an earlier process submitted: its slots and the deliveries that it had under way."""

    slots: Sequence[Slot]
    deliveries: Sequence[Delivery]


# --- of the loop -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


# --- of the backend ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SampleEncoded:
    """A sample is encoded, or cannot be."""

    slot: Slot
    encoded: EncodedSample


@dataclass(frozen=True, slots=True)
class OutcomesFound:
    """What Redis has at some addresses; None where there is none."""

    outcomes: Mapping[str, Outcome | None]
    purpose: Purpose


@dataclass(frozen=True, slots=True)
class GroupLookedUp:
    """What Redis has of a sealed group: its outcome, those of its parts, and what the other ranks ask for."""

    group: Awaited
    outcome: Outcome | None
    attempt: int
    """That this rank is to ask for."""
    number: int
    """Of the message that another rank has sent for this attempt; 0: none has."""
    parts: Mapping[str, Outcome | None]


@dataclass(frozen=True, slots=True)
class PayloadStored:
    """A payload is in the store."""

    name: str


@dataclass(frozen=True, slots=True)
class PayloadRefused:
    """A payload cannot be stored, and not since the store is away or full: another try would end so too."""

    name: str
    failure: Failure
    """What those are told that need it."""


@dataclass(frozen=True, slots=True)
class StoreMeasured:
    """Payload bytes in the store, of all clients; and whether any of these queues has messages, if that was asked."""

    num_bytes: int
    has_messages: bool | None


@dataclass(frozen=True, slots=True)
class Published:
    """Messages are in their queues, with these numbers."""

    numbers: Mapping[Delivery, int]
    """0 of a delivery that has no message, since nothing of it can be sent."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """By name, of the requests that were stored for them."""
    refused: Mapping[Awaited, Failure] = field(default_factory=dict)
    """Outcomes whose sample cannot be put into a request, and why. The others of its delivery went without it."""


@dataclass(frozen=True, slots=True)
class NumbersRead:
    """How far the messages of some queues have come: the highest number given out, and the highest taken."""

    sent: Mapping[str, int]
    taken: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class NotesRead:
    """What workers say of requests that they could not read: delivery, the request, the note."""

    notes: Sequence[tuple[Delivery, str, Note]]
    store_identity: str
    """Of this client's payload store."""


@dataclass(frozen=True, slots=True)
class DeliveriesInspected:
    """What Redis says of deliveries that may be lost."""

    suspicions: Sequence[Suspicion]
    in_queue: frozenset[Delivery]
    """Their message waits in its queue, as far as anyone can know."""
    claimed: frozenset[str]
    """Addresses that a worker has in hand; asked only of what is not queued."""
    workers: Sequence[Heartbeat]
    outcomes: Mapping[str, Outcome | None]
    """Of what is neither queued nor claimed; read after the claims."""


@dataclass(frozen=True, slots=True)
class Restored:
    """The media of outcomes that were lost are in the store; or why they cannot be."""

    problems: Mapping[Awaited, Failure | None]
    names: frozenset[str]
    """Of the payloads that were gone."""


@dataclass(frozen=True, slots=True)
class RequestChecked:
    """Whether the request of an earlier process is still in the store."""

    delivery: Delivery
    is_there: bool
    is_shared: Mapping[Awaited, bool | None]
    """If it is gone, of its groups over ranks: whether other ranks have members in their slots; None if nobody has."""


@dataclass(frozen=True, slots=True)
class RequestsRead:
    """What the requests of a resumed ticket name: address, name and digest of each payload."""

    payloads: Sequence[tuple[str, str, str]]
    slots_of: Mapping[str, Sequence[Slot]]
    """By address, the samples of the ticket."""


@dataclass(frozen=True, slots=True)
class Freed:
    """Payloads were freed."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """Payloads live on."""


@dataclass(frozen=True, slots=True)
class MemberRegistered:
    """What became of putting a member into its slot over ranks."""

    member: Member
    found: Any
    """`tasks.groups.Registered`."""


@dataclass(frozen=True, slots=True)
class DigestsRead:
    """By the key of a group over ranks, the digest under which it is sealed; empty while it is open."""

    digests: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class MembersRead:
    """All members of a group over ranks, in slot order: (rank, index) to key and request."""

    shared_key: str
    digest: str
    """Under which it was sealed when they were asked for."""
    members: Mapping[tuple[int, int], tuple[str, SampleRequest]]


@dataclass(frozen=True, slots=True)
class GroupsPutBack:
    """Keys of groups over ranks that an emptied Redis had lost, and that must be filled again."""

    lost: frozenset[str]


Event = (
    Submitted
    | WaitBegan
    | WaitEnded
    | SlotsGivenUp
    | GroupsIncomplete
    | TicketResumed
    | Tick
    | SampleEncoded
    | OutcomesFound
    | GroupLookedUp
    | PayloadStored
    | PayloadRefused
    | StoreMeasured
    | Published
    | NumbersRead
    | NotesRead
    | DeliveriesInspected
    | Restored
    | RequestChecked
    | RequestsRead
    | Freed
    | Renewed
    | MemberRegistered
    | DigestsRead
    | MembersRead
    | GroupsPutBack
)
