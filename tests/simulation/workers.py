"""Worker processes: the real protocol code of `workers.scoring` on simulated servers, with simulated models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kombu.exceptions import OperationalError

from tasks.celery_app import COMBINE, GROUP, PRIORITY_FIRST, SCORE
from tasks.errors import BusyError, ModelLoadError, StaleCodeError
from tasks.media import digest
from tasks.messages import WIRE_VERSION, GroupRequest, Heartbeat, Outcome, RewardCall, SampleRequest, ScoreRequest
from tasks.servers.connections import LOST
from tests.simulation.models import Models
from tests.simulation.network import Connection, Remote, Server, Weather
from tests.simulation.queues import Chords, Message, Queues
from tests.simulation.redis import GroupSlots, Outcomes, PayloadStore
from tests.simulation.world import BrokenPropertyError, Clock, Lock, Signal, World
from workers.process.heartbeat import REDIS_ERRORS
from workers.scoring.chunk import score_chunk
from workers.scoring.context import ScoringContext
from workers.scoring.group import score_and_combine, wait_and_combine
from workers.scoring.handling import handle
from workers.scoring.held_claims import EXTENSIONS_A_TTL, HeldClaims
from workers.scoring.task_message import TaskMessage
from workers.scoring.timeouts import write_timeouts

PUBLISH_TRIES, PUBLISH_PAUSE_S = 4, 0.2
"""As Celery's `task_publish_retry_policy`."""

RECONNECT_S = 0.3
"""A slot whose connection to the broker broke asks again so much later."""

QUIET_S = 3.0
"""A fault explains what is left of claims for so long."""

LONG_LOAD_S = 8.0
HAND_BACK_S = 1.5
GRACE_S = 30.0
LOOK_EVERY_S = 0.5

BEATS_A_IDENTITY = 4
"""The identity of the store is asked for with every so many heartbeats; a real worker asks with each."""

Handler = tuple[type[Any], Callable[..., str]]

HANDLERS: Mapping[str, Handler] = {
    SCORE: (ScoreRequest, score_chunk),
    GROUP: (GroupRequest, score_and_combine),
    COMBINE: (GroupRequest, wait_and_combine),
}


@dataclass(frozen=True)
class WorkerPlan:
    """One worker, which its supervisor starts again whenever it ends."""

    name: str
    queues: tuple[str, ...]
    num_slots: int = 2
    starts_at: float = 0.0
    restart_s: float = 0.5
    load_s: float = 0.05
    """How long it loads a model."""
    load_hangs: bool = False
    """A load in the first process of it takes `LONG_LOAD_S`."""
    call_s: float = 0.02
    """How long a model's call takes, for each sample."""
    stop_grace_s: float = 2.0
    other_wire: bool = False
    """The first process of it speaks another wire version."""
    other_store: bool = False
    """The first process of it uses another payload store."""
    outdated: bool = False
    """The first process of it has loaded other code than is asked for."""
    replaced_at: float = 6.0
    """When somebody ends a first process that speaks another wire version, or uses another store."""


@dataclass(frozen=True)
class Services:
    """The servers, and what is on them."""

    results_server: Server
    broker_server: Server
    payloads_server: Server
    outcomes: Outcomes
    store: PayloadStore
    other_store: PayloadStore
    queues: Queues
    chords: Chords
    groups: GroupSlots
    weather: Weather
    claim_ttl_s: float


