"""The engine's state: events in, actions out. Pure and synchronous: no lock, no clock, no I/O, no randomness.

One loop owns it (`loop.py`); the same state runs under a virtual clock in `tests/simulation`. `Core` has what a
transition is; the policies decide (`accumulator`, `room`, `losses`, `throttle`, `groups`); here is what follows from what.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.groups import digest
from tasks.messages import Failure, Note, Outcome, SampleRequest
from tasks.rewards import RewardSpec
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.accumulator import Accumulator
from trainer_client.engine.core import Core
from trainer_client.engine.encoding import EncodedSample, refs_of
from trainer_client.engine.groups import Group, Groups, SharedKey
from trainer_client.engine.losses import LossPolicy, loaders_of
from trainer_client.engine.model import (
    Awaited,
    Delivery,
    Member,
    Payload,
    PayloadUser,
    Slot,
    StepKey,
)
from trainer_client.engine.polling import Polling
from trainer_client.engine.room import Room
from trainer_client.engine.states import (
    IN_DELIVERY,
    PayloadStage,
    SentBy,
    SlotStage,
    State,
)
from trainer_client.engine.throttle import Throttle
from trainer_client.engine.why_late import Source, WhyLate

UNSTORED_BYTES = 256 * 2**20
"""Samples are encoded ahead of their storing up to so many bytes: two videos, or some hundred images."""

UNSTORED_SAMPLES = 32
"""And up to so many samples."""

NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the state must know of its client.

    Attributes:
        client_id: Begins the names of its payloads and requests; no other process has the same.
        reconcile_s, payload_ttl_s: As the settings of these names.
        num_encoders: Threads that encode.
        shared_key: Of several ranks: where the slots of a group are in Redis.
    """

    run: str
    rank: int
    client_id: str
    max_store_bytes: int
    reconcile_s: float
    payload_ttl_s: float
    num_encoders: int
    shared_key: SharedKey | None = None


