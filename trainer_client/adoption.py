"""Tickets of processes that are gone: their samples are waited for again, by what the ticket lists."""

from __future__ import annotations

import functools
import threading
import time
import uuid
from collections.abc import Mapping

from tasks.errors import WireError
from tasks.messages import Failure, GroupRequest, ScoreRequest, unpack
from tasks.rewards import RewardConfig, RewardSpec
from trainer_client.board import Chunk, Entry, Slot
from trainer_client.session import ASK_S, Session
from trainer_client.ticket import SlotRecord, Ticket

ANSWERED = "answered:"
"""Before the name of a chunk of what was answered when its ticket was pickled; there is no request of that name."""


def adopt(
    session: Session, ticket: Ticket, config: RewardConfig, pause_s: float
) -> list[Slot]:
    """Slots for a pickled ticket, whose messages are looked after from now on.

    What was answered when it was pickled is asked for once more: only its address is in the ticket.

    Args:
        config: The rewards that it was made with, as they stand in its launch.
        pause_s: A message that is lost is sent again so much later.
    """
    rewards = config.of(ticket.split)
    specs = {spec.name: spec for spec in rewards}
    of_both_splits = {
        spec.fingerprint: spec for spec in (*config.rewards, *config.eval_rewards)
    }
    entries: dict[str, Entry] = {}
    slots = []
    for record in ticket.slots:
        assert isinstance(record, SlotRecord)
        slots.append(_slot(record, ticket, specs, entries))
    answered = set(entries)
    chunks = []
    for sent in ticket.chunks:
        spec = of_both_splits.get(
            sent.fingerprint
        )  # what one split needs may travel with a group of the other
        if spec is None:  # of which this client has but the rewards of the ticket's
            continue
        own = [entries[a] for a in sent.addresses if a in entries]
        chunks.append(_chunk(sent.request, sent.label, sent.number, own, spec, pause_s))
        answered.difference_update(sent.addresses)
    asked = []
    for spec in rewards:
        own = [entries[a] for a in sorted(answered) if entries[a].spec is spec]
        asked.append(_chunk(f"{ANSWERED}{uuid.uuid4().hex}", "", 0, own, spec, pause_s))
    session.board.adopt(slots, [*chunks, *asked])
    awaited = {e.address: e for slot in slots for e in slot.known_entries}
    for chunk in chunks:
        session.sender.soon(functools.partial(_adopt_payloads, session, chunk, awaited))
    is_done = threading.Event()
    session.sender.soon(is_done.set)
    is_done.wait(ASK_S)  # where Redis is away they are known once it is back
    return slots


def _chunk(
    request: str,
    label: str,
    number: int,
    entries: list[Entry],
    spec: RewardSpec,
    pause_s: float,
) -> Chunk:
    now = time.monotonic()
    return Chunk(
        request,
        label,
        spec,
        number,
        entries,
        now,
        now + pause_s,
        pause_s,
        is_adopted=True,
    )


def _slot(
    record: SlotRecord,
    ticket: Ticket,
    specs: Mapping[str, RewardSpec],
    entries: dict[str, Entry],
) -> Slot:
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
            kind="failed",
            message="the process that submitted it ended before it was sent",
        )
        return slot
    slot.entries = {}
    for name, (address, attempt, place) in record.addresses.items():
        slot.entries[name] = entries.setdefault(
            address, Entry(address, specs[name], attempt=attempt)
        )
        if place >= 0:
            slot.places[name] = place
    return slot


def _adopt_payloads(
    session: Session, chunk: Chunk, entries: Mapping[str, Entry]
) -> None:
    """Know the payloads of a request that another process sent, so that they live on and are freed in the end."""
    data = session.store.get([chunk.request])[0]
    if data is None:
        return
    try:
        if chunk.spec.how in ("rank", "wins"):
            group = unpack(GroupRequest, data)
            samples = [(group.address, member) for member in group.members]
        else:
            samples = [
                (s.address, one)
                for s in unpack(ScoreRequest, data).samples
                for one in s.members or (s,)
            ]
    except WireError:  # of another version of this package: workers say so, in a note
        return
    for address, sample in samples:
        entry = entries.get(address)
        if entry is None:
            continue
        for refs in sample.media.values():
            for ref in refs if isinstance(refs, tuple) else (refs,):
                session.board.adopt_payload(ref.name, ref.digest, entry)
