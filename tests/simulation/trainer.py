"""The trainer's side: ranks, each a process in which the real engine lives, on simulated servers."""

from __future__ import annotations

import itertools
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.celery_app import COMBINE, GROUP, PRIORITY_FIRST, SCORE
from tasks.groups import GroupSlots
from tasks.media import digest
from tasks.messages import WIRE_VERSION, Failure, Outcome
from tasks.outcomes import address
from tasks.rewards import RAW, RewardSpec
from tasks.samples import Beside
from tests.simulation.network import Connection, Remote
from tests.simulation.queues import Chord, Message
from tests.simulation.schedules import SamplePlan
from tests.simulation.workers import Services
from tests.simulation.world import BrokenPropertyError, Process, Signal, World
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.backend import Backend
from trainer_client.engine.encoding import Content, EncodedSample, Identity
from trainer_client.engine.loop import AWAY, FIRST_PAUSE_S, LAST_PAUSE_S, LAST_POLL_PAUSE_S, SENDS
from trainer_client.engine.model import Slot
from trainer_client.engine.publisher import Publisher
from trainer_client.engine.requests import RequestWriter, TaskNames
from trainer_client.engine.resume import slots_and_deliveries
from trainer_client.engine.state import EngineConfig, EngineState
from trainer_client.ticket import Ticket

RUN, LAUNCH, SPLIT = "run", "launch", "train"

ENCODE_S = 0.01
"""It takes at most so long to encode a sample."""

PAYLOAD_TTL_S, RESULT_TTL_S = 900.0, 86_400.0
RECONCILE_S = 0.3
NUM_ENCODERS = 2

NOTHING_BESIDE = Beside(metadata={}, fps=None, sample_rate=None, withheld=())


@dataclass(frozen=True)
class SimulatedSample:
    """In the place of a `Sample`: equal contents are equal samples."""

    content: int
    prompt: str


@dataclass
class Encoder:
    """In the place of the engine's: it takes time, and what it makes of a sample is known."""

    world: World
    process: Process
    invalid: frozenset[int]
    rank: int

    def encode(self, slot: Slot, sample: SimulatedSample) -> EncodedSample:
        self.world.sleep(ENCODE_S * self.process.random.random())
        identities = {}
        for spec in slot.rewards:
            scored = spec.part if spec.is_groupwise else spec
            key = key_of_content(sample.content)
            if self.is_invalid(sample):  # it is like no other
                key = f"bad{self.rank}s{slot.step}i{slot.index}"
            identities[spec.name] = Identity(key, address(RUN, scored.fingerprint, key), NOTHING_BESIDE)
        if self.is_invalid(sample):
            return EncodedSample(
                sample.prompt, identities, problem=Failure(kind="invalid", message="cannot be encoded")
            )
        return EncodedSample(sample.prompt, identities, contents={("image", RAW): [content_of(sample.content)]})

    def is_invalid(self, sample: SimulatedSample) -> bool:
        return sample.content in self.invalid


def key_of_content(content: int) -> str:
    """The key of a sample that can be encoded."""
    return f"c{content:03d}"


_CONTENTS: dict[int, Content] = {}


def content_of(content: int) -> Content:
    """The bytes of a sample."""
    known = _CONTENTS.get(content)
    if known is None:
        data = b"content %03d" % content * 10
        known = _CONTENTS[content] = Content(data, digest(data), (10, 12, 1), "raw")
    return known


class SimulatedBroker:
    """The queues as one connection of a trainer's has them."""

    def __init__(self, queues: Remote, chords: Remote, name: str) -> None:
        self._queues, self._chords = queues, chords
        self._names = (f"{name}.{number}" for number in itertools.count())

    def publish(self, messages: Sequence[Any], store_id: str) -> None:
        sent: list[Message] = []
        chords: list[Chord] = []
        for one in messages:
            if one.header:
                chords.append(self._chord(one, store_id))
                sent += [self._message(part, store_id, chords[-1]) for part in one.header]
            else:
                sent.append(self._message(one, store_id))
        if chords:
            self._chords.begin(chords)
        self._queues.publish(sent)

    def num_waiting(self, queue: str) -> int:
        return self._queues.num_waiting(queue)

    def disconnect(self) -> None:
        """Nothing is held open."""

    def _chord(self, body: Any, store_id: str) -> Chord:
        message = Message(
            COMBINE,
            body.label,
            body.queue,
            body.request,
            WIRE_VERSION,
            store_id,
            priority=PRIORITY_FIRST,
            digest=body.digest,
        )
        return Chord(next(self._names), len(body.header), message)

    @staticmethod
    def _message(one: Any, store_id: str, chord: Chord | None = None) -> Message:
        return Message(
            one.task,
            one.label,
            one.queue,
            one.request,
            WIRE_VERSION,
            store_id,
            one.number,
            digest=one.digest,
            chord=chord,
        )


