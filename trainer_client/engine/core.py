"""Transitions: the only code that changes the state of an awaited outcome, and the indexes that say where it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from tasks.messages import Failure, Note, Outcome
from tasks.payloads import PART_BYTES
from tasks.rewards import RewardSpec
from trainer_client.engine import actions as do
from trainer_client.engine.model import (
    Awaited,
    Delivery,
    PayloadUser,
    Slot,
    StepKey,
)
from trainer_client.engine.payloads import PayloadLedger
from trainer_client.engine.states import (
    ENDED,
    IN_DELIVERY,
    TRANSITIONS,
    SlotStage,
    State,
)
from trainer_client.engine.why_late import Source, WhyLate

UNSENT = frozenset({State.LINGERING, State.PUBLISHING, State.RESTORING})
"""States in which an outcome counts as not sent, beside the samples that are not settled."""


class Core:
    """Slots, awaited outcomes, deliveries and payloads, and the actions that the event at hand has led to."""

    def __init__(
        self, client_id: str, why_late: WhyLate, part_bytes: int = PART_BYTES
    ) -> None:
        self._client_id = client_id
        self._num_names = 0
        self.why_late = why_late
        self.payloads = PayloadLedger(self.new_name, part_bytes)
        self.awaited: dict[str, Awaited] = {}
        """By address, all that are not ended."""
        self.deliveries: dict[str, Delivery] = {}
        """By the name of their request, all that something is awaited of."""
        self.ended_workers: dict[str, Note] = {}
        """By queue, what the last worker said that ended since its code was outdated."""
        self.num_unsettled = 0
        """Slots that are not settled."""
        self.has_changed = False
        """Whether something has happened that somebody may wait for."""
        self._num_in = dict.fromkeys(State, 0)
        self._num_groups_looked_up = 0
        self._num_of: Counter[str] = Counter()
        """By fingerprint, how many are awaited."""
        self.now = 0.0
        """When the event at hand happened."""
        self.released: frozenset[StepKey] = frozenset()
        """Steps that somebody collects."""
        self._waits: dict[int, frozenset[StepKey]] = {}
        """By the number of whoever waits, the steps that it collects."""
        self.num_group_calls = 0
        """Calls under way that may seal a group."""
        self.on_delivery_ended: Callable[[Delivery], None] = lambda _delivery: None
        """Called with each delivery of which nothing is awaited any more."""
        self._actions: list[do.Action] = []
        self._is_freeing = False

    # --- actions ---------------------------------------------------------------------

    def act(self, action: do.Action) -> None:
        """Something is to be done."""
        self._actions.append(action)

    def warn(self, words: str) -> None:
        """The log is to say something, once."""
        self.act(do.Warn(words))

    def take_actions(self) -> list[do.Action]:
        """What is to be done."""
        actions, self._actions = self._actions, []
        return actions

    def free(self) -> None:
        """Drop from the store what nothing needs any more, while no such call is under way."""
        if self._is_freeing:
            return
        names = self.payloads.take_to_free()
        if names:
            self._is_freeing = True
            self.act(do.Free(names))

    def freed(self) -> None:
        """They are dropped."""
        self._is_freeing = False

    def new_name(self, suffix: str) -> str:
        """A name in the payload store that was never used before."""
        self._num_names += 1
        return f"{self._client_id}.{self._num_names}.{suffix}"

    # --- waits ---------------------------------------------------------------------

    def begin_wait(self, waiter: int, steps: frozenset[StepKey]) -> None:
        """Somebody waits, and collects these steps."""
        self._waits[waiter] = steps
        self.released = frozenset().union(*self._waits.values())

    def end_wait(self, waiter: int) -> None:
        """The wait of this number is over."""
        self._waits.pop(waiter, None)
        self.released = frozenset().union(*self._waits.values())

    @property
    def has_waits(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waits)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is on its way that could still fill a chunk."""
        if self.num_unsettled or self.num_group_calls:
            return False
        num_in = self._num_in
        return not (num_in[State.LOOKING_UP] or num_in[State.RESTORING])

    # --- counts ----------------------------------------------------------------------

    def num_in(self, *states: State) -> int:
        """How many outcomes are in one of these states."""
        return sum(self._num_in[state] for state in states)

    @property
    def num_on_their_way(self) -> int:
        """Outcomes of settled samples that are not in a message."""
        return self.num_in(*UNSENT) + self._num_groups_looked_up

    # --- slots -----------------------------------------------------------------------

    def open_slot(self, slot: Slot) -> None:
        """A sample was submitted."""
        self.num_unsettled += 1
        slot.take_snapshot()

    def settle(self, slot: Slot) -> None:
        """All of it is stored and in its groups, or nobody wants it."""
        slot.encoded = None
        if slot.stage is not SlotStage.SETTLED:
            slot.stage = SlotStage.SETTLED
            self.num_unsettled -= 1
            self.has_changed = True

    def settle_if_stored(self, slot: Slot) -> None:
        """Settle a slot of which nothing is on its way into the store."""
        if not slot.unsettled and slot.stage is SlotStage.STORING:
            self.settle(slot)

    def unsettle(self, user: PayloadUser) -> None:
        """The media of `user` are stored, or not needed any more."""
        slot, user.source = user.source, None
        if slot is not None:
            slot.unsettled.pop(user, None)
            self.settle_if_stored(slot)

    def set_awaited(self, slot: Slot, awaited: Mapping[str, Awaited]) -> None:
        """What a slot awaits, by reward name."""
        slot.awaited = awaited
        self._look_at(slot)

    def fail_slot(self, slot: Slot, problem: Failure) -> None:
        """A sample cannot be scored at all."""
        slot.problem = problem
        slot.stage = SlotStage.STORING
        self._look_at(slot)

    def fail_reward(self, slot: Slot, spec: RewardSpec, failure: Failure) -> None:
        """One reward of a slot cannot be had; its others can."""
        failed = Awaited("", spec, slots=[slot], state=State.ANSWERED)
        failed.outcome, failed.answered_at = Outcome(failure=failure), self.now
        self.set_awaited(slot, {**slot.awaited, spec.name: failed})
        self.act(do.Announce(spec, failed.outcome))

    def abandon(self, slot: Slot) -> None:
        """Nobody waits for a sample any more. What others await of its media is still stored."""
        slot.sample, slot.held = None, {}
        if slot.stage is SlotStage.QUEUED:
            self.settle(slot)
        slot.take_snapshot()
        self.has_changed = True

    def _look_at(self, slot: Slot) -> None:
        """Something of a slot has changed: its media can go once it is done, and tickets say it as it is."""
        if slot.is_done and slot.sample is not None:
            slot.sample, slot.held = None, {}
        slot.take_snapshot()
        self.has_changed = True

    # --- awaited outcomes ------------------------------------------------------------

    def add(self, awaited: Awaited, state: State) -> None:
        """An outcome is awaited from now on."""
        assert awaited.address not in self.awaited, awaited.address
        self.awaited[awaited.address] = awaited
        self._num_of[awaited.spec.fingerprint] += 1
        self.move(awaited, state)

    def join(self, slot: Slot, awaited: Awaited) -> None:
        """A slot awaits it too."""
        if slot not in awaited.slots:
            awaited.slots.append(slot)

    def leave(self, slot: Slot, awaited: Awaited) -> None:
        """A slot awaits it no more."""
        if slot in awaited.slots:
            awaited.slots.remove(slot)

    def move(self, awaited: Awaited, state: State) -> None:
        """Change the state of an awaited outcome: the only place where that is done."""
        before = awaited.state
        assert state in TRANSITIONS[before], (awaited.address, before, state)
        self._count(awaited, before, -1)
        self._count(awaited, state, 1)
        awaited.state = state
        if state in ENDED:
            self._end(awaited)

    def answer(self, awaited: Awaited, outcome: Outcome, *, is_hit: bool) -> None:
        """Its outcome is there."""
        awaited.outcome, awaited.is_hit, awaited.answered_at = outcome, is_hit, self.now
        self.move(awaited, State.ANSWERED)
        self.act(do.Announce(awaited.spec, outcome))
        for slot in awaited.slots:
            self._look_at(slot)

    def give_up(self, awaited: Awaited) -> None:
        """Nobody wants it any more."""
        self.move(awaited, State.GIVEN_UP)

    def _count(self, awaited: Awaited, state: State | None, change: int) -> None:
        if state is None or state in ENDED:
            return
        self._num_in[state] += change
        if state in UNSENT:
            self.has_changed = True
        if state is State.LOOKING_UP and awaited.group is not None:
            self._num_groups_looked_up += change
            self.has_changed = True

    def _end(self, awaited: Awaited) -> None:
        del self.awaited[awaited.address]
        self._leave_delivery(awaited)
        self.payloads.release(awaited)
        self.unsettle(awaited)
        fingerprint = awaited.spec.fingerprint
        self._num_of[fingerprint] -= 1
        if not self._num_of[fingerprint]:
            del self._num_of[fingerprint]
            self.why_late.withdraw(Source.NOTE, fingerprint)

    # --- deliveries ------------------------------------------------------------------

    def take_up(self, delivery: Delivery, state: State) -> None:
        """A message is on its way, or under way: what it is for belongs to it, and to no earlier one."""
        delivery.state = state
        delivery.take_record()
        self.deliveries[delivery.request] = delivery
        for awaited in delivery.awaited:
            self._leave_delivery(awaited)
            awaited.delivery = delivery
            self.move(awaited, state)
            for slot in awaited.slots:
                slot.take_snapshot()

    def set_delivery_state(self, delivery: Delivery, state: State) -> None:
        """A message was sent, or part of it waits for a permit. What was lost of it has a state of its own."""
        if delivery.state is state:
            return
        before, delivery.state = delivery.state, state
        for awaited in delivery.awaited:
            if awaited.state is before:
                self.move(awaited, state)

    def renumbered(self, delivery: Delivery) -> None:
        """Its message has a number now, or another one."""
        delivery.take_record()
        for awaited in delivery.awaited:
            for slot in awaited.slots:
                slot.take_snapshot()

    def sent_deliveries(self) -> list[Delivery]:
        """Those whose message was sent."""
        return [
            delivery
            for delivery in self.deliveries.values()
            if delivery.state is not State.PUBLISHING
        ]

    def _leave_delivery(self, awaited: Awaited) -> None:
        delivery, awaited.delivery = awaited.delivery, None
        if delivery is None:
            return
        delivery.awaited.remove(awaited)
        if not delivery.awaited:
            del self.deliveries[delivery.request]
            self.on_delivery_ended(delivery)
            if delivery.state is not State.PUBLISHING:  # else once it has arrived
                self.payloads.free_later(delivery.requests)

    # --- tickets of earlier processes --------------------------------------------------

    def take_up_slot(self, slot: Slot) -> None:
        """A slot of an earlier process: what it awaits may be awaited here already."""
        slot.stage = SlotStage.SETTLED
        shared = {}
        for name, awaited in slot.awaited.items():
            known = self.awaited.get(awaited.address)
            if known is None:
                known = awaited
                self.add(known, State.IN_FLIGHT)
            self.join(slot, known)
            shared[name] = known
        self.set_awaited(slot, shared)

    def resume(self, delivery: Delivery) -> None:
        """Look after a message that an earlier process sent, for what no other delivery here is for."""
        mine = delivery.awaited = self._without_delivery(delivery.awaited)
        if not mine:
            return
        # Another ticket may have been for the same message.
        known_delivery = self.deliveries.setdefault(delivery.request, delivery)
        if known_delivery is not delivery:
            known_delivery.awaited += mine
        for awaited in mine:
            awaited.delivery = known_delivery
            if awaited.state is not known_delivery.state:
                self.move(awaited, known_delivery.state)
        self.renumbered(known_delivery)

    def _without_delivery(self, listed: Iterable[Awaited]) -> list[Awaited]:
        """Those of what a ticket lists that are in flight for no delivery yet, as they are known here."""
        found: dict[Awaited, None] = {}
        for one in listed:
            known = self.awaited.get(one.address)
            if known is None or known.delivery is not None:
                continue
            if known.state is State.IN_FLIGHT:
                found[known] = None
        return list(found)

    # --- invariants ------------------------------------------------------------------

    def check(self) -> None:
        """Assert what must hold between two events."""
        self.payloads.check()
        counted = dict.fromkeys(State, 0)
        for address, awaited in self.awaited.items():
            assert awaited.address == address
            assert awaited.state is not None, address
            counted[awaited.state] += 1
            self._check_awaited(awaited)
        assert self._num_in == counted, (self._num_in, counted)
        for request, delivery in self.deliveries.items():
            assert delivery.request == request
            self._check_delivery(delivery)

    def _check_awaited(self, awaited: Awaited) -> None:
        """Somebody waits for it, and it and its delivery know of each other."""
        address, delivery = awaited.address, awaited.delivery
        assert awaited.state not in ENDED, address
        assert awaited.outcome is None, address
        assert awaited.slots, address
        for slot in awaited.slots:
            assert awaited in slot.awaited.values(), address
        if delivery is None:
            assert awaited.state not in IN_DELIVERY, (address, awaited.state)
            return
        assert awaited in delivery.awaited, address
        assert self.deliveries.get(delivery.request) is delivery, address

    @staticmethod
    def _check_delivery(delivery: Delivery) -> None:
        """Something of it is awaited, and what was not lost is in the delivery's own state."""
        assert delivery.awaited, delivery.request
        for awaited in delivery.awaited:
            assert awaited.delivery is delivery, (delivery.request, awaited.address)
            if awaited.state in IN_DELIVERY:
                assert awaited.state is delivery.state, awaited.address
