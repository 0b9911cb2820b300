"""Tickets of processes that are gone: their samples are awaited again, by what the ticket lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tasks.messages import Failure
from tasks.rewards import RewardConfig, RewardSpec
from trainer_client.engine.model import Awaited, Delivery, Slot
from trainer_client.engine.states import SentBy, SlotStage, State
from trainer_client.ticket import DeliveryRecord, SlotRecord, Ticket


def slots_and_deliveries(
    ticket: Ticket,
    config: RewardConfig,
    pause_s: float,
    now: float,
    new_name: Callable[[str], str],
) -> tuple[list[Slot], list[Delivery]]:
    """Slots for a pickled ticket, and the deliveries that are to be looked after for it.

    What was answered when it was pickled is asked for once more: only its address is in the ticket.

    Args:
        config: The rewards that it was made with, as they stand in its launch.
        pause_s: A message that is lost is sent again so much later.
        new_name: Makes a name that no request has.
    """
    rewards = config.of(ticket.split)
    specs = {spec.name: spec for spec in rewards}
    awaited: dict[str, Awaited] = {}
    slots = []
    for record in ticket.slots:
        assert isinstance(record, SlotRecord)
        slots.append(_slot(record, ticket, specs, awaited, now))

    deliveries, answered = _deliveries(ticket, config, awaited, pause_s)
    for spec in rewards:
        mine = [a for a in answered if a.spec is spec]
        if mine:
            request = new_name("answered")
            deliveries.append(
                Delivery(
                    request=request,
                    label="",
                    spec=spec,
                    sent_by=SentBy.EARLIER_PROCESS,
                    awaited=mine,
                    pause_s=pause_s,
                    state=State.IN_FLIGHT,
                )
            )
    return slots, deliveries


def _deliveries(
    ticket: Ticket,
    config: RewardConfig,
    awaited: Mapping[str, Awaited],
    pause_s: float,
) -> tuple[list[Delivery], list[Awaited]]:
    """The messages that were under way, and the outcomes that none of them is for: these were answered."""
    # What one split needs may travel with a group of the other.
    every_spec = (*config.rewards, *config.eval_rewards)
    spec_of = {spec.fingerprint: spec for spec in every_spec}
    answered = dict(awaited)
    deliveries = []
    for sent in ticket.deliveries:
        spec = spec_of.get(sent.fingerprint)
        if spec is None:  # this client has the rewards of the ticket's split alone
            continue
        mine = [awaited[address] for address in sent.addresses if address in awaited]
        deliveries.append(_delivery(sent, spec, mine, pause_s))
        for address in sent.addresses:
            answered.pop(address, None)
    return deliveries, list(answered.values())


def _delivery(
    sent: DeliveryRecord, spec: RewardSpec, mine: list[Awaited], pause_s: float
) -> Delivery:
    sent_by = SentBy.EARLIER_PROCESS
    if sent.is_other_ranks:
        sent_by = SentBy.OTHER_RANK_EARLIER
    return Delivery(
        request=sent.request,
        label=sent.label,
        spec=spec,
        sent_by=sent_by,
        awaited=mine,
        pause_s=pause_s,
        number=sent.number,
        digests={sent.request: sent.digest} if sent.digest else {},
        state=State.IN_FLIGHT,
    )


def _slot(
    record: SlotRecord,
    ticket: Ticket,
    specs: Mapping[str, RewardSpec],
    awaited: dict[str, Awaited],
    now: float,
) -> Slot:
    slot = Slot(
        split=ticket.split,
        step=ticket.step,
        index=record.index,
        group=record.group,
        sample=None,
        held={},
        rewards=tuple(specs.values()),
        submitted_at=now,
        stage=SlotStage.SETTLED,
        problem=record.problem,
    )
    if record.addresses is None:
        words = "the process that submitted it ended before it was sent"
        slot.problem = record.problem or Failure(kind="failed", message=words)
        return slot
    mine = {}
    for name, (address, attempt, member_index) in record.addresses.items():
        if address not in awaited:
            awaited[address] = Awaited(address, specs[name], attempt=attempt)
        mine[name] = awaited[address]
        if member_index >= 0:
            slot.member_index[name] = member_index
    slot.awaited = mine
    return slot
