"""Samples on their way in: encoded, looked up, their media stored as there is room, then sent or put into groups."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from tasks.messages import Failure, Outcome
from tasks.rewards import RewardSpec
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.core import Core
from trainer_client.engine.encoding import EncodedSample, refs_of
from trainer_client.engine.group_sealing import Sealing
from trainer_client.engine.groups import Groups
from trainer_client.engine.model import (
    NEVER,
    Awaited,
    Member,
    Payload,
    PayloadUser,
    Slot,
)
from trainer_client.engine.room import Room
from trainer_client.engine.sending import Sending
from trainer_client.engine.states import (
    PayloadStage,
    SlotStage,
    State,
)
from trainer_client.engine.why_late import Source

UNSTORED_BYTES = 256 * 2**20
"""Samples are encoded ahead of their storing up to so many bytes: two videos, or some hundred images."""

UNSTORED_SAMPLES = 32
"""And up to so many samples."""


class Intake:
    """Takes submitted samples until they are settled.

    Args:
        num_encoders: Threads that encode.
        max_store_bytes: REWARDQ_MAX_STORE_BYTES.
    """

    def __init__(
        self,
        core: Core,
        groups: Groups,
        sealing: Sealing,
        sending: Sending,
        num_encoders: int,
        max_store_bytes: int,
    ) -> None:
        self._core, self._groups = core, groups
        self._sealing, self._sending = sealing, sending
        self._num_encoders = num_encoders
        self._room = Room(max_store_bytes)
        self.num_submitted = 0
        """Samples that were taken up, ever."""
        self._to_encode: deque[Slot] = deque()
        self._num_encoding = 0
        self._unstored_bytes = 0
        self._to_store: deque[Payload] = deque()
        self._to_look_up: list[Slot] = []
        """Of their outcomes it is not known yet whether they are there already."""
        self._looked_up: list[Slot] = []
        """Those that the `LookUp` under way is for."""
        self._has_hinted = False

    @property
    def wake_at(self) -> float:
        """When the store is to be measured."""
        if self._to_store and not self._room.is_measuring:
            return self._room.measure_at
        return NEVER

    def on_submitted(self, event: ev.Submitted) -> None:
        """Samples are to be scored."""
        self.num_submitted += len(event.slots)
        for slot in event.slots:
            self._core.open_slot(slot)
            self._to_encode.append(slot)

    def start_encoding(self) -> None:
        """Keep the encoders busy, but no further ahead of the store than its room lets media go."""
        while self._to_encode and self._may_encode():
            slot = self._to_encode.popleft()
            if slot.is_given_up:
                self._core.settle(slot)
                continue
            slot.stage = SlotStage.ENCODING
            self._num_encoding += 1
            self._core.act(do.Encode(slot))

    def _may_encode(self) -> bool:
        """Whether what is encoded and not stored leaves room for another: it is held in memory."""
        if self._num_encoding >= 2 * self._num_encoders:
            return False
        if self._unstored_bytes >= UNSTORED_BYTES:
            return False
        num_looked_up = len(self._to_look_up) + len(self._looked_up)
        return num_looked_up + len(self._to_store) < UNSTORED_SAMPLES

    def on_encoded(self, event: ev.SampleEncoded) -> None:
        """A sample is encoded, or cannot be."""
        slot, encoded = event.slot, event.encoded
        self._num_encoding -= 1
        if slot.is_given_up:
            self._core.settle(slot)
            return
        slot.encoded = encoded
        if encoded.hint and not self._has_hinted:
            self._has_hinted = True
            self._core.warn(encoded.hint)
        if encoded.problem is not None:
            self._core.fail_slot(slot, encoded.problem)
            self._add_members(slot, encoded)
            self._core.settle_if_stored(slot)
            return

        slot.stage = SlotStage.LOOKING_UP
        self._unstored_bytes += encoded.num_bytes
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
            awaited = self._core.awaited.get(identity.address)
            if awaited is None:
                awaited = Awaited(
                    address=identity.address,
                    spec=spec,
                    prompt=slot.sample.prompt,
                    beside=identity.beside,
                    text_bytes=identity.text_bytes,
                    source=slot,
                )
                self._core.add(awaited, State.LOOKING_UP)
                slot.unsettled[awaited] = None
                new.append(awaited)
            self._core.join(slot, awaited)
            awaited_by_name[spec.name] = awaited
        self._core.set_awaited(slot, awaited_by_name)
        return new

    def look_up(self) -> None:
        """Ask for what is new, all of it at once, while no such question is open."""
        if self._looked_up or not self._to_look_up:
            return
        self._looked_up, self._to_look_up = self._to_look_up, []
        addresses = []
        for slot in self._looked_up:
            addresses += [awaited.address for awaited in _awaited_in(slot.unsettled)]
        self._core.act(do.LookUp(addresses, do.Purpose.FIRST))

    def on_first_outcomes(self, outcomes: Mapping[str, Outcome | None]) -> None:
        """It is known which outcomes were there before they were sent."""
        looked_up, self._looked_up = self._looked_up, []
        for slot in looked_up:
            for awaited in _awaited_in(slot.unsettled):
                outcome = outcomes.get(awaited.address)
                if outcome is None:
                    continue
                if outcome.is_final:
                    self._sending.answer(awaited, outcome, is_hit=True)
                else:
                    awaited.attempt = outcome.attempt + 1
        for slot in looked_up:
            self._store_media(slot)

    def _store_media(self, slot: Slot) -> None:
        """Its outcomes were looked up: what is not there needs its media stored. Then its groups get it.

        What others await of a slot that was given up meanwhile is stored all the same.
        """
        encoded, slot.encoded = slot.encoded, None
        self._unstored_bytes -= encoded.num_bytes  # what is new of it is counted again
        slot.stage = SlotStage.STORING
        for awaited in _awaited_in(slot.unsettled):
            self._core.move(awaited, State.STORING)
            awaited.media = self._use_contents(awaited, awaited.spec, encoded)
        if not slot.is_given_up:
            self._add_members(slot, encoded)
        for user in list(slot.unsettled):
            self._go_if_stored(user)
        self._core.settle_if_stored(slot)

    def _use_contents(
        self, user: PayloadUser, spec: RewardSpec, encoded: EncodedSample
    ) -> dict[str, Any]:
        """What a reward takes of a sample's media, as requests name it; what is new waits to be stored."""
        media: dict[str, Any] = {}
        for name, contents in encoded.fields_for(spec).items():
            names = []
            for content in contents:
                payload, is_new = self._core.payloads.use(content, user)
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
        if not self._groups.may_carry or member.spec.how != "rank":
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

    def start_storing(self) -> None:
        """Store what there is room for, first come, first stored."""
        is_storing = bool(self._to_store)
        while self._to_store:
            payload = self._to_store[0]
            if not payload.users:  # nobody needs it any more
                self._to_store.popleft()
                self._unstored_bytes -= payload.content.num_bytes
                continue
            if not self._room.admit(payload.content.num_bytes):
                self._core.payloads.free_kept()
                break
            self._store_first()
        # Measured also while there is room: other clients fill the store too.
        if is_storing and self._room.is_due(self._core.now):
            self._room.is_measuring = True
            self._core.act(do.MeasureStore(self._queues_if_stuck()))
        is_full = bool(self._to_store) and self._room.is_known
        words = self._room.words if is_full else None
        self._core.why_late.put(Source.STORE_FULL, words)

    def _store_first(self) -> None:
        payload = self._to_store.popleft()
        payload.stage = PayloadStage.STORING
        self._core.act(do.Store(payload.name, payload.content))

    def _queues_if_stuck(self) -> list[str]:
        """Queues of the groups that a full store may be waiting for, if nothing has left it for long."""
        if not self._to_store or not self._room.is_stuck(self._core.now):
            return []
        users = self._to_store[0].users
        slots = [user.source for user in users if user.source is not None]
        groupwise = [s for slot in slots for s in slot.rewards if s.is_groupwise]
        return sorted({spec.queue for spec in groupwise})

    def on_measured(self, event: ev.StoreMeasured) -> None:
        """It is known how full the store is."""
        self._room.measured(event.num_bytes, self._core.now)
        is_deadlock = event.has_messages is False and self._room.is_stuck(
            self._core.now
        )
        if is_deadlock and self._to_store and self._to_store[0].users:
            # Nothing leaves the store and nothing is queued: what it holds are groups that lack
            # members, of this rank or others, and this may be one.
            self._room.admit_anyway(self._to_store[0].content.num_bytes)
            self._store_first()

    def on_stored(self, event: ev.PayloadStored) -> None:
        """A payload is in the store."""
        content = self._core.payloads.content_of(event.name)
        self._unstored_bytes -= content.num_bytes
        payload = self._core.payloads.stored(event.name)
        if payload is None:
            return
        for user in list(payload.users):
            self._go_if_stored(user)

    def on_refused(self, event: ev.PayloadRefused) -> None:
        """A payload cannot be stored: those that need it fail, and no others."""
        content = self._core.payloads.content_of(event.name)
        self._unstored_bytes -= content.num_bytes
        users = self._core.payloads.refused(event.name)
        for user in users:
            if isinstance(user, Awaited) and not user.is_ended:
                self._sending.fail(user, event.failure)
        for user in users:
            if isinstance(user, Member):
                self._fail_member(user, event.failure)

    def _fail_member(self, member: Member, failure: Failure) -> None:
        """A member cannot be scored: its group is scored without it."""
        member.failure, member.media = failure, {}
        self._core.payloads.release(member)
        carried, member.carried = member.carried, []
        for awaited in carried:
            if not awaited.is_ended:  # it has the same media
                self._sending.fail(awaited, failure)
        self._go_if_stored(member)

    def _go_if_stored(self, user: PayloadUser) -> None:
        """Send an outcome, or add a member to its group, once its media are in the store."""
        slot = user.source
        if slot is None or user not in slot.unsettled or not user.has_media_stored:
            return
        if isinstance(user, Awaited) and self._is_carried(user):
            self._core.move(user, State.WITH_GROUP)
        elif isinstance(user, Awaited):
            self._sending.accumulate(user)
        elif isinstance(user, Member):
            self._sealing.add_member(user)
        self._core.unsettle(user)

    def forget_members(self, slot: Slot) -> None:
        """Nobody waits for a sample any more: it becomes a member of no group."""
        for member in [user for user in slot.unsettled if isinstance(user, Member)]:
            self._core.payloads.release(member)
            carried, member.carried = member.carried, []
            self._core.unsettle(member)
            self._sending.go_alone(carried)

    def is_looking_up(self, awaited: Awaited) -> bool:
        """Whether it is being asked, or about to be, if an outcome is there already."""
        return awaited.source in (*self._to_look_up, *self._looked_up)

    def check(self) -> None:
        """What waits for room is not under way, and nothing else waits for it."""
        waiting = [p for p in self._core.payloads if p.stage is PayloadStage.WAITING]
        queued = [p for p in self._to_store if p.users]
        assert set(waiting) == set(queued)


def _awaited_in(users: Iterable[PayloadUser]) -> list[Awaited]:
    return [user for user in users if isinstance(user, Awaited)]
