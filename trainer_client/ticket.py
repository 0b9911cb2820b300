"""Tickets: claims on outcomes that outlive the process that submitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tasks.messages import Failure
from tasks.rewards import Split
from tasks.source.code import Code


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """What a successor of the process that submitted a sample must know of it."""

    index: int
    group: Any
    addresses: dict[str, tuple[str, int, int]] | None
    """By reward name: the address of its outcome, the attempt that was asked for, and the sample's index among the
    members of its group (-1 for a pointwise reward). None if the sample was not sent."""
    problem: Failure | None
    """Why the sample cannot be scored at all; None if it can."""

    @property
    def is_sent(self) -> bool:
        """Whether the sample was sent."""
        return self.addresses is not None


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """A message that was sent: its request in the payload store, its queue, its number, and the outcomes it is for."""

    request: str
    label: str
    queue: str
    number: int
    fingerprint: str
    addresses: tuple[str, ...]
    is_other_ranks: bool = False
    """Whether another rank sent it. There is no request of that name then."""
    digest: str = ""
    """Of the request's bytes; empty until the message is known to be sent."""


@dataclass(frozen=True, slots=True)
class SlotSnapshot:
    """What a pickled ticket keeps of one submitted sample.

    The engine replaces the snapshot of a slot as a whole: a thread that pickles reads one moment without a lock.
    """

    record: SlotRecord
    deliveries: tuple[DeliveryRecord, ...] = ()


class LiveSlot(Protocol):
    """What a ticket asks of a submitted sample in the process that submitted it (`engine.model.Slot`)."""

    index: int
    group: Any
    problem: Failure | None
    snapshot: SlotSnapshot | None

    @property
    def is_sent(self) -> bool:
        """Whether all that it needs is in a message, or answered."""


@dataclass(frozen=True)
class Ticket:
    """A claim on the outcomes of the samples of one `submit()`.

    A ticket can be pickled at any time. The pickle lists the samples that have been sent so far (`num_sent`) and counts
    the others. A successor process with the same rewards collects it by `client.collect(ticket=...)`. So does the
    client that made it, from the ticket or its pickle: while the step is open it waits for unsent samples as well.
    """

    run: str
    launch: str
    split: Split
    step: int
    rank: int
    start: int
    """Index of its first sample in the step of this rank."""
    stop: int
    """Index after its last sample."""
    fingerprints: tuple[tuple[str, str], ...]
    """(name, fingerprint) of each reward."""
    slots: Sequence[LiveSlot | SlotRecord]
    """Its samples: live where it was made, records after a pickle."""
    deliveries: tuple[DeliveryRecord, ...] = ()
    """The messages that were sent for it. Empty until the ticket is pickled."""
    codes: tuple[tuple[str, Code], ...] = ()
    """(name, code) of each reward that is a class of the user's whose source the trainer has read."""
    client: str = ""
    """Id of the client, in one process, that has its live samples."""
    number: int = 0
    """Number of this ticket among the tickets of that client."""
    pickled: set[int] = field(default_factory=set, repr=False, compare=False)
    """Numbers of that client's tickets that were pickled: somebody may collect them after the client is closed."""

    @property
    def place(self) -> tuple[str, str, int, int, int, int]:
        """Launch, split, step, rank and range of indices: no two tickets of a run have the same."""
        return self.launch, self.split, self.step, self.rank, self.start, self.stop

    @property
    def num_samples(self) -> int:
        """Number of its samples."""
        return self.stop - self.start

    @property
    def num_sent(self) -> int:
        """Number of its samples that are in a message, answered, or cannot be scored."""
        return sum(slot.is_sent or slot.problem is not None for slot in self.slots)

    def __getstate__(self) -> dict[str, Any]:
        self.pickled.add(self.number)
        records: list[SlotRecord] = []
        deliveries = list(self.deliveries)
        for slot in self.slots:
            if isinstance(slot, SlotRecord):
                records.append(slot)
            else:
                snapshot = _snapshot(slot)
                records.append(snapshot.record)
                deliveries += snapshot.deliveries

        # Slots that went in one message name the same delivery.
        by_request = {delivery.request: delivery for delivery in deliveries}
        return {
            **self.__dict__,
            "slots": tuple(records),
            "deliveries": tuple(by_request.values()),
            "pickled": set(),
        }

    def __repr__(self) -> str:
        return (
            f"Ticket(run={self.run!r}, launch={self.launch!r}, split={self.split!r}, step={self.step}, "
            f"rank={self.rank}, samples {self.start} to {self.stop}, {self.num_sent} sent)"
        )


def _snapshot(slot: LiveSlot) -> SlotSnapshot:
    """What a slot says of itself at this moment. A slot that no engine has seen yet was not sent."""
    if slot.snapshot is not None:
        return slot.snapshot
    return SlotSnapshot(SlotRecord(slot.index, slot.group, None, None))
