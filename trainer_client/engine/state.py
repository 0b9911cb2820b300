"""The engine's state: events in, actions out. Pure and synchronous: no lock, no clock, no I/O, no randomness.

One loop owns it (`loop.py`); the same state runs under a virtual clock in `tests/simulation`. `Core` has what a
transition is. Policies decide: `chunk_accumulator`, `room`, `losses`, `judge_permits`, `groups`, `polling`. What
follows from what is in `intake`, `group_sealing`, `sending` and `tracking`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tasks.payloads import MAX_REQUEST_BYTES, PART_BYTES
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.core import Core
from trainer_client.engine.group_sealing import Sealing
from trainer_client.engine.groups import Groups, SharedKey
from trainer_client.engine.intake import Intake
from trainer_client.engine.judge_permits import Throttle
from trainer_client.engine.losses import LossPolicy
from trainer_client.engine.model import Awaited, Member, Slot
from trainer_client.engine.polling import Polling
from trainer_client.engine.sending import Sending
from trainer_client.engine.states import SentBy, State
from trainer_client.engine.tracking import Tracking
from trainer_client.engine.why_late import WhyLate


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the state must know of its client.

    Attributes:
        client_id: Begins the names of its payloads and requests; no other process has the same.
        reconcile_s, payload_ttl_s: As the settings of these names.
        num_encoders: Threads that encode.
        shared_key: Of several ranks: where the slots of a group are in Redis.
        part_bytes: Media that are larger lie in parts of at most so many bytes.
        max_request_bytes: A request is smaller.
    """

    run: str
    rank: int
    client_id: str
    max_store_bytes: int
    reconcile_s: float
    payload_ttl_s: float
    num_encoders: int
    shared_key: SharedKey | None = None
    part_bytes: int = PART_BYTES
    max_request_bytes: int = MAX_REQUEST_BYTES


