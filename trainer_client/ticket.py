"""Tickets: claims on outcomes that outlive the process that submitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tasks.messages import Failure
from tasks.rewards import Split
from tasks.source.code import Code


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """What a successor must know of one submitted sample."""

    index: int
    group: Any
    addresses: dict[str, tuple[str, int, int]] | None
    """By reward name: where its outcome goes, the attempt asked for, its place in a group (-1: it is by itself);
    None if it was not sent."""
    problem: Failure | None
    """Why it cannot be scored at all."""

    @property
    def is_sent(self) -> bool:
        """Whether it was sent."""
        return self.addresses is not None


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """A message that was sent: its request's name in the payload store, its queue and number, and whom it is for."""

    request: str
    label: str
    queue: str
    number: int
    fingerprint: str
    addresses: tuple[str, ...]
    is_other_ranks: bool = False
    """Another rank sent it: there is no request of that name."""


@dataclass(frozen=True, slots=True)
class SlotSnapshot:
    """What a pickled ticket keeps of one submitted sample. Replaced as a whole, so that any thread reads one moment."""

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

    It can be pickled at any time: it then lists what has been sent so far (`num_sent`) and counts what has not. A
    successor process with the same rewards collects it by `client.collect(ticket=...)`. The client that made it takes
    it back too, and waits for all of it while its step is open.
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
    """Messages that were sent for it; filled in when it is pickled."""
    codes: tuple[tuple[str, Code], ...] = ()
    """(name, code) of each reward that is a class of the user's whose source the trainer has read."""
    client: str = ""
    """Which client, in which process, has its live samples."""
    number: int = 0
    """Its own among the tickets of that client."""

    @property
    def place(self) -> tuple[str, str, int, int, int, int]:
        """What no two tickets of a run have alike."""
        return self.launch, self.split, self.step, self.rank, self.start, self.stop

    @property
    def num_samples(self) -> int:
        """How many samples it is for."""
        return self.stop - self.start

    @property
    def num_sent(self) -> int:
        """How many of them are on their way or answered."""
        return sum(slot.is_sent or slot.problem is not None for slot in self.slots)

    def __getstate__(self) -> dict[str, Any]:
        records = [
            s if isinstance(s, SlotRecord) else _snapshot(s).record for s in self.slots
        ]
        deliveries: dict[str, DeliveryRecord] = {d.request: d for d in self.deliveries}
        for slot in self.slots:
            if not isinstance(slot, SlotRecord):
                deliveries |= {d.request: d for d in _snapshot(slot).deliveries}
        return {
            **self.__dict__,
            "slots": tuple(records),
            "deliveries": tuple(deliveries.values()),
        }

    def __repr__(self) -> str:
        return (
            f"Ticket(run={self.run!r}, launch={self.launch!r}, split={self.split!r}, step={self.step}, "
            f"rank={self.rank}, samples {self.start} to {self.stop}, {self.num_sent} sent)"
        )


def _snapshot(slot: LiveSlot) -> SlotSnapshot:
    """What a slot says of itself at this moment; of one that no engine has seen yet, that it was not sent."""
    if slot.snapshot is not None:
        return slot.snapshot
    return SlotSnapshot(SlotRecord(slot.index, slot.group, None, None))