class Worker:
    """A worker under a supervisor, over all its processes."""

    def __init__(self, world: World, services: Services, models: Models, plan: WorkerPlan) -> None:
        self.world, self.services, self.models, self.plan = world, services, models, plan
        self.num_started = 0
        self.running: WorkerProcess | None = None
        world.nobody.spawn(self._start_first, f"supervisor of {plan.name}")

    def _start_first(self) -> None:
        self.world.sleep(self.plan.starts_at)
        self._start()

    def _start(self) -> None:
        self.num_started += 1
        self.running = process = WorkerProcess(self, is_first=self.num_started == 1)
        process.process.on_death.append(self._start_again)
        if process.is_first and (self.plan.other_wire or self.plan.other_store):
            self.world.nobody.spawn(lambda: self._replace(process), f"operator of {self.plan.name}")

    def _replace(self, process: WorkerProcess) -> None:
        self.world.sleep(self.plan.replaced_at)
        process.process.kill("replaced")

    def _start_again(self) -> None:
        self.running = None

        def start() -> None:
            self.world.sleep(self.plan.restart_s)
            self._start()

        self.world.nobody.spawn(start, f"supervisor of {self.plan.name}")


class WorkerProcess:
    """One process of a worker: slots that take messages, and what keeps their claims."""

    def __init__(self, worker: Worker, is_first: bool) -> None:
        self.worker, self.world, self.plan, self.is_first = worker, worker.world, worker.plan, is_first
        self.models, services = worker.models, worker.services
        self.node = f"{self.plan.name}.{worker.num_started}"
        self.process = process = self.world.process(self.node)
        self.results = Connection(process, services.results_server, services.weather)
        self.broker = Connection(process, services.broker_server, services.weather)
        payloads = Connection(process, services.payloads_server, services.weather)
        self.outcomes = Remote(services.outcomes, self.results)
        uses_other_store = self.plan.other_store and is_first
        self.store = Remote(services.other_store if uses_other_store else services.store, payloads)
        self.queues = services.queues
        self.remote_queues = Remote(services.queues, self.broker)
        self.chords = Remote(services.chords, self.results)
        self.claims = Claims(self.world, self.outcomes)
        self.runner = Runner(self)
        self.context = ScoringContext(
            node=self.node,
            outcomes=self.outcomes,
            store=self.store,
            claims=self.claims,
            runner=self.runner,  # type: ignore[arg-type]
            send_body=self.send_body,
            clock=Clock(self.world),
            rng=process.random,
            process_id=f"p{worker.num_started}",
        )
        self.is_stopping = self.has_ended_beats = False
        self.num_in_hand = self._num_beats = 0
        self._store_identity = ""
        for number in range(self.plan.num_slots):
            process.spawn(self._slot, f"slot {number}")
        process.spawn(self._extend, "extender")
        process.spawn(self._speak, "speaker")

    # --- tasks -------------------------------------------------------------------------------------------------------

    def _slot(self) -> None:
        while not self.is_stopping:
            try:
                message = self.queues.take(self.broker, self.plan.queues)
            except LOST:
                self.world.sleep(RECONNECT_S)
                continue
            if self.is_stopping:  # it is gone, as what Celery has taken when it stops
                return
            self.num_in_hand += 1
            self._do(message)
            self.num_in_hand -= 1
            if not self.num_in_hand:
                self._check_claims()

    def _check_claims(self) -> None:
        """A process that has nothing in hand claims nothing, unless a fault has hit it or Redis a moment ago."""
        services, then = self.worker.services, self.world.now - QUIET_S
        if self.process.hit_since(then) or services.results_server.hit_since(then):
            return
        claims = services.outcomes.claimed_by(f"{self.node}/")
        if claims or self.claims.tokens:
            raise BrokenPropertyError("claim kept", f"{self.node} has nothing in hand, and claims {claims}")

    def _do(self, message: Message) -> None:
        kind, work = HANDLERS[message.task]
        wire = message.wire + 1 if self.plan.other_wire and self.is_first else message.wire
        told = TaskMessage(
            message.label,
            message.queue,
            message.request,
            wire,
            message.store,
            message.number,
            message.num_returns,
            message.digest,
        )
        try:
            words = handle(self.context, told, kind, work)
        except OperationalError:  # the body of a chord could not be sent; Celery logs it
            return
        self.world.say(self.process, "did", message.task, message.request, words)
        if message.chord is not None:
            with contextlib.suppress(*LOST):
                if self.chords.part_done(message.chord):
                    self.remote_queues.publish([message.chord.body])

    def send_body(self, message: TaskMessage) -> None:
        """Send the body of a chord, as Celery does: again, a few times."""
        body = Message(
            COMBINE,
            message.label,
            message.queue,
            message.request_id,
            WIRE_VERSION,
            message.store,
            priority=PRIORITY_FIRST,
            num_returns=message.num_returns,
            digest=message.digest,
        )
        for _ in range(PUBLISH_TRIES):
            try:
                return self.remote_queues.publish([body])
            except LOST:
                self.world.sleep(PUBLISH_PAUSE_S)
        raise OperationalError("the broker is away")

    # --- what keeps claims -------------------------------------------------------------------------------------------

    def _extend(self) -> None:
        self._repeat(self.claims.extend)

    def _speak(self) -> None:
        self._repeat(self._beat)

    def _repeat(self, call: Callable[[], None]) -> None:
        """As `HeartbeatThread` does."""
        ttl_s = self.worker.services.claim_ttl_s
        while not self.has_ended_beats:
            started = self.world.now
            with contextlib.suppress(*REDIS_ERRORS):
                call()
            self.world.sleep(max(0.1, ttl_s / EXTENSIONS_A_TTL - (self.world.now - started)))

    def _beat(self) -> None:
        loading = tuple(self.runner.loading)
        self._num_beats += 1
        if self._num_beats % BEATS_A_IDENTITY == 1:
            self._store_identity = self.store.identity()
        heartbeat = Heartbeat.model_construct(
            wire=WIRE_VERSION + (self.plan.other_wire and self.is_first),
            node=self.node,
            queues=self.plan.queues,
            host="sim",
            pid=1,
            store=self._store_identity,
            state="loading" if loading else "ready",
            loading=loading,
            loaded=tuple(self.runner.loaded),
            models=(),
            unanswered=(),
        )
        if not self.has_ended_beats:
            self.outcomes.beat(heartbeat, self.worker.services.claim_ttl_s)

    def end(self) -> None:
        """Say no more that this process lives."""
        self.has_ended_beats = True
        with contextlib.suppress(*REDIS_ERRORS):
            self.outcomes.end_beat(self.node)

    # --- ends --------------------------------------------------------------------------------------------------------

    def stop(self, grace_s: float | None = None) -> None:
        """Take no further message; finish what is in hand, or give it back, and end."""
        if self.is_stopping:
            return
        self.is_stopping = True
        self.world.say(self.process, "stops")
        self.queues.leave(self.process)
        grace_s = self.plan.stop_grace_s if grace_s is None else grace_s

        def stop() -> None:
            ends_at = self.world.now + grace_s
            while self.num_in_hand and self.world.now < ends_at:
                self.world.sleep(LOOK_EVERY_S / 5)
            self.hand_back()

        self.process.spawn(stop, "stopper")

    def hand_back(self) -> None:
        """Give claims back, for as long as a process that must end has for that, and end."""
        if self.num_in_hand:
            self.process.hit()
        handed_back = Signal(self.world)

        def hand_back() -> None:
            with contextlib.suppress(*REDIS_ERRORS):
                self.claims.release_all()
            self.end()
            handed_back.notify()

        self.process.spawn(hand_back, "hand back")
        handed_back.wait(HAND_BACK_S)
        self.process.kill("exits")
        self.world.check_alive()

    def end_hung(self, samples: Sequence[SampleRequest], timeout_s: float) -> None:
        """As the watchdog does: time out what hangs, let the healthy calls finish, end."""
        self.is_stopping = True
        self.process.hit()
        self.queues.leave(self.process)
        with contextlib.suppress(*REDIS_ERRORS):
            write_timeouts(self.outcomes, self.claims, samples, f"no return within {timeout_s:g} s")  # type: ignore[arg-type]
        ends_at = self.world.now + GRACE_S
        while self.runner.num_calling > 1 and self.world.now < ends_at:
            self.world.sleep(LOOK_EVERY_S)
        self.hand_back()


