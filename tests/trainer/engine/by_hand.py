"""The engine's state without threads or servers: a test plays the backend, on a clock that it moves."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.groups import Registered, digest
from tasks.messages import Failure, Heartbeat, Note, Outcome, SampleRequest
from tasks.outcomes import address
from tasks.rewards import RAW, RewardConfig, RewardSpec
from tasks.samples import Beside, Sample
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.encoding import Content, EncodedSample, Identity
from trainer_client.engine.model import Awaited, Delivery, Slot
from trainer_client.engine.resume import slots_and_deliveries
from trainer_client.engine.state import EngineConfig, EngineState
from trainer_client.engine.states import State
from trainer_client.ticket import Ticket

RUN, LAUNCH = "run", "launch"
RECONCILE_S = 2.0
NOTHING_BESIDE = Beside(metadata={}, fps=None, sample_rate=None, withheld=())
OUR_STORE = "our store"
FAILURE = Failure(kind="failed", message="bad luck")
OPEN = Registered("open", "", 1, False)


def rewards_of(*blocks: Mapping[str, Any]) -> tuple[RewardSpec, ...]:
    """The rewards of a YAML file's blocks."""
    return RewardConfig.from_dict({"rewards": list(blocks)}).rewards


(POINT,) = rewards_of({"reward_model": "PickScore", "batch_size": 2})
SINGLE = rewards_of({"reward_model": "PickScore", "batch_size": 1})
(HELD,) = rewards_of({"reward_model": "PickScore", "batch_size": 2, "async_reward": False})
(OTHER,) = rewards_of({"reward_model": "jpeg_compressibility", "batch_size": 2})
(JUDGE,) = rewards_of(
    {"reward_model": "vllm_evaluate", "name": "judge", "vlm_model": "m", "api_base_url": "http://judge/v1"}
)
(RANKED,) = rewards_of({"reward_model": "PickScore_Rank", "batch_size": 4})
BOTH = (POINT, RANKED)
(HELD_RANKED,) = rewards_of({"reward_model": "PickScore_Rank", "batch_size": 4, "async_reward": False})


def content_of(number: int) -> Content:
    """Ten bytes of media; equal numbers are equal contents."""
    return Content(b"%010d" % number, f"digest{number}", (1, 10), "raw")