class EngineState:
    """Everything that one client process waits for. Only its owner calls it, one event at a time."""

    def __init__(self, config: EngineConfig, now: float) -> None:
        self.config = config
        self.why_late = WhyLate()
        self.core = Core(config.client_id, self.why_late)
        self.accumulator = Accumulator()
        self.groups = Groups(config.run, config.rank, config.shared_key)
        self.losses = LossPolicy(config.reconcile_s)
        self.throttle = Throttle()
        self.room = Room(config.max_store_bytes)
        self.polling = Polling(config.reconcile_s, config.payload_ttl_s, now)
        self.num_submitted = 0
        """Samples that were taken up, ever."""
        self._to_encode: deque[Slot] = deque()
        self._num_encoding = 0
        self._unstored_bytes = 0
        self._to_store: deque[Payload] = deque()
        self._is_publishing = False
        self._to_look_up: list[Slot] = []
        """Of their outcomes it is not known yet whether they are there already."""
        self._looked_up: list[Slot] = []
        """Those that the `LookUp` under way is for."""
        self._to_publish: list[Delivery] = []
        self._waits: dict[int, frozenset[StepKey]] = {}
        self._throttled: set[str] = set()
        """Fingerprints of rewards that wait, or waited a moment ago, for a permit of their judge."""
        self._num_group_calls = 0
        """Calls under way that may seal a group."""
        self._now = now

    # --- what others may ask ---------------------------------------------------------

    @property
    def num_unsent(self) -> int:
        """Samples that were accepted and are not in a message yet. (What `async_reward: false` holds is not counted:
        nobody waits for that before `collect()`.)"""
        return self.core.num_unsettled + self.core.num_on_their_way

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is on its way that could still fill a chunk."""
        if self.core.num_unsettled or self._num_group_calls:
            return False
        return not self.core.num_in(State.LOOKING_UP, State.RESTORING)

    @property
    def wake_at(self) -> float:
        """When a `Tick` is due."""
        times = [
            self.accumulator.wake_at(self._released),
            self.throttle.wake_at(),
            self.polling.wake_at(),
        ]
        if self._to_store and not self.room.is_measuring:
            times.append(self.room.measure_at)
        if self._waits:
            times.append(self.groups.overdue_at())
        return min(times)

    def apply(self, event: ev.Event, now: float) -> list[do.Action]:
        """Take up what has happened; returns what is to be done about it."""
        self._now = now
        handler = _HANDLERS[type(event)]
        handler(self, event)
        self._go_on()
        return self.core.take_actions()

    # --- samples ---------------------------------------------------------------------

    def _on_submitted(self, event: ev.Submitted) -> None:
        self.num_submitted += len(event.slots)
        for slot in event.slots:
            self.core.open_slot(slot)
            self._to_encode.append(slot)

    def _start_encoding(self) -> None:
        """Keep the encoders busy, but no further ahead of the store than its room lets media go."""
        while self._to_encode and self._may_encode():
            slot = self._to_encode.popleft()
            if slot.is_given_up:
                self.core.settle(slot)
                continue
            slot.stage = SlotStage.ENCODING
            self._num_encoding += 1
            self.core.act(do.Encode(slot))

    def _may_encode(self) -> bool:
        if self._num_encoding >= 2 * self.config.num_encoders:
            return False
        is_far_ahead = len(self._to_store) >= UNSTORED_SAMPLES
        return not is_far_ahead and self._unstored_bytes < UNSTORED_BYTES

    def _on_encoded(self, event: ev.SampleEncoded) -> None:
        slot, encoded = event.slot, event.encoded
        self._num_encoding -= 1
        if slot.is_given_up:
            self.core.settle(slot)
            return
        slot.encoded = encoded
        if encoded.problem is not None:
            self.core.fail_slot(slot, encoded.problem)
            self._add_members(slot, encoded)
            self.core.settle_if_stored(slot)
            return

        slot.stage = SlotStage.LOOKING_UP
        if self._await_pointwise(slot, encoded):
            self._to_look_up.append(slot)
        else:
            self._store_media(slot)

    def _await_pointwise(self, slot: Slot, encoded: EncodedSample) -> list[Awaited]:
        """Let a slot await its own outcomes; returns those that nobody awaited yet."""
        assert slot.sample is not None
        new, awaited_by_name = [], {}
        for spec in slot.rewards:
            if spec.is_groupwise:
                continue
            identity = encoded.identities[spec.name]
            awaited = self.core.awaited.get(identity.address)
            if awaited is None:
                awaited = Awaited(
                    address=identity.address,
                    spec=spec,
                    prompt=slot.sample.prompt,
                    beside=identity.beside,
                    source=slot,
                )
                self.core.add(awaited, State.LOOKING_UP)
                slot.unsettled[awaited] = None
                new.append(awaited)
            self.core.join(slot, awaited)
            awaited_by_name[spec.name] = awaited
        self.core.set_awaited(slot, awaited_by_name)
        return new

    def _look_up(self) -> None:
        """Ask for what is new, all of it at once, while no such question is open."""
        if self._looked_up or not self._to_look_up:
            return
        self._looked_up, self._to_look_up = self._to_look_up, []
        addresses = []
        for slot in self._looked_up:
            addresses += [awaited.address for awaited in _awaited_in(slot.unsettled)]
        self.core.act(do.LookUp(addresses, do.Purpose.FIRST))

    def _on_outcomes(self, event: ev.OutcomesFound) -> None:
        if event.purpose is do.Purpose.FIRST:
            self._on_first_outcomes(event.outcomes)
            return
        num_new = self._take_answers(event.outcomes)
        if event.purpose is do.Purpose.POLL:
            self._end_poll(num_new)

    def _on_first_outcomes(self, outcomes: Mapping[str, Outcome | None]) -> None:
        looked_up, self._looked_up = self._looked_up, []
        for slot in looked_up:
            for awaited in _awaited_in(slot.unsettled):
                outcome = outcomes.get(awaited.address)
                if outcome is None:
                    continue
                if outcome.is_final:
                    self._answer(awaited, outcome, is_hit=True)
                else:
                    awaited.attempt = outcome.attempt + 1
        for slot in looked_up:
            self._store_media(slot)

    def _store_media(self, slot: Slot) -> None:
        """Its outcomes were looked up: what is not there needs its media stored. Then its groups get it.

        What others await of a slot that was given up meanwhile is stored all the same.
        """
        encoded, slot.encoded = slot.encoded, None
        slot.stage = SlotStage.STORING
        for awaited in _awaited_in(slot.unsettled):
            self.core.move(awaited, State.STORING)
            awaited.media = self._use_contents(awaited, awaited.spec, encoded)
        if not slot.is_given_up:
            self._add_members(slot, encoded)
        for user in list(slot.unsettled):
            self._go_if_stored(user)
        self.core.settle_if_stored(slot)

    def _use_contents(
        self, user: PayloadUser, spec: RewardSpec, encoded: EncodedSample
    ) -> dict[str, Any]:
        """What a reward takes of a sample's media, as requests name it; what is new waits to be stored."""
        media: dict[str, Any] = {}
        for name, contents in encoded.fields_for(spec).items():
            names = []
            for content in contents:
                payload, is_new = self.core.payloads.use(content, user)
                names.append(payload.name)
                if is_new:
                    self._to_store.append(payload)
                    self._unstored_bytes += content.num_bytes
            media[name] = refs_of(contents, names, is_list=name in encoded.lists)
        return media

    def _add_members(self, slot: Slot, encoded: EncodedSample) -> None:
        """Make a slot a member of the groups of its groupwise rewards."""
        for spec in slot.rewards:
            if not spec.is_groupwise:
                continue
            identity = encoded.identities[spec.name]
            member = Member(
                slot,
                spec,
                key=identity.key,
                address=identity.address,
                prompt=encoded.prompt,
                beside=identity.beside,
                failure=encoded.problem,
                source=slot,
            )
            slot.unsettled[member] = None
            if encoded.problem is None:
                member.media = self._use_contents(member, spec.part, encoded)
                member.carried = self._carried_by(member)
            else:
                self._go_if_stored(member)

    def _carried_by(self, member: Member) -> list[Awaited]:
        """The outcome of the same sample for the reward that is ranked, if it may go with the group."""
        if not self.groups.may_carry or member.spec.how != "rank":
            return []
        carried = []
        for awaited in _awaited_in(member.slot.unsettled):
            may_wait = awaited.spec.async_reward and not self._is_carried(awaited)
            if awaited.address == member.address and may_wait:
                carried.append(awaited)
        return carried

    def _is_carried(self, awaited: Awaited) -> bool:
        """Whether another group of the same slot carries it already."""
        slot = awaited.source
        members = slot.unsettled if slot is not None else ()
        return any(isinstance(m, Member) and awaited in m.carried for m in members)

    # --- payloads --------------------------------------------------------------------

    def _start_storing(self) -> None:
        """Store what there is room for, first come, first stored."""
        while self._to_store:
            payload = self._to_store[0]
            if not payload.users:  # nobody needs it any more
                self._to_store.popleft()
                self._unstored_bytes -= payload.content.num_bytes
                continue
            if not self.room.admit(payload.content.num_bytes):
                break
            self._store_first()
        if self._to_store and self.room.is_due(self._now):
            self.room.is_measuring = True
            self.core.act(do.MeasureStore(self._queues_if_stuck()))
        is_full = bool(self._to_store) and self.room.is_known
        words = self.room.words if is_full else None
        self.why_late.put(Source.STORE_FULL, words)

    def _store_first(self) -> None:
        payload = self._to_store.popleft()
        payload.stage = PayloadStage.STORING
        self.core.act(do.Store(payload.name, payload.content))

    def _queues_if_stuck(self) -> list[str]:
        """Queues of the groups that a full store may be waiting for, if nothing has left it for long."""
        if not self.room.is_stuck(self._now):
            return []
        users = self._to_store[0].users
        slots = [user.source for user in users if user.source is not None]
        groupwise = [s for slot in slots for s in slot.rewards if s.is_groupwise]
        return sorted({spec.queue for spec in groupwise})

    def _on_measured(self, event: ev.StoreMeasured) -> None:
        self.room.measured(event.num_bytes, self._now)
        is_deadlock = event.has_messages is False and self.room.is_stuck(self._now)
        if is_deadlock and self._to_store and self._to_store[0].users:
            # Nothing leaves the store and nothing is queued: what it holds are groups that lack
            # members, of this rank or others, and this may be one.
            self.room.admit_anyway(self._to_store[0].content.num_bytes)
            self._store_first()

    def _on_stored(self, event: ev.PayloadStored) -> None:
        content = self.core.payloads.content_of(event.name)
        self._unstored_bytes -= content.num_bytes
        payload = self.core.payloads.stored(event.name)
        if payload is None:
            return
        for user in list(payload.users):
            self._go_if_stored(user)

    def _go_if_stored(self, user: PayloadUser) -> None:
        """Send an outcome, or add a member to its group, once its media are in the store."""
        slot = user.source
        if slot is None or user not in slot.unsettled or not user.has_media_stored:
            return
        if isinstance(user, Awaited) and self._is_carried(user):
            self.core.move(user, State.WITH_GROUP)
        elif isinstance(user, Awaited):
            self._accumulate(user)
        elif isinstance(user, Member):
            self._add_to_group(user)
        self.core.unsettle(user)

    # --- groups ----------------------------------------------------------------------

    def _add_to_group(self, member: Member) -> None:
        slot = member.slot
        if slot.is_given_up:
            self.core.payloads.release(member)
            return
        member.request = self._member_request(member)
        reason = self.groups.why_given_up(slot)
        group = self.groups.add(member, self._now)
        if reason is not None:
            self.core.fail_reward(slot, member.spec, reason, self._now)
        elif self.groups.is_shared:
            self._register(group, member)
        elif group.is_full:
            self._seal(group)

    def _member_request(self, member: Member) -> SampleRequest:
        """What workers are told of a member."""
        return SampleRequest(
            address=member.address,
            prompt=member.prompt,
            media=member.media,
            failure=member.failure,
            **member.beside.as_fields(),
        )

    def _seal(self, group: Group) -> None:
        members = list(group.members.items())
        self._join_group(group, self.groups.seal(group), dict(members))

    def _join_group(
        self, group: Group, sealed: Awaited, members: Mapping[Any, Member]
    ) -> None:
        """Let the members of this rank await the outcome of their sealed group."""
        awaited = self.core.awaited.get(sealed.address)
        is_new = awaited is None
        if awaited is None:
            awaited = sealed
            self.core.add(awaited, State.LOOKING_UP)
        group.awaited = awaited
        left_behind: dict[Awaited, None] = {}
        for position, member in members.items():
            index = sealed.group.index_of.get(position) if sealed.group else None
            if index is not None:
                self._join_member(group, awaited, member, index, left_behind)
        for before in left_behind:
            # It has the payloads of those of its members that stayed the same.
            for payload in before.payloads:
                self.core.payloads.share(payload, awaited)
            if not before.slots:
                self._give_up(before)
        if not awaited.slots:
            self._give_up(awaited)
        elif is_new:
            self._num_group_calls += 1
            self.core.act(do.LookUpGroup(awaited))

    def _join_member(
        self,
        group: Group,
        awaited: Awaited,
        member: Member,
        index: int,
        left_behind: dict[Awaited, None],
    ) -> None:
        slot, name = member.slot, group.spec.name
        if slot.is_given_up:
            self.core.payloads.release(member)
            return
        if slot.problem is not None:
            return
        before = slot.awaited.get(name)
        if before is not None and before.outcome is not None:
            self.core.payloads.release(member)
            return
        if before is not None and before is not awaited:
            self.core.leave(slot, before)
            left_behind[before] = None

        slot.member_index[name] = (
            index  # of equal members in other slots, the order is the same
        )
        self.core.join(slot, awaited)
        self.core.set_awaited(slot, {**slot.awaited, name: awaited})
        self.core.payloads.hand_over(member, awaited)
        carried, member.carried = member.carried, []
        if awaited.state is State.LOOKING_UP and awaited.group is not None:
            awaited.group.carried += carried
        else:  # a group of equal members is on its way already, without these
            self._go_alone(carried)

    def _go_alone(self, carried: Iterable[Awaited]) -> None:
        """Outcomes that waited for a group go by themselves."""
        for awaited in carried:
            if awaited.state is State.WITH_GROUP:
                self._accumulate(awaited)

    def _on_group_looked_up(self, event: ev.GroupLookedUp) -> None:
        self._num_group_calls -= 1
        group, outcome = event.group, event.outcome
        if group.is_ended or group.group is None:
            return
        group.attempt = event.attempt
        if outcome is not None and group.accepts(outcome):
            self._answer(group, outcome, is_hit=True)
            return
        plan = group.group
        plan.members = _next_attempts(plan.members, event.parts)
        plan.comparisons = _next_attempts(plan.comparisons, event.parts)
        if event.number:
            self._watch_other_ranks(group, event.number)
        else:
            self._accumulate(group)

    def _watch_other_ranks(self, group: Awaited, number: int) -> None:
        """Another rank has sent this group: its message is looked after here too."""
        delivery = Delivery(
            request=self.core.new_name("other-rank"),
            label="",
            spec=group.spec,
            sent_by=SentBy.OTHER_RANK,
            awaited=[group],
            pause_s=self.config.reconcile_s,
            number=number,
        )
        self.losses.sent(delivery, self._now)
        self.core.take_up(delivery, State.IN_FLIGHT)
        assert group.group is not None
        carried, group.group.carried = group.group.carried, []
        self._go_alone(carried)

    def _register(self, group: Group, member: Member) -> None:
        self._num_group_calls += 1
        position = self.groups.position_of(member)
        self.core.act(
            do.RegisterMember(group.shared_key, position, member, group.size or 0)
        )

    def _on_registered(self, event: ev.MemberRegistered) -> None:
        self._num_group_calls -= 1
        member, found = event.member, event.found
        slot = member.slot
        group = self.groups.of_member(member)
        if group is None or slot.is_given_up:
            return
        if found.state in ("full", "scored", "size"):
            failure = self.groups.refuse(group, member, found)
            self.core.fail_reward(slot, member.spec, failure, self._now)
            self.core.payloads.release(member)
        elif found.state == "sealed":
            self._read_if_changed(group, found.digest)

    def _read_if_changed(self, group: Group, found: str) -> None:
        """A group is sealed: read its members, unless these are known already."""
        is_joined = all(group.has_joined(m) for m in group.members.values())
        if group.is_reading or (found == group.digest and is_joined):
            return
        group.is_reading = True
        self._num_group_calls += 1
        self.core.act(do.ReadMembers(group.shared_key, found))

    def _on_digests(self, event: ev.DigestsRead) -> None:
        self.polling.digests_read()
        for shared_key, found in event.digests.items():
            group = self.groups.of_shared_key(shared_key)
            if found and group is not None and not group.is_answered:
                self._read_if_changed(group, found)

    def _on_members(self, event: ev.MembersRead) -> None:
        self._num_group_calls -= 1
        group = self.groups.of_shared_key(event.shared_key)
        if group is None:
            return
        group.is_reading = False
        found = digest([key for key, _ in event.members.values()])
        if found != event.digest or not event.members:
            return  # changed between the two questions: the next one tells
        self._join_group(
            group,
            self.groups.seal_shared(group, event.members),
            dict(group.members),
        )

    def _on_put_back(self, event: ev.GroupsPutBack) -> None:
        for shared_key in event.lost:
            group = self.groups.of_shared_key(shared_key)
            for member in list(group.members.values()) if group else ():
                self._register(group, member)  # type: ignore[arg-type]

    def _on_incomplete(self, event: ev.GroupsIncomplete) -> None:
        told = self.groups.give_up_incomplete(event.split, event.step, event.words)
        for group, member, failure in told:
            self.core.fail_reward(member.slot, group.spec, failure, self._now)

    def _release_groups(self) -> None:
        """Somebody collects, and nothing is on its way: groups are as large as they are, and keep nobody waiting."""
        if not self._released or not self.is_quiet:
            return
        for group in self.groups.of_unknown_size(self._released):
            self._seal(group)
        self._go_alone(self.groups.take_overdue(self._now))

    # --- deliveries ------------------------------------------------------------------

    def _accumulate(self, awaited: Awaited) -> None:
        """Its media are stored: it waits for its chunk."""
        if not awaited.slots:
            self._give_up(awaited)
            return
        self.core.move(awaited, self.accumulator.add(awaited, self._now))

    def _send_chunks(self) -> None:
        chunks = self.accumulator.take(
            self._now,
            self._released,
            is_flushing=bool(self._waits) and self.is_quiet,
        )
        for chunk in chunks:
            self._to_publish.append(self._delivery_of(chunk))
        if self._to_publish and not self._is_publishing:
            self._is_publishing = True
            deliveries, self._to_publish = self._to_publish, []
            self.core.act(do.Publish(deliveries))

    def _delivery_of(self, chunk: list[Awaited]) -> Delivery:
        first = chunk[0]
        awaited = list(chunk)
        num_samples = len(awaited)
        if first.group is not None:
            num_samples = len(first.group.members)
            carried, first.group.carried = first.group.carried, []
            awaited += [a for a in carried if a.state is State.WITH_GROUP]
        request = self.core.new_name("request")
        model = first.spec.reward_model.rpartition(".")[2]
        step = first.slots[0].step
        delivery = Delivery(
            request=request,
            label=f"{model} x {num_samples}, run {self.config.run} step {step}",
            spec=first.spec,
            sent_by=SentBy.US,
            awaited=awaited,
            pause_s=self.losses.first_pause_s(awaited),
            part_requests=_part_requests(request, first),
        )
        self.core.take_up(delivery, State.PUBLISHING)
        for one in awaited:
            one.num_sends += 1
        return delivery

    def _on_published(self, event: ev.Published) -> None:
        for delivery, number in event.numbers.items():
            delivery.number = number
            if delivery.state is State.PUBLISHING:
                self._is_publishing = False
                self.core.set_delivery_state(delivery, State.IN_FLIGHT)
                self.losses.sent(delivery, self._now)
            self.core.renumbered(delivery)
            if not delivery.awaited:  # answered, or given up, while it was on its way
                self.core.payloads.free_later(delivery.requests)

    def _answer(
        self, awaited: Awaited, outcome: Outcome, *, is_hit: bool = False
    ) -> None:
        fingerprint = awaited.spec.fingerprint
        self._forget(awaited)
        self.core.answer(awaited, outcome, self._now, is_hit=is_hit)
        self.throttle.count_answer(fingerprint)
        self.why_late.withdraw(Source.NOTE, fingerprint)

    def _give_up(self, awaited: Awaited) -> None:
        if not awaited.is_ended:
            self._forget(awaited)
            self.core.give_up(awaited)

    def _forget(self, awaited: Awaited) -> None:
        """Nothing is to be done about it any more."""
        self.accumulator.discard(awaited)
        if awaited.group is not None and not awaited.is_ended:
            carried, awaited.group.carried = awaited.group.carried, []
            self._go_alone(carried)
        delivery = awaited.delivery
        if delivery is not None and delivery.awaited == [awaited]:  # the last of it
            self.throttle.discard(delivery)

    def _take_answers(self, outcomes: Mapping[str, Outcome | None]) -> int:
        """Outcomes that were asked for; returns how many were awaited."""
        num_new = 0
        for address, outcome in outcomes.items():
            awaited = self.core.awaited.get(address)
            if outcome is None or awaited is None or not awaited.accepts(outcome):
                continue
            self._answer(awaited, outcome)
            num_new += 1
        return num_new

    # --- polling ---------------------------------------------------------------------

    def _poll(self) -> None:
        """Ask what is due to be asked."""
        due = self.polling.take_due(self._now)
        if due.numbers:
            self._read_numbers()
        if due.digests and self.groups.is_shared:
            self._read_digests()
        if due.notes:
            self._read_notes()
        if due.inspect:
            self._inspect()
        if due.everything:
            self._look_up_everything()
        if due.renew:
            self._renew()

    def _read_numbers(self) -> None:
        queues = sorted({d.spec.queue for d in self.core.deliveries.values()})
        if queues:
            self.core.act(do.ReadNumbers(queues))
        else:
            self._end_poll(0)

    def _end_poll(self, num_new: int) -> None:
        self.polling.polled(num_new, self._now, is_awaited=bool(self._waits))

    def _on_numbers(self, event: ev.NumbersRead) -> None:
        """Look at what has left its queue: workers may have answered it."""
        self.polling.numbers_read(event.sent, event.taken)
        addresses: dict[str, None] = {}
        for delivery in self.core.sent_deliveries():
            if self.polling.has_left_queue(delivery.spec.queue, delivery.number):
                addresses.update((a.address, None) for a in delivery.awaited)
        if addresses:
            self.core.act(do.LookUp(list(addresses), do.Purpose.POLL))
        else:
            self._end_poll(0)

    def _look_up_everything(self) -> None:
        """Also what is still queued: another client may have had the same scored."""
        addresses: dict[str, None] = {}
        for delivery in self.core.deliveries.values():
            addresses.update((a.address, None) for a in delivery.awaited)
        if addresses:
            self.core.act(do.LookUp(list(addresses), do.Purpose.EVERYTHING))

    def _read_digests(self) -> None:
        keys = [group.shared_key for group in self.groups.unanswered()]
        if keys:
            self.core.act(do.ReadDigests(keys))
        else:
            self.polling.digests_read()

    def _read_notes(self) -> None:
        requests = []
        for delivery in self.core.sent_deliveries():
            if self.polling.has_left_queue(delivery.spec.queue, delivery.number):
                requests += [(delivery, request) for request in delivery.requests]
        if requests:
            self.polling.reading_notes()
            self.core.act(do.ReadNotes(requests))

    def _renew(self) -> None:
        """Let what is still needed live on. What is gone is stored again when its message is sent again."""
        requests = (r for d in self.core.deliveries.values() for r in d.requests)
        names = [*self.core.payloads.names_in_use(), *requests]
        if names:
            self.core.act(do.Renew(names))

    # --- losses ----------------------------------------------------------------------

    def _inspect(self) -> None:
        """Look after what may be lost; and put members into their slots again, should Redis have been emptied."""
        due = [
            delivery
            for delivery in self.core.deliveries.values()
            if delivery.state is State.IN_FLIGHT
            and delivery.look_at <= self._now
            and delivery.in_flight
        ]
        if due:
            self.polling.inspecting()
            suspicions = [
                do.Suspicion(delivery, delivery.number, tuple(delivery.in_flight))
                for delivery in due
            ]
            self.core.act(do.InspectDeliveries(suspicions))
        if self.groups.is_shared:
            self._put_groups_back()

    def _put_groups_back(self) -> None:
        for group in self.groups.unanswered():
            for member in list(group.members.values()):
                self._register(group, member)
        answered = []
        for group in self.groups.answered():
            awaited = group.awaited
            if awaited is not None and awaited.outcome is not None:
                answered.append(
                    do.AnsweredGroup(
                        shared_key=group.shared_key,
                        digest=group.digest,
                        address=awaited.address,
                        attempt=awaited.attempt,
                        outcome=awaited.outcome,
                    )
                )
        if answered:
            self.core.act(do.PutGroupsBack(answered))

    def _on_inspected(self, event: ev.DeliveriesInspected) -> None:
        self.polling.inspected()
        self._take_answers(event.outcomes)
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
        is_waiting = delivery in event.in_queue
        if not is_waiting and not loaders_of(delivery.spec, event.workers):
            lost = [a for a in in_flight if not _is_in_hand(a, event.claimed)]
            if len(lost) < len(in_flight):
                self.losses.seen_in_hand(delivery)
        if self.losses.is_lost(delivery, len(lost), self._now):
            self._send_again(delivery, lost)

    def _send_again(self, delivery: Delivery, lost: Sequence[Awaited]) -> None:
        """What is lost goes once more: in a new message if this process has the media, else as it was."""
        if delivery.sent_by is SentBy.OTHER_RANK_EARLIER:
            self.losses.sent(delivery, self._now)
            return  # its rank sends it again, or whoever resumes that rank's ticket
        self.losses.grow_pause(delivery, self._now)
        if delivery.sent_by is SentBy.EARLIER_PROCESS:
            self.core.act(do.CheckRequest(delivery))
        else:
            self._restore(delivery, lost)

    def _restore(self, delivery: Delivery, lost: Sequence[Awaited]) -> None:
        group = next((a for a in lost if a.group is not None), None)
        restored = []
        for awaited in lost:
            if group is not None and awaited.group is None:
                self.core.move(awaited, State.WITH_GROUP)
                assert group.group is not None
                group.group.carried.append(awaited)
            else:
                self.core.move(awaited, State.RESTORING)
                restored.append(awaited)
        if delivery.state is State.THROTTLED:
            self.throttle.discard(delivery)
            self.core.set_delivery_state(delivery, State.IN_FLIGHT)
        if restored:
            self.core.act(do.Restore([_lost(awaited) for awaited in restored]))

    def _on_restored(self, event: ev.Restored) -> None:
        for awaited, problem in event.problems.items():
            if awaited.state is not State.RESTORING:
                continue
            if problem is not None:
                self._fail(awaited, problem)
            else:
                self._accumulate(awaited)

    def _fail(self, awaited: Awaited, problem: Failure) -> None:
        self._answer(awaited, Outcome(failure=problem, attempt=awaited.attempt))

    def _on_request_checked(self, event: ev.RequestChecked) -> None:
        delivery = event.delivery
        if not delivery.awaited:
            return
        if event.is_there:
            self.core.act(do.PublishAgain(delivery, delivery.request))
        else:
            self._media_are_gone(delivery)

    def _media_are_gone(self, delivery: Delivery) -> None:
        """Media that an earlier process submitted are gone with it."""
        words = "its media left the payload store with the process that held them"
        for awaited in list(delivery.awaited):
            self._fail(awaited, Failure(kind="failed", message=words))

    # --- notes -----------------------------------------------------------------------

    def _on_notes(self, event: ev.NotesRead) -> None:
        self.polling.notes_read()
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
            self.throttle.add(delivery, request, self._now)
            self.core.set_delivery_state(delivery, State.THROTTLED)
            self._throttled.add(fingerprint)
            self.why_late.set(Source.BUDGET, note.detail, fingerprint)
        elif note.reason == "stale":  # that worker takes no more
            words = f"{note.worker} ended: {note.detail}"
            self.core.ended_workers[delivery.spec.queue] = note
            self.why_late.set(Source.NOTE, words, fingerprint)
            self.core.warn(f"{words}; its samples are sent again")
            self.core.act(do.PublishAgain(delivery, request))
        else:
            words = (
                f"worker {note.worker} on queue {delivery.spec.queue}: {note.detail}"
            )
            self.why_late.set(Source.NOTE, words, fingerprint)
            self.core.warn(words)
            self.losses.not_read(delivery, self._now)

    def _payloads_are_gone(self, delivery: Delivery) -> None:
        if delivery.sent_by in (SentBy.EARLIER_PROCESS, SentBy.OTHER_RANK_EARLIER):
            self._media_are_gone(delivery)
        elif delivery.in_flight:
            self._send_again(delivery, delivery.in_flight)

    def _send_throttled(self) -> None:
        """Send what may get a permit now; what is all sent is looked after again."""
        self._withdraw_budgets()
        for delivery, request in self.throttle.take(self._now):
            self.core.act(do.PublishAgain(delivery, request))
            if self.throttle.holds(delivery):
                continue
            self.core.set_delivery_state(delivery, State.IN_FLIGHT)
            self.losses.sent(delivery, self._now)
            # A group is put together once its parts are there: they are not awaited one by one.
            delivery.is_missed = bool(delivery.part_requests)

    def _withdraw_budgets(self) -> None:
        """Where nothing waits for a permit any more, that is no reason."""
        for fingerprint in list(self._throttled):
            if not self.throttle.waits_for(fingerprint):
                self._throttled.discard(fingerprint)
                self.why_late.withdraw(Source.BUDGET, fingerprint)

    # --- callers ---------------------------------------------------------------------

    @property
    def _released(self) -> frozenset[StepKey]:
        """Steps that somebody collects."""
        return frozenset().union(*self._waits.values())

    def _on_wait_began(self, event: ev.WaitBegan) -> None:
        self._waits[event.waiter] = event.steps
        self.polling.hurry(self._now)

    def _on_wait_ended(self, event: ev.WaitEnded) -> None:
        self._waits.pop(event.waiter, None)

    def _on_given_up(self, event: ev.SlotsGivenUp) -> None:
        for slot in event.slots:
            slot.is_given_up = True
            for awaited in dict.fromkeys(slot.awaited.values()):
                self.core.leave(slot, awaited)
                if not awaited.slots:
                    self._give_up(awaited)
        for member in self.groups.forget(event.slots):
            self.core.payloads.release(member)
            self._go_alone(member.carried)
        for slot in event.slots:
            self.core.abandon(slot)

    def _on_resumed(self, event: ev.TicketResumed) -> None:
        for slot in event.slots:
            self.core.take_up_slot(slot)
        read = []
        for delivery in event.deliveries:
            self.losses.sent(delivery, self._now)
            self.core.resume(delivery)
            if delivery.awaited and delivery.sent_by is SentBy.EARLIER_PROCESS:
                is_group = delivery.spec.how in ("rank", "wins")
                read.append((delivery.request, is_group))
        self.core.act(do.ReadRequests(read))

    def _on_requests_read(self, event: ev.RequestsRead) -> None:
        for address, name, payload_digest in event.payloads:
            awaited = self.core.awaited.get(address)
            if awaited is not None:
                self.core.payloads.use_foreign(name, payload_digest, awaited)

    def _on_freed(self, _event: ev.Freed) -> None:
        self.core.freed()

    def _on_nothing(self, _event: ev.Event) -> None:
        """Time has passed, or something is done."""

    # --- whatever follows from any event ----------------------------------------------

    def _go_on(self) -> None:
        """Do what can be done now."""
        self._start_encoding()
        self._look_up()
        self._start_storing()
        self._release_groups()
        self._send_chunks()
        self._send_throttled()
        self._poll()
        self.core.free()

    def check(self) -> None:
        """Assert the invariants; in tests, after each event."""
        self.core.check()
        for awaited in self.core.awaited.values():
            self._check_found(awaited)
        queued = [p for p in self._to_store if p.stage is not PayloadStage.WAITING]
        assert not queued, "what waits for room is not under way"
        for delivery in self.core.deliveries.values():
            is_throttled = delivery.state is State.THROTTLED
            assert is_throttled == self.throttle.holds(delivery), delivery.request
        in_room = sum(1 for p in self.core.payloads if p.stage is PayloadStage.WAITING)
        assert in_room <= len(self._to_store)

    def _check_found(self, awaited: Awaited) -> None:
        """Nothing is awaited without a message, a timer, or something under way that will move it."""
        state = awaited.state
        in_accumulator = awaited in self.accumulator
        should_be = state in (State.HELD, State.LINGERING)
        assert in_accumulator == should_be, (awaited.address, state)
        if state is State.LOOKING_UP and awaited.group is None:
            asked = awaited.source in (*self._to_look_up, *self._looked_up)
            assert asked, awaited.address
        if state is State.LOOKING_UP and awaited.group is not None:
            assert self._num_group_calls > 0, awaited.address
        if state is State.STORING:
            assert awaited.source is not None, awaited.address
            assert awaited in awaited.source.unsettled, awaited.address
            assert not awaited.has_media_stored, awaited.address
        if state is State.WITH_GROUP:
            assert self._is_with_group(awaited), awaited.address
        if state in IN_DELIVERY:
            assert awaited.delivery is not None, awaited.address

    def _is_with_group(self, awaited: Awaited) -> bool:
        members = [m for group in self.groups for m in group.members.values()]
        for slot in awaited.slots:
            members += [m for m in slot.unsettled if isinstance(m, Member)]
        if any(awaited in member.carried for member in members):
            return True
        plans = [a.group for a in self.core.awaited.values() if a.group is not None]
        return any(awaited in plan.carried for plan in plans)