@dataclass
class Settings:
    """Of one client."""

    rank: int
    world_size: int
    rewards: tuple[RewardSpec, ...]
    invalid: frozenset[int]
    max_store_bytes: int
    is_calm: bool
    """Nothing goes wrong in this schedule."""

    # As `slots_and_deliveries` asks a `RewardConfig`.
    eval_rewards: tuple[RewardSpec, ...] = ()

    def of(self, _split: str) -> tuple[RewardSpec, ...]:
        """The rewards of a split."""
        return self.rewards


@dataclass
class Client:
    """The engine in one process: what `loop.py` is in a real one, with greenlets for threads."""

    process: Process
    services: Services
    settings: Settings
    client_id: str
    slots: list[Slot] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world = self.process.world
        self.changed = Signal(self.world)
        self._lanes = {lane: deque[Any]() for lane in do.Lane}
        self._work = {lane: Signal(self.world) for lane in do.Lane}
        self._waiters = itertools.count()
        self._num_under_way = 0
        self.backend, groups = self._backend()
        config = EngineConfig(
            run=RUN,
            rank=self.settings.rank,
            client_id=self.client_id,
            max_store_bytes=self.settings.max_store_bytes,
            reconcile_s=RECONCILE_S,
            payload_ttl_s=PAYLOAD_TTL_S,
            num_encoders=NUM_ENCODERS,
            shared_key=groups.key if groups is not None else None,
        )
        self.state = EngineState(config, self.world.now)
        self.wake_at = self.state.wake_at
        for lane in do.Lane:
            for number in range(NUM_ENCODERS if lane is do.Lane.POOL else 1):
                self.process.spawn(lambda lane=lane: self._serve(lane), f"{lane.value} {number}")
        self._timer = self.process.spawn(self._tick, "timer")

    def _backend(self) -> tuple[Backend, GroupSlots | None]:
        services, process = self.services, self.process
        results = Connection(process, services.results_server, services.weather)
        broker = Connection(process, services.broker_server, services.weather)
        payloads = Connection(process, services.payloads_server, services.weather)
        queues, chords = Remote(services.queues, broker), Remote(services.chords, results)
        groups: Any = None
        if self.settings.world_size > 1:
            groups = Remote(services.groups, results)
            groups.key = services.groups.key
        outcomes: Any = Remote(services.outcomes, results)
        store: Any = Remote(services.store, payloads)
        publisher = Publisher(
            outcomes,
            store,
            SimulatedBroker(queues, chords, f"{self.client_id}.p"),
            RequestWriter(RUN, TaskNames(SCORE, GROUP, COMBINE)),
            PAYLOAD_TTL_S,
            RESULT_TTL_S,
        )
        backend = Backend(
            outcomes=outcomes,
            store=store,
            groups=groups,
            publisher=publisher,
            inspector=SimulatedBroker(queues, chords, f"{self.client_id}.i"),
            encoder=Encoder(self.world, process, self.settings.invalid, self.settings.rank),  # type: ignore[arg-type]
            rank=self.settings.rank,
            client_id=self.client_id,
            payload_ttl_s=PAYLOAD_TTL_S,
        )
        return backend, groups

    # --- the loop ----------------------------------------------------------------------------------------------------

    def feed(self, event: Any) -> None:
        """Let the state take up an event, and pass on what is to be done."""
        self.world.check_alive()
        actions = self.state.apply(event, self.world.now)
        self._check(event)
        for action in actions:
            if self.settings.is_calm:
                self._check_first(action)
            if hasattr(action, "lane"):
                self._num_under_way += 1
                self._put(action)
        if self.state.core.has_changed:
            self.state.core.has_changed = False
            self.changed.notify()
        self.wake_at = max(self.state.wake_at, self.world.now)
        if self.world.current is not self._timer:
            self.world.wake(self._timer, self.wake_at)

    def _check(self, event: Any) -> None:
        try:
            self.state.check()
        except AssertionError as error:
            raise BrokenPropertyError("invariant", f"after {event}: {error!r}") from error

    @staticmethod
    def _check_first(action: Any) -> None:
        """Where nothing goes wrong nothing is sent twice."""
        deliveries = action.deliveries if isinstance(action, do.Publish) else ()
        again = [a.address for delivery in deliveries for a in delivery.awaited if a.num_sends > 1]
        if again or isinstance(action, do.PublishAgain):
            raise BrokenPropertyError("sent again", f"without a fault: {action}")

    def _serve(self, lane: do.Lane) -> None:
        actions, work = self._lanes[lane], self._work[lane]
        while True:
            while not actions:
                work.wait()
            action, num_failures = actions.popleft()
            try:
                event = self.backend.perform(action)
            except AWAY:
                self._retry_later(action, num_failures + 1)
            else:
                self._num_under_way -= 1
                self.feed(event)

    def _retry_later(self, action: Any, num_failures: int) -> None:
        """The lane goes on with what follows, as a real one does."""
        longest_s = LAST_PAUSE_S if action.lane in SENDS else LAST_POLL_PAUSE_S
        pause_s = min(longest_s, FIRST_PAUSE_S * 2 ** (num_failures - 1))

        def retry() -> None:
            self.world.sleep(pause_s)
            self._put(action, num_failures)

        self.process.spawn(retry, "retry")

    def _put(self, action: Any, num_failures: int = 0) -> None:
        self._lanes[action.lane].append((action, num_failures))
        self._work[action.lane].notify()

    def _tick(self) -> None:
        while True:
            self.world.park(self.wake_at)
            if self.wake_at <= self.world.now:
                self.feed(ev.Tick())
                if self.wake_at <= self.world.now:
                    raise BrokenPropertyError("spins", f"a tick is due again at once, at {self.world.now:.3f}")

    # --- callers -----------------------------------------------------------------------------------------------------

    def submit(self, step: int, start: int, samples: Sequence[SamplePlan], ticket: int) -> list[Slot]:
        """Submit samples of a step, the first of which has this index in it."""
        slots = [
            Slot(
                split=SPLIT,
                step=step,
                index=start + number,
                group=sample.group,
                sample=SimulatedSample(sample.content, f"prompt {sample.content}"),  # type: ignore[arg-type]
                held={},
                rewards=self.settings.rewards,
                submitted_at=self.world.now,
                group_size=sample.group_size,
                ticket=ticket,
            )
            for number, sample in enumerate(samples)
        ]
        self.feed(ev.Submitted(slots))
        return slots

    def collect(self, slots: Sequence[Slot], timeout_s: float) -> bool:
        """Wait until all have their outcomes, or the time is over; whether they have."""
        deadline = self.world.now + timeout_s
        waiter = next(self._waiters)
        self.feed(ev.WaitBegan(waiter, frozenset(slot.step_key for slot in slots)))
        while not (is_done := all(slot.is_done for slot in slots)) and self.world.now < deadline:
            self.changed.wait(deadline - self.world.now)
        self.feed(ev.WaitEnded(waiter))
        return is_done

    @property
    def has_groups(self) -> bool:
        """Whether a reward needs whole groups."""
        return any(spec.is_groupwise for spec in self.settings.rewards)

    def give_up_groups(self, step: int, words: dict[int, str]) -> None:
        """These groups of a step get no further member."""
        self.feed(ev.GroupsIncomplete(SPLIT, step, words))

    def give_up(self, slots: Sequence[Slot]) -> None:
        """Wait for these no more."""
        self.feed(ev.SlotsGivenUp(slots))

    def pickle(self, slots: Sequence[Slot]) -> bytes:
        """A pickled ticket of these samples."""
        first = slots[0]
        ticket = Ticket(
            run=RUN,
            launch=LAUNCH,
            split=SPLIT,
            step=first.step,
            rank=self.settings.rank,
            start=first.index,
            stop=first.index + len(slots),
            fingerprints=(),
            slots=slots,
            number=first.ticket,
        )
        return pickle.dumps(ticket)

    @staticmethod
    def is_sent(pickled: bytes) -> bool:
        """Whether all samples of a pickled ticket were sent."""
        ticket = pickle.loads(pickled)
        return bool(ticket.num_sent == ticket.num_samples)

    def resume(self, pickled: bytes) -> list[Slot]:
        """Wait for what an earlier process submitted."""
        ticket = pickle.loads(pickled)
        slots, deliveries = slots_and_deliveries(
            ticket, self.settings, RECONCILE_S, self.world.now, self.state.core.new_name
        )
        for slot in slots:
            slot.ticket = ticket.number
        self.feed(ev.TicketResumed(slots, deliveries))
        return slots

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way that ends by itself."""
        core = self.state.core
        return not self._num_under_way and not core.payloads and not core.awaited


def outcomes_of(slots: Sequence[Slot]) -> Iterator[tuple[Slot, str, Outcome | None]]:
    """What is known of each reward of each slot."""
    for slot in slots:
        for spec in slot.rewards:
            yield slot, spec.name, slot.outcome_for(spec.name)