class EngineState:
    """Everything that one client process waits for. Only its owner calls it, one event at a time."""

    def __init__(self, config: EngineConfig, now: float) -> None:
        self.config = config
        self.why_late = WhyLate()
        self.core = Core(config.client_id, self.why_late, config.part_bytes)
        self.core.now = now
        self.groups = Groups(config.run, config.rank, config.shared_key)
        self.throttle = Throttle()
        self.core.on_delivery_ended = self.throttle.discard
        self.polling = Polling(config.reconcile_s, config.payload_ttl_s, now)
        losses = LossPolicy(config.reconcile_s)
        self.sending = Sending(
            self.core, config.run, losses, self.throttle, config.max_request_bytes
        )
        self.sealing = Sealing(
            self.core, self.groups, self.sending, losses, self.polling
        )
        self.intake = Intake(
            self.core,
            self.groups,
            self.sealing,
            self.sending,
            config.num_encoders,
            config.max_store_bytes,
        )
        self.tracking = Tracking(
            self.core, self.sending, self.sealing, losses, self.throttle, self.polling
        )
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            ev.Submitted: self.intake.on_submitted,
            ev.WaitBegan: self._on_wait_began,
            ev.WaitEnded: self._on_wait_ended,
            ev.SlotsGivenUp: self._on_given_up,
            ev.GroupsIncomplete: self.sealing.on_incomplete,
            ev.TicketResumed: self._on_resumed,
            ev.Tick: self._on_nothing,
            ev.SampleEncoded: self.intake.on_encoded,
            ev.OutcomesFound: self._on_outcomes,
            ev.GroupLookedUp: self.sealing.on_group_looked_up,
            ev.PayloadStored: self.intake.on_stored,
            ev.PayloadRefused: self.intake.on_refused,
            ev.StoreMeasured: self.intake.on_measured,
            ev.Published: self.sending.on_published,
            ev.NumbersRead: self.tracking.on_numbers,
            ev.NotesRead: self.tracking.on_notes,
            ev.DeliveriesInspected: self.tracking.on_inspected,
            ev.Restored: self.tracking.on_restored,
            ev.RequestChecked: self.tracking.on_request_checked,
            ev.RequestsRead: self._on_requests_read,
            ev.Freed: self._on_freed,
            ev.Renewed: self.tracking.on_renewed,
            ev.MemberRegistered: self.sealing.on_registered,
            ev.DigestsRead: self.sealing.on_digests,
            ev.MembersRead: self.sealing.on_members,
            ev.GroupsPutBack: self.sealing.on_put_back,
        }

    @property
    def num_unsent(self) -> int:
        """Samples that were accepted and are not in a message yet. (What `async_reward: false` holds is not counted:
        nobody waits for that before `collect()`.)"""
        return self.core.num_unsettled + self.core.num_on_their_way

    @property
    def wake_at(self) -> float:
        """When a `Tick` is due."""
        times = [
            self.sending.accumulator.wake_at(self.core.released),
            self.throttle.wake_at(),
            self.polling.wake_at(),
            self.intake.wake_at,
        ]
        if self.core.released and self.core.is_quiet:
            times.append(self.groups.overdue_at())
        return min(times)

    def apply(self, event: ev.Event, now: float) -> list[do.Action]:
        """Take up what has happened; returns what is to be done about it."""
        self.core.now = now
        self._handlers[type(event)](event)
        self._go_on()
        return self.core.take_actions()

    def _on_outcomes(self, event: ev.OutcomesFound) -> None:
        if event.purpose is do.Purpose.FIRST:
            self.intake.on_first_outcomes(event.outcomes)
        else:
            self.tracking.on_outcomes(event)

    def _on_wait_began(self, event: ev.WaitBegan) -> None:
        self.core.begin_wait(event.waiter, event.steps)
        self.polling.hurry(self.core.now)

    def _on_wait_ended(self, event: ev.WaitEnded) -> None:
        self.core.end_wait(event.waiter)

    def _on_given_up(self, event: ev.SlotsGivenUp) -> None:
        for slot in event.slots:
            slot.is_given_up = True
            for awaited in dict.fromkeys(slot.awaited.values()):
                self.core.leave(slot, awaited)
                if not awaited.slots:
                    self.sending.give_up(awaited)
            self.intake.forget_members(slot)
        for member in self.groups.forget(event.slots):
            self.core.payloads.release(member)
            self.sending.go_alone(member.carried)
        for slot in event.slots:
            self.core.abandon(slot)

    def _on_resumed(self, event: ev.TicketResumed) -> None:
        slots_of: dict[str, list[Slot]] = {}
        for slot in event.slots:
            for awaited in slot.awaited.values():
                slots_of.setdefault(awaited.address, []).append(slot)
            self.core.take_up_slot(slot)
        requests = []
        for delivery in event.deliveries:
            self.tracking.follow(delivery)
            if delivery.awaited and delivery.sent_by is SentBy.EARLIER_PROCESS:
                request, known = delivery.request, delivery.digests
                requests.append(
                    do.SentRequest(
                        request, known.get(request, ""), delivery.spec.is_combined
                    )
                )
        self.core.act(do.ReadRequests(requests, slots_of))

    def _on_requests_read(self, event: ev.RequestsRead) -> None:
        """Keep the payloads of an earlier process until all is answered that their samples await.

        A group of theirs that another rank has sent may need them too: this rank cannot read the request of that.
        """
        for address, name, payload_digest in event.payloads:
            for slot in event.slots_of[address]:
                for awaited in slot.awaited.values():
                    if not awaited.is_ended:
                        self.core.payloads.use_foreign(name, payload_digest, awaited)
        # What was answered before its payloads were known here needs them no more.
        self.core.payloads.keep_unused(name for _, name, _ in event.payloads)

    def _on_freed(self, _event: ev.Freed) -> None:
        self.core.freed()

    def _on_nothing(self, _event: ev.Event) -> None:
        """Time has passed, or something is done."""

    def _go_on(self) -> None:
        """Do what can be done now."""
        self.intake.start_encoding()
        self.intake.look_up()
        self.intake.start_storing()
        self.sealing.release_groups()
        self.sending.send_chunks()
        self.tracking.send_throttled()
        self.tracking.poll()
        self.core.free()

    def check(self) -> None:
        """Assert the invariants; in tests, after each event."""
        self.core.check()
        self.intake.check()
        for awaited in self.core.awaited.values():
            self._check_is_found(awaited)
        for delivery in self.core.deliveries.values():
            is_throttled = delivery.state is State.THROTTLED
            assert is_throttled == self.throttle.holds(delivery), delivery.request

    def _check_is_found(self, awaited: Awaited) -> None:
        """Nothing is awaited without a message, a timer, or something under way that will move it."""
        state, address = awaited.state, awaited.address
        in_accumulator = awaited in self.sending.accumulator
        assert in_accumulator == (state in (State.HELD, State.LINGERING)), address
        if state is State.LOOKING_UP:
            assert self._is_looking_up(awaited), address
        elif state is State.STORING:
            assert self._is_storing(awaited), address
        elif state is State.WITH_GROUP:
            assert awaited in self._carried(awaited), address

    def _is_looking_up(self, awaited: Awaited) -> bool:
        if awaited.group is not None:
            return self.core.num_group_calls > 0
        return self.intake.is_looking_up(awaited)

    @staticmethod
    def _is_storing(awaited: Awaited) -> bool:
        slot = awaited.source
        if slot is None or awaited.has_media_stored:
            return False
        return awaited in slot.unsettled

    def _carried(self, awaited: Awaited) -> list[Awaited]:
        """What groups will carry that are filling, or sealed, as far as it may be this outcome."""
        carried: list[Awaited] = []
        for group in self.groups:
            for member in group.members.values():
                carried += member.carried
        for slot in awaited.slots:
            for user in slot.unsettled:
                carried += user.carried if isinstance(user, Member) else ()
        for other in self.core.awaited.values():
            carried += other.group.carried if other.group is not None else ()
        return carried