def _awaited_in(users: Iterable[PayloadUser]) -> list[Awaited]:
    return [user for user in users if isinstance(user, Awaited)]


def _lost(awaited: Awaited) -> do.Lost:
    digest_of = {payload.name: payload.digest for payload in awaited.payloads}
    return do.Lost(awaited, digest_of, tuple(awaited.slots))


def _is_in_hand(awaited: Awaited, claimed: frozenset[str]) -> bool:
    return any(address in claimed for address in awaited.in_hand_addresses)


def _part_requests(request: str, first: Awaited) -> tuple[str, ...]:
    """Names of the requests of a chord's parts, for a group that is larger than a chunk."""
    plan, spec = first.group, first.spec
    if plan is None or spec.how not in ("rank", "wins"):
        return ()
    num_parts = plan.num_scored(spec.how)
    if num_parts <= spec.batch_size:
        return ()
    return tuple(f"{request}.{at}" for at in range(0, num_parts, spec.batch_size))


def _next_attempts(
    parts: tuple[SampleRequest, ...], found: Mapping[str, Outcome | None]
) -> tuple[SampleRequest, ...]:
    """Parts that failed before are tried again with the group."""
    asked = []
    for part in parts:
        outcome = found.get(part.address)
        if outcome is not None and not outcome.is_final:
            part = part.model_copy(update={"attempt": outcome.attempt + 1})
        asked.append(part)
    return tuple(asked)


