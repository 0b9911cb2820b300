"""Tickets of processes that are gone: their samples are waited for again, by what the ticket lists."""

from __future__ import annotations

import time
from collections.abc import Mapping

from tasks.messages import Failure, GroupRequest, ScoreRequest, unpack
from tasks.payloads import PayloadStore
from tasks.rewards import RewardSpec
from trainer_client.board import Chunk, Entry, Payload, Slot
from trainer_client.session import Session
from trainer_client.ticket import SlotRecord, Ticket


def adopt(session: Session, ticket: Ticket, rewards: tuple[RewardSpec, ...], pause_s: float) -> list[Slot]:
    """Slots for a pickled ticket, whose messages are looked after from now on.

    Args:
        rewards: Those of the ticket's split, the same that it was made with.
        pause_s: A message that is lost is sent again so much later.
    """
    specs = {spec.name: spec for spec in rewards}
    entries: dict[str, Entry] = {}
    slots = []
    for record in ticket.slots:
        assert isinstance(record, SlotRecord)
        slots.append(_slot(record, ticket, specs, entries))
    chunks = []
    for sent in ticket.chunks:
        spec = next(s for s in rewards if s.fingerprint == sent.fingerprint)
        own = [entries[a] for a in sent.addresses if a in entries]
        now = time.monotonic()
        chunks.append(
            Chunk(sent.request, sent.label, spec, sent.number, own, now, now + pause_s, pause_s, is_adopted=True)
        )
        _adopt_payloads(session.store, sent.request, spec, entries)
    session.board.adopt(slots, chunks)
    return slots


def _slot(record: SlotRecord, ticket: Ticket, specs: Mapping[str, RewardSpec], entries: dict[str, Entry]) -> Slot:
    slot = Slot(
        split=ticket.split,
        step=ticket.step,
        index=record.index,
        group=record.group,
        sample=None,
        held={},
        rewards=tuple(specs.values()),
        submitted_at=time.monotonic(),
        problem=record.problem,
    )
    if record.addresses is None:
        slot.problem = record.problem or Failure(
            kind="failed", message="the process that submitted it ended before it was sent"
        )
        return slot
    slot.entries = {}
    for name, (address, attempt, place) in record.addresses.items():
        slot.entries[name] = entries.setdefault(address, Entry(address, specs[name], attempt=attempt))
        if place >= 0:
            slot.places[name] = place
    return slot


def _adopt_payloads(store: PayloadStore, request: str, spec: RewardSpec, entries: Mapping[str, Entry]) -> None:
    """Know the payloads of a request that another process sent, so that they live on and are freed in the end."""
    data = store.get([request])[0]
    if data is None:
        return
    if spec.how in ("rank", "wins"):
        group = unpack(GroupRequest, data)
        samples = [(group.address, member) for member in group.members]
    else:
        samples = [(s.address, one) for s in unpack(ScoreRequest, data).samples for one in s.members or (s,)]
    for address, sample in samples:
        entry = entries.get(address)
        if entry is None:
            continue
        for refs in sample.media.values():
            for ref in refs if isinstance(refs, tuple) else (refs,):
                payload = Payload(ref.name, ref.digest, num_users=1)
                payload.stored.set()
                entry.payloads.append(payload)
