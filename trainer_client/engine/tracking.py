"""Looks after what is in flight: polls answers, sends again what is lost, acts on notes of workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tasks.messages import Failure, Note
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.core import Core
from trainer_client.engine.group_sealing import Sealing
from trainer_client.engine.judge_permits import Throttle
from trainer_client.engine.losses import LossPolicy, loaders_of
from trainer_client.engine.model import (
    Awaited,
    Delivery,
)
from trainer_client.engine.polling import Polling
from trainer_client.engine.queue_pace import QueuePaces
from trainer_client.engine.sending import Sending
from trainer_client.engine.states import (
    SentBy,
    State,
)
from trainer_client.engine.why_late import Source


@dataclass(frozen=True, slots=True)
class Queued:
    """Messages of ours that wait in one queue."""

    last: int
    """The number of the last of them."""
    num_messages: int


class Tracking:
    """Follows deliveries to their answers."""

    def __init__(
        self,
        core: Core,
        sending: Sending,
        sealing: Sealing,
        losses: LossPolicy,
        throttle: Throttle,
        polling: Polling,
    ) -> None:
        self._core, self._sending, self._sealing = core, sending, sealing
        self._losses, self._throttle, self._polling = losses, throttle, polling
        self.paces = QueuePaces()
        self._throttled: set[str] = set()
        """Fingerprints of rewards that wait, or waited a moment ago, for a permit of their judge."""

    def poll(self) -> None:
        """Ask what is due to be asked."""
        polling, now = self._polling, self._core.now
        if polling.begin_poll(now):
            self._read_numbers()
            if self._sealing.is_shared and polling.digests.take(now):
                self._sealing.read_digests()
        if polling.notes.take(now):
            self._read_notes()
        if polling.inspection.take(now):
            self._inspect()
        if polling.everything.take(now):
            self._look_up_everything()
        if polling.renewal.take(now):
            self._renew()

    def _read_numbers(self) -> None:
        queues = sorted({d.spec.queue for d in self._core.deliveries.values()})
        if queues:
            self._core.act(do.ReadNumbers(queues))
        else:
            self._end_poll(0)

    def _end_poll(self, num_new: int) -> None:
        self._polling.polled(num_new, self._core.now, is_awaited=self._core.has_waits)

    def on_numbers(self, event: ev.NumbersRead) -> None:
        """Look at what has left its queue: workers may have answered it."""
        self._polling.numbers_read(event.sent, event.taken)
        self.paces.see(event.taken, self._core.now)
        addresses: dict[str, None] = {}
        for delivery in self._core.sent_deliveries():
            if self._polling.has_left_queue(delivery.spec.queue, delivery.number):
                addresses.update((a.address, None) for a in delivery.awaited)
        if addresses:
            self._core.act(do.LookUp(list(addresses), do.Purpose.POLL))
        else:
            self._end_poll(0)

    def on_outcomes(self, event: ev.OutcomesFound) -> None:
        """Outcomes that were asked for."""
        num_new = self._sending.take_answers(event.outcomes)
        if event.purpose is do.Purpose.POLL:
            self._end_poll(num_new)
        elif event.purpose is do.Purpose.EVERYTHING:
            self._polling.everything.answered()

    def queued(self, awaited: Iterable[Awaited]) -> dict[str, Queued]:
        """By queue, what of these outcomes has a message that was not taken, as far as the numbers say."""
        deliveries: dict[Delivery, None] = {}
        for one in awaited:
            if one.delivery is not None and one.delivery.state is State.IN_FLIGHT:
                deliveries[one.delivery] = None
        found: dict[str, Queued] = {}
        for delivery in deliveries:
            queue, number = delivery.spec.queue, delivery.number
            if not self._polling.has_left_queue(queue, number):
                known = found.get(queue, Queued(0, 0))
                num_messages = known.num_messages + max(1, len(delivery.part_requests))
                found[queue] = Queued(max(known.last, number), num_messages)
        return found

    def _look_up_everything(self) -> None:
        """Also what is still queued: another client may have had the same scored."""
        addresses: dict[str, None] = {}
        for delivery in self._core.deliveries.values():
            addresses.update((a.address, None) for a in delivery.awaited)
        if addresses:
            self._polling.everything.asked()
            self._core.act(do.LookUp(list(addresses), do.Purpose.EVERYTHING))

    def _read_notes(self) -> None:
        requests = []
        for delivery in self._core.sent_deliveries():
            if self._polling.has_left_queue(delivery.spec.queue, delivery.number):
                requests += [(delivery, request) for request in delivery.requests]
        if requests:
            self._polling.notes.asked()
            self._core.act(do.ReadNotes(requests))

    def _renew(self) -> None:
        """Let what is still needed live on. What is gone is stored again when its message is sent again."""
        requests = (r for d in self._core.deliveries.values() for r in d.requests)
        names = [*self._core.payloads.names_in_use(), *requests]
        if names:
            self._polling.renewal.asked()
            self._core.act(do.Renew(names))

    def on_renewed(self, _event: ev.Renewed) -> None:
        """Payloads live on."""
        self._polling.renewal.answered()

    def _inspect(self) -> None:
        """Look after what may be lost; and put members into their slots again, should Redis have been emptied."""
        due = [
            delivery
            for delivery in self._core.deliveries.values()
            if delivery.state is State.IN_FLIGHT
            and delivery.look_at <= self._core.now
            and delivery.in_flight
        ]
        if due:
            self._polling.inspection.asked()
            suspicions = [
                do.Suspicion(delivery, delivery.number, tuple(delivery.in_flight))
                for delivery in due
            ]
            self._core.act(do.InspectDeliveries(suspicions))
        if self._sealing.is_shared:
            self._sealing.put_groups_back()

    def on_inspected(self, event: ev.DeliveriesInspected) -> None:
        """It is known what became of deliveries that may be lost."""
        self._polling.inspection.answered()
        self._sending.take_answers(event.outcomes)
        for suspicion in event.suspicions:
            delivery = suspicion.delivery
            has_gone_on = delivery.number != suspicion.number
            if has_gone_on or delivery.state is not State.IN_FLIGHT:
                continue
            in_flight = delivery.in_flight
            if in_flight:
                self._judge(delivery, in_flight, event)

    def _judge(
        self,
        delivery: Delivery,
        in_flight: Sequence[Awaited],
        event: ev.DeliveriesInspected,
    ) -> None:
        """Whether a delivery is lost, and what follows."""
        lost: list[Awaited] = []
        is_in_hand = False
        is_waiting = delivery in event.in_queue
        if not is_waiting and not loaders_of(delivery.spec, event.workers):
            lost = [a for a in in_flight if not _is_in_hand(a, event.claimed)]
            is_in_hand = len(lost) < len(in_flight)
        if self._losses.is_lost(delivery, len(lost), self._core.now):
            self._send_again(delivery, lost)
        elif is_in_hand:
            # From the next look on: another client may have claimed what equals some of it.
            self._losses.seen_in_hand(delivery)

    def _send_again(self, delivery: Delivery, lost: Sequence[Awaited]) -> None:
        """What is lost goes once more: in a new message if this process has the media, else as it was."""
        if delivery.sent_by is SentBy.OTHER_RANK_EARLIER:
            self._losses.sent(delivery, self._core.now)
            return  # its rank sends it again, or whoever resumes that rank's ticket
        self._losses.grow_pause(delivery, self._core.now)
        if delivery.sent_by is not SentBy.EARLIER_PROCESS:
            self._restore(delivery, lost)
        elif not delivery.is_being_checked:
            # It may be: the payload store can be away for long.
            delivery.is_being_checked = True
            shared_keys = self._sealing.shared_keys_of(delivery.awaited)
            self._core.act(do.CheckRequest(delivery, shared_keys))

    def _restore(self, delivery: Delivery, lost: Sequence[Awaited]) -> None:
        group = next((a for a in lost if a.group is not None), None)
        restored = []
        for awaited in lost:
            if group is not None and awaited.group is None:
                self._core.move(awaited, State.WITH_GROUP)
                assert group.group is not None
                group.group.carried.append(awaited)
            else:
                self._core.move(awaited, State.RESTORING)
                restored.append(awaited)
        if delivery.state is State.THROTTLED:
            self._throttle.discard(delivery)
            self._core.set_delivery_state(delivery, State.IN_FLIGHT)
        if restored:
            self._core.act(do.Restore([_lost(awaited) for awaited in restored]))

    def on_restored(self, event: ev.Restored) -> None:
        """Media of what was lost are stored again."""
        for awaited, problem in event.problems.items():
            if awaited.state is not State.RESTORING:
                continue
            if problem is not None:
                self._sending.fail(awaited, problem)
            else:
                self._sending.accumulate(awaited)
        # What was answered, or given up, meanwhile has been stored in vain.
        self._core.payloads.free_unused(event.names)

    def on_request_checked(self, event: ev.RequestChecked) -> None:
        """It is known whether an earlier process's request is there."""
        delivery = event.delivery
        delivery.is_being_checked = False
        if not delivery.awaited:
            return
        if event.is_there:
            self._core.act(do.PublishAgain(delivery, delivery.request))
        elif self._sealing.is_shared and delivery.spec.is_groupwise:
            self._leave_to_other_ranks(delivery, event.is_shared)
        else:
            self._media_are_gone(delivery.awaited)

    def _leave_to_other_ranks(
        self, delivery: Delivery, is_shared: Mapping[Awaited, bool | None]
    ) -> None:
        """The process of a message may have died before it had sent its groups. Each other rank with members in a group
        sends it too: a failure here would differ from their answer, and free media that they need."""
        lost = [one for one in delivery.awaited if is_shared.get(one) is False]
        unknown = [one for one in delivery.awaited if is_shared.get(one) is None]
        if delivery.is_unheld:
            lost += unknown
        self._media_are_gone(lost)
        if not delivery.awaited:
            return
        # Redis was emptied, perhaps: until the next look the other ranks have put their members back.
        delivery.is_unheld = bool(unknown)
        if not delivery.is_unheld:
            delivery.sent_by = SentBy.OTHER_RANK_EARLIER
        self._losses.sent(delivery, self._core.now)
        self._core.renumbered(delivery)

    def _media_are_gone(self, concerned: Sequence[Awaited]) -> None:
        """Media that an earlier process submitted are gone with it."""
        words = "its media left the payload store with the process that held them"
        for awaited in list(concerned):
            if not awaited.is_ended:
                self._sending.fail(awaited, Failure(kind="failed", message=words))

    def on_notes(self, event: ev.NotesRead) -> None:
        """Workers have said something."""
        self._polling.notes.answered()
        for delivery, request, note in event.notes:
            if delivery.in_flight:
                self._act_on_note(delivery, request, note, event.store_identity)

    def _act_on_note(
        self, delivery: Delivery, request: str, note: Note, our_store: str
    ) -> None:
        # A worker that has our store, but not the identity it had before it was emptied: gone too.
        is_gone = note.reason == "gone"
        is_gone = is_gone or (note.reason == "store" and note.store == our_store)
        fingerprint = delivery.spec.fingerprint
        if is_gone:
            self._payloads_are_gone(delivery)
        elif note.reason == "busy":
            self._throttle.add(delivery, request, self._core.now)
            self._core.set_delivery_state(delivery, State.THROTTLED)
            self._throttled.add(fingerprint)
            self._core.why_late.set(Source.BUDGET, note.detail, fingerprint)
        elif note.reason == "stale":  # that worker takes no more
            words = f"{note.worker} ended: {note.detail}"
            self._core.ended_workers[delivery.spec.queue] = note
            self._core.why_late.set(Source.NOTE, words, fingerprint)
            self._core.warn(f"{words}; its samples are sent again")
            self._core.act(do.PublishAgain(delivery, request))
        else:
            words = (
                f"worker {note.worker} on queue {delivery.spec.queue}: {note.detail}"
            )
            self._core.why_late.set(Source.NOTE, words, fingerprint)
            self._core.warn(words)
            self._losses.not_read(delivery, self._core.now)

    def _payloads_are_gone(self, delivery: Delivery) -> None:
        if delivery.sent_by in (SentBy.EARLIER_PROCESS, SentBy.OTHER_RANK_EARLIER):
            self._media_are_gone(delivery.awaited)
        elif delivery.in_flight:
            self._send_again(delivery, delivery.in_flight)

    def follow(self, delivery: Delivery) -> None:
        """Look after a message that an earlier process sent."""
        self._losses.sent(delivery, self._core.now)
        self._core.resume(delivery)

    def send_throttled(self) -> None:
        """Send what may get a permit now; what is all sent is looked after again."""
        self._withdraw_budgets()
        for delivery, request in self._throttle.take(self._core.now):
            self._core.act(do.PublishAgain(delivery, request))
            if self._throttle.holds(delivery):
                continue
            self._core.set_delivery_state(delivery, State.IN_FLIGHT)
            self._losses.sent(delivery, self._core.now)
            # A group is put together once its parts are there: they are not awaited one by one.
            delivery.is_missed = bool(delivery.part_requests)

    def _withdraw_budgets(self) -> None:
        """Where nothing waits for a permit any more, that is no reason."""
        for fingerprint in list(self._throttled):
            if not self._throttle.waits_for(fingerprint):
                self._throttled.discard(fingerprint)
                self._core.why_late.withdraw(Source.BUDGET, fingerprint)


def _lost(awaited: Awaited) -> do.Lost:
    digest_of = {payload.name: payload.digest for payload in awaited.payloads}
    return do.Lost(awaited, digest_of, tuple(awaited.slots))


def _is_in_hand(awaited: Awaited, claimed: frozenset[str]) -> bool:
    return any(address in claimed for address in awaited.in_hand_addresses)