_HANDLERS: dict[type[Any], Callable[[EngineState, Any], None]] = {
    ev.Submitted: EngineState._on_submitted,
    ev.WaitBegan: EngineState._on_wait_began,
    ev.WaitEnded: EngineState._on_wait_ended,
    ev.SlotsGivenUp: EngineState._on_given_up,
    ev.GroupsIncomplete: EngineState._on_incomplete,
    ev.TicketResumed: EngineState._on_resumed,
    ev.Tick: EngineState._on_nothing,
    ev.SampleEncoded: EngineState._on_encoded,
    ev.OutcomesFound: EngineState._on_outcomes,
    ev.GroupLookedUp: EngineState._on_group_looked_up,
    ev.PayloadStored: EngineState._on_stored,
    ev.StoreMeasured: EngineState._on_measured,
    ev.Published: EngineState._on_published,
    ev.NumbersRead: EngineState._on_numbers,
    ev.NotesRead: EngineState._on_notes,
    ev.DeliveriesInspected: EngineState._on_inspected,
    ev.Restored: EngineState._on_restored,
    ev.RequestChecked: EngineState._on_request_checked,
    ev.RequestsRead: EngineState._on_requests_read,
    ev.Freed: EngineState._on_freed,
    ev.Renewed: EngineState._on_nothing,
    ev.MemberRegistered: EngineState._on_registered,
    ev.DigestsRead: EngineState._on_digests,
    ev.MembersRead: EngineState._on_members,
    ev.GroupsPutBack: EngineState._on_put_back,
}