@dataclass
class EngineByHand:
    """An `EngineState`, the actions that it has asked for and that are not carried out yet, and what servers answer.

    `run()` carries out all of them but the kinds in `but`. After each event `check()` is called, by a fixture in
    `tests/conftest.py`.
    """

    rewards: tuple[RewardSpec, ...] = (POINT,)
    is_shared: bool = False
    num_encoders: int = 2
    max_store_bytes: int = 10**9
    client_id: str = "client"

    now: float = 0.0
    pending: list[Any] = field(default_factory=list)
    done: list[Any] = field(default_factory=list)
    """Actions that were carried out, in order."""

    # What the servers answer.
    stored: set[str] = field(default_factory=set)
    """Names in the payload store, requests too."""
    store_bytes: int = 0
    """What a measurement of the payload store says."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    queued: set[str] = field(default_factory=set)
    """Requests whose message is still in its queue."""
    claimed: set[str] = field(default_factory=set)
    """Addresses that a worker has in hand."""
    workers: list[Heartbeat] = field(default_factory=list)
    notes: dict[str, Note] = field(default_factory=dict)
    """By request, what a worker said."""
    problems: dict[Awaited, Failure] = field(default_factory=dict)
    """Why media cannot be stored again."""
    named: list[tuple[str, str, str]] = field(default_factory=list)
    """What requests of an earlier process name: address, payload, digest."""
    registered: Registered = OPEN
    """What becomes of a member that is put into its slot over ranks."""
    digests: dict[str, str] = field(default_factory=dict)
    members: dict[tuple[int, int], tuple[str, SampleRequest]] = field(default_factory=dict)
    """Of the one group over ranks."""
    other_ranks_number: int = 0
    """Of the message that another rank has sent for a group."""
    lost_groups: frozenset[str] = frozenset()
    is_shared_with_others: bool | None = True
    """Whether other ranks have members in the slots of a group, as Redis says; None if nobody has."""

    def __post_init__(self) -> None:
        config = EngineConfig(
            run=RUN,
            rank=0,
            client_id=self.client_id,
            max_store_bytes=self.max_store_bytes,
            reconcile_s=RECONCILE_S,
            payload_ttl_s=900.0,
            num_encoders=self.num_encoders,
            shared_key=(lambda *parts: ":".join(map(str, parts))) if self.is_shared else None,
        )
        self.state = EngineState(config, self.now)
        self._num_submitted: Counter[tuple[str, int]] = Counter()
        self._content: dict[Slot, int] = {}
        self._numbers: Counter[str] = Counter()
        self._invalid: set[int] = set()

    # --- events ----------------------------------------------------------------------------------

    def apply(self, event: ev.Event) -> list[Any]:
        """Let the state take up an event; returns what it asks for."""
        actions = self.state.apply(event, self.now)
        self.pending += actions
        return actions

    def wait(self, seconds: float, *, but: Collection[type] = ()) -> None:
        """Let time pass; then all that falls due is carried out."""
        self.now += seconds
        self.apply(ev.Tick())
        assert self.state.wake_at > self.now, "a tick is due again at once: the loop would spin"
        self.run(but=but)

    def submit(
        self, content: int, group: Any = None, *, size: int | None = None, step: int = 0, invalid: bool = False
    ) -> Slot:
        """Submit a sample; equal contents are equal samples."""
        slot = self.new_slot(content, group, size=size, step=step, invalid=invalid)
        self.submit_all([slot])
        return slot

    def submit_all(self, slots: Sequence[Slot]) -> None:
        """Submit these samples together."""
        self.apply(ev.Submitted(slots))

    def new_slot(
        self, content: int, group: Any = None, *, size: int | None = None, step: int = 0, invalid: bool = False
    ) -> Slot:
        """A sample that is to be submitted."""
        key = ("train", step)
        slot = Slot(
            split="train",
            step=step,
            index=self._num_submitted[key],
            group=group,
            sample=Sample(prompt="prompt"),
            held={},
            rewards=self.rewards,
            submitted_at=self.now,
            group_size=size,
        )
        self._num_submitted[key] += 1
        self._content[slot] = content
        if invalid:
            self._invalid.add(content)
        return slot

    def give_up(self, *slots: Slot) -> None:
        """Wait for these no more."""
        self.apply(ev.SlotsGivenUp(slots))

    def collect(self, *steps: int) -> None:
        """Somebody begins to wait for these steps."""
        self.apply(ev.WaitBegan(1, frozenset(("train", step) for step in steps)))

    def stop_collecting(self) -> None:
        """That wait is over."""
        self.apply(ev.WaitEnded(1))

    def answer(self, slot: Slot, reward: float = 0.5, *, of: RewardSpec | None = None) -> None:
        """A worker answers for a slot's reward (its only one unless given), and the answer is polled."""
        awaited = self.awaited(slot, of)
        outcome = Outcome(reward=reward)
        if awaited.spec.is_groupwise:
            num_members = len(awaited.group.members) if awaited.group is not None else 1
            outcome = Outcome(members=(outcome,) * num_members)
        self.put_outcome(awaited.address, outcome)

    def put_outcome(self, at: str, outcome: Outcome) -> None:
        """An outcome is in Redis, and is polled."""
        self.outcomes[at] = outcome
        self.apply(ev.OutcomesFound({at: outcome}, do.Purpose.EVERYTHING))

    def note(
        self, slot: Slot, reason: Any, *, of: RewardSpec | None = None, detail: str = "detail", store: str = ""
    ) -> None:
        """A worker, which uses this store, says this of the message that a slot's reward waits for."""
        delivery = self.delivery(slot, of)
        note = Note(reason=reason, worker="worker", detail=detail, store=store)
        self.apply(ev.NotesRead([(delivery, delivery.request, note)], OUR_STORE))

    def resume(self, ticket: Ticket) -> list[Slot]:
        """Await what the process of this (pickled) ticket had submitted."""
        config: Any = _Rewards(self.rewards)
        slots, deliveries = slots_and_deliveries(ticket, config, RECONCILE_S, self.now, self.state.core.new_name)
        self.apply(ev.TicketResumed(slots, deliveries))
        return slots

    def ticket(self, *slots: Slot) -> Ticket:
        """A ticket of these slots as another process reads it."""
        first = slots[0]
        ticket = Ticket(RUN, LAUNCH, "train", first.step, 0, first.index, first.index + len(slots), (), slots)
        unpickled: Ticket = pickle.loads(pickle.dumps(ticket))
        return unpickled

    # --- what the servers do -----------------------------------------------------------------------

    def run(self, *, but: Collection[type] = ()) -> None:
        """Carry out what is asked for, and what follows from that, but actions of these kinds."""
        while actions := [one for one in self.pending if type(one) not in but]:
            self.perform(actions[0])

    def perform(self, action: Any) -> None:
        """Carry out one action: it goes well."""
        self.pending.remove(action)
        self.done.append(action)
        if isinstance(action, (do.Announce, do.Warn)):
            return
        self.apply(self.result_of(action))

    def result_of(self, action: Any) -> ev.Event:
        """What the servers answer."""
        return _RESULTS[type(action)](self, action)

    def fail_to_restore(self, slot: Slot, message: str) -> None:
        """The media of a slot's outcome cannot be stored again."""
        self.problems[self.awaited(slot)] = Failure(kind="invalid", message=message)

    def asked(self, kind: type) -> list[Any]:
        """Actions of this kind that are not carried out yet."""
        return [one for one in self.pending if type(one) is kind]

    def _encode(self, action: do.Encode) -> ev.Event:
        number = self._content[action.slot]
        identities = {}
        for spec in action.slot.rewards:
            scored = spec.part if spec.is_groupwise else spec
            identities[spec.name] = Identity(
                f"key{number}", address(RUN, scored.fingerprint, f"key{number}"), NOTHING_BESIDE
            )
        if number in self._invalid:
            problem = Failure(kind="invalid", message="cannot be read")
            return ev.SampleEncoded(action.slot, EncodedSample("prompt", identities, problem=problem))
        contents = {("image", RAW): [content_of(number)]}
        return ev.SampleEncoded(action.slot, EncodedSample("prompt", identities, contents))

    def _store(self, action: do.Store) -> ev.Event:
        self.stored.add(action.name)
        return ev.PayloadStored(action.name)

    def _restore(self, action: do.Restore) -> ev.Event:
        for lost in action.lost:
            self.stored.update(lost.digest_of)
        names = frozenset(name for lost in action.lost for name in lost.digest_of)
        return ev.Restored({lost.awaited: self.problems.get(lost.awaited) for lost in action.lost}, names)

    def _look_up(self, action: do.LookUp) -> ev.Event:
        return ev.OutcomesFound({at: self.outcomes.get(at) for at in action.addresses}, action.purpose)

    def _look_up_group(self, action: do.LookUpGroup) -> ev.Event:
        outcome = self.outcomes.get(action.group.address)
        attempt = 1 if outcome is None or outcome.is_final else outcome.attempt + 1
        assert action.group.group is not None
        parts = [one.address for one in action.group.group.parts]
        found = {at: self.outcomes.get(at) for at in parts}
        return ev.GroupLookedUp(action.group, outcome, attempt, self.other_ranks_number, found)

    def _publish(self, action: do.Publish) -> ev.Event:
        for delivery in action.deliveries:
            self.stored.update(delivery.requests)
        return ev.Published({delivery: self._new_number(delivery) for delivery in action.deliveries})

    def _publish_again(self, action: do.PublishAgain) -> ev.Event:
        return ev.Published({action.delivery: self._new_number(action.delivery)})

    def _new_number(self, delivery: Delivery) -> int:
        self._numbers[delivery.spec.queue] += 1
        return self._numbers[delivery.spec.queue]

    def _read_numbers(self, action: do.ReadNumbers) -> ev.Event:
        sent = {queue: self._numbers[queue] for queue in action.queues}
        return ev.NumbersRead(sent, {queue: 0 if self.queued else num for queue, num in sent.items()})

    def _read_notes(self, action: do.ReadNotes) -> ev.Event:
        found = []
        for delivery, request in action.requests:
            if request in self.notes:
                found.append((delivery, request, self.notes.pop(request)))
        return ev.NotesRead(found, OUR_STORE)

    def _inspect(self, action: do.InspectDeliveries) -> ev.Event:
        deliveries = [one.delivery for one in action.suspicions]
        in_queue = frozenset(one for one in deliveries if one.request in self.queued)
        found = {}
        for one in action.suspicions:
            if one.delivery not in in_queue:
                found.update({a.address: self.outcomes.get(a.address) for a in one.awaited})
        found = {at: outcome for at, outcome in found.items() if at not in self.claimed}
        return ev.DeliveriesInspected(action.suspicions, in_queue, frozenset(self.claimed), self.workers, found)

    def _measure(self, action: do.MeasureStore) -> ev.Event:
        return ev.StoreMeasured(self.store_bytes, bool(self.queued) if action.queues else None)

    def _free(self, action: do.Free) -> ev.Event:
        self.stored.difference_update(action.names)
        return ev.Freed()

    def _renew(self, _action: do.Renew) -> ev.Event:
        return ev.Renewed()

    def _check_request(self, action: do.CheckRequest) -> ev.Event:
        is_there = action.delivery.request in self.stored
        return ev.RequestChecked(
            action.delivery, is_there, dict.fromkeys(action.shared_keys, self.is_shared_with_others)
        )

    def _read_requests(self, action: do.ReadRequests) -> ev.Event:
        named = [payload for payload in self.named if payload[0] in action.slots_of]
        return ev.RequestsRead(named, action.slots_of)

    def _register(self, action: do.RegisterMember) -> ev.Event:
        assert action.member.request is not None
        self.members[action.position] = action.member.key, action.member.request
        return ev.MemberRegistered(action.member, self.registered)

    def _read_digests(self, action: do.ReadDigests) -> ev.Event:
        return ev.DigestsRead({key: self.digests.get(key, "") for key in action.shared_keys})

    def _read_members(self, action: do.ReadMembers) -> ev.Event:
        return ev.MembersRead(action.shared_key, action.digest, dict(sorted(self.members.items())))

    def _put_back(self, _action: do.PutGroupsBack) -> ev.Event:
        return ev.GroupsPutBack(self.lost_groups)

    # --- what the state says -------------------------------------------------------------------------

    def awaited(self, slot: Slot, of: RewardSpec | None = None) -> Awaited:
        """What a slot awaits for a reward, its first unless given."""
        return slot.awaited[(of or slot.rewards[0]).name]

    def state_of(self, slot: Slot, of: RewardSpec | None = None) -> State | None:
        """The state of what a slot awaits."""
        return self.awaited(slot, of).state

    def delivery(self, slot: Slot, of: RewardSpec | None = None) -> Delivery:
        """The message that a slot's reward waits for."""
        delivery = self.awaited(slot, of).delivery
        assert delivery is not None
        return delivery

    @property
    def published(self) -> list[Delivery]:
        """New messages that were sent, in order."""
        return [one for action in self.done if isinstance(action, do.Publish) for one in action.deliveries]

    @property
    def published_again(self) -> list[str]:
        """Requests whose message was sent again as it was."""
        return [action.request for action in self.done if isinstance(action, do.PublishAgain)]

    @property
    def warned(self) -> list[str]:
        """What the log was to say."""
        return [action.words for action in (*self.done, *self.pending) if isinstance(action, do.Warn)]

    def assert_nothing_is_left(self) -> None:
        """Nothing is awaited or under way, or in the store once the client is closed."""
        self.run()
        core = self.state.core
        core.payloads.free_kept()
        self.apply(ev.Tick())
        self.run()
        assert (dict(core.awaited), dict(core.deliveries), len(core.payloads)) == ({}, {}, 0)
        assert (core.num_unsettled, core.num_group_calls, self.state.num_unsent) == (0, 0, 0)
        intake = self.state.intake
        assert (intake._num_encoding, intake._unstored_bytes) == (0, 0)
        assert self.stored == set()