class Claims(HeldClaims):
    """The real ones, with a lock that lets others run while it is held over a call of a server."""

    def __init__(self, world: World, outcomes: Any) -> None:
        super().__init__(outcomes)
        self._extending = Lock(world)  # type: ignore[assignment]

    def hold(self, addresses: Iterable[str], token: str) -> None:
        """In an order that says nothing of the hashes of texts: a task gives a set."""
        super().hold(sorted(addresses), token)


def check_media(sample: SampleRequest, payloads: Mapping[str, bytes]) -> None:
    """A model is called with the media of its samples, and with no others."""
    for one in sample.members or (sample,):
        for refs in one.media.values():
            for ref in refs if isinstance(refs, tuple) else (refs,):
                if ref.name not in payloads or digest(payloads[ref.name]) != ref.digest:
                    raise BrokenPropertyError("media", f"{one.address} is scored without its own {ref.name}")


class Runner:
    """In the place of `workers.scoring.runner.ModelRunner`."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker, self._world, self._models = worker, worker.world, worker.models
        self.loaded: dict[str, None] = {}
        self.loading: dict[str, Signal] = {}
        self.num_calling = 0

    def is_loaded(self, call: RewardCall) -> bool:
        return call.fingerprint in self.loaded

    @contextlib.contextmanager
    def lend(self, call: RewardCall) -> Iterator[RewardCall]:
        worker, fingerprint = self._worker, call.fingerprint
        if worker.plan.outdated and worker.is_first:
            worker.stop(grace_s=GRACE_S)
            raise StaleCodeError(("my_rewards.py",))
        if fingerprint not in self.loaded:
            self._load(fingerprint)
        yield call

    def _load(self, fingerprint: str) -> None:
        if fingerprint in self.loading:  # another slot is at it
            self.loading[fingerprint].wait()
            if fingerprint in self.loaded:
                return
        plan = self._worker.plan
        signal = self.loading[fingerprint] = Signal(self._world)
        try:
            self._world.sleep(LONG_LOAD_S if plan.load_hangs and self._worker.is_first else plan.load_s)
            if fingerprint in self._models.unloadable:
                raise ModelLoadError("no weights")
            self.loaded[fingerprint] = None
        finally:
            self.loading.pop(fingerprint, None)
            signal.notify()

    def admit(self, model: RewardCall) -> None:
        if not self._models.has_permit(model.fingerprint):
            raise BusyError("its fleet's budget is in use")

    def run(
        self, model: RewardCall, call: RewardCall, samples: Sequence[SampleRequest], payloads: Mapping[str, bytes]
    ) -> Iterator[dict[str, Outcome]]:
        for sample in samples:
            check_media(sample, payloads)
        left = list(samples)
        while left:
            size = 1 if left[0].members else call.batch_size
            batch, left = left[:size], left[size:]
            yield self._call(call, batch)

    def _call(self, call: RewardCall, batch: list[SampleRequest]) -> dict[str, Outcome]:
        process, models, fingerprint = self._worker.process, self._models, call.fingerprint
        permit = models.take_permit(fingerprint, process)
        if permit is None:
            raise BusyError("its fleet's budget is in use")
        models.pay(batch, process)
        self._world.say(process, "calls", call.name, [s.address for s in batch])
        self.num_calling += 1
        self._world.sleep(self._worker.plan.call_s * len(batch) * (0.5 + process.random.random()))
        behaviours = [models.behaviour(sample) for sample in batch]
        if "kills" in behaviours:
            process.kill("a sample ends it")
            self._world.check_alive()
        if "hangs" in behaviours:
            models.hung_with.update(s.address for s in batch)
            timeout_s = call.timeout_s * len(batch)
            self._world.sleep(timeout_s)
            self._worker.end_hung(batch, timeout_s)
        self.num_calling -= 1
        models.give_back(fingerprint, permit)
        return {sample.address: models.outcome(sample, fingerprint) for sample in batch}