@dataclass
class _Rewards:
    """As `slots_and_deliveries` asks a `RewardConfig`."""

    rewards: tuple[RewardSpec, ...]
    eval_rewards: tuple[RewardSpec, ...] = ()

    def of(self, _split: str) -> tuple[RewardSpec, ...]:
        return self.rewards


def in_flight(engine: EngineByHand, content: int = 1) -> Slot:
    """A sample whose message is in flight."""
    slot = engine.submit(content)
    engine.run()
    assert engine.state_of(slot) is State.IN_FLIGHT
    return slot


def seal(engine: EngineByHand) -> None:
    """All members that are in their slots over ranks are the whole group."""
    keys = [key for key, _ in dict(sorted(engine.members.items())).values()]
    engine.registered = Registered("sealed", digest(keys), len(keys), False)
    for group in engine.state.groups:
        engine.digests[group.shared_key] = digest(keys)


def another_rank_joins(engine: EngineByHand) -> Slot:
    """A member of this rank, and one of another."""
    slot = engine.submit(1, "g", size=2)
    engine.run()
    ((_, request),) = engine.members.values()
    engine.members[1, 0] = "key of another rank", request
    return slot


def in_states(slots: Iterable[Slot], of: RewardSpec | None = None) -> list[State | None]:
    """The states of what each of these slots awaits for a reward, its first unless given."""
    return [slot.awaited[(of or slot.rewards[0]).name].state for slot in slots]


_RESULTS: dict[type, Callable[[EngineByHand, Any], ev.Event]] = {
    do.Encode: EngineByHand._encode,
    do.Store: EngineByHand._store,
    do.Restore: EngineByHand._restore,
    do.LookUp: EngineByHand._look_up,
    do.LookUpGroup: EngineByHand._look_up_group,
    do.Publish: EngineByHand._publish,
    do.PublishAgain: EngineByHand._publish_again,
    do.ReadNumbers: EngineByHand._read_numbers,
    do.ReadNotes: EngineByHand._read_notes,
    do.InspectDeliveries: EngineByHand._inspect,
    do.MeasureStore: EngineByHand._measure,
    do.Free: EngineByHand._free,
    do.Renew: EngineByHand._renew,
    do.CheckRequest: EngineByHand._check_request,
    do.ReadRequests: EngineByHand._read_requests,
    do.RegisterMember: EngineByHand._register,
    do.ReadDigests: EngineByHand._read_digests,
    do.ReadMembers: EngineByHand._read_members,
    do.PutGroupsBack: EngineByHand._put_back,
}

IO = tuple(_RESULTS)
"""The kinds of all actions that ask a server, or encode."""
