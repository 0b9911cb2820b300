"""The engine of one client in one process: what the client calls, and how a caller waits for it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import redis

from tasks.celery_app import COMBINE, GROUP, SCORE, client_outcomes
from tasks.groups import GroupSlots
from tasks.messages import Failure, Note
from tasks.outcomes import ClientOutcomes
from tasks.payloads import (
    MAX_REQUEST_BYTES,
    PART_BYTES,
    PayloadStore,
    new_client_id,
    open_store,
)
from tasks.rewards import RewardConfig, RewardSpec, Split
from tasks.servers.connections import why_away
from tasks.settings import Settings
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.backend import Backend
from trainer_client.engine.backlog import LOOK_EVERY_S, Backlog
from trainer_client.engine.broker import CeleryBroker
from trainer_client.engine.diagnosis import Diagnosis
from trainer_client.engine.encoding import SampleEncoder
from trainer_client.engine.loop import Chore, Loop
from trainer_client.engine.model import NEVER, Awaited, RankIndex, Slot
from trainer_client.engine.publisher import Publisher
from trainer_client.engine.requests import RequestWriter, TaskNames
from trainer_client.engine.resume import slots_and_deliveries
from trainer_client.engine.server_errors import AWAY
from trainer_client.engine.state import EngineConfig, EngineState
from trainer_client.engine.why_late import Source, because
from trainer_client.progress import bars
from trainer_client.runs.code_versions import CodeVersions
from trainer_client.runs.registry import RunRegistry
from trainer_client.ticket import Ticket

log = logging.getLogger(__name__)

NO_WORKER_AFTER_S = 2.0
"""Heartbeats are asked for when `collect()` has waited for this long, to say early that a queue has no worker."""

ASK_S = 2.0
"""Redis is asked why something is late for so long at most: the deadline has passed then, or is near."""

KEEPS_UNSENT = tuple(
    source
    for source in Source
    if source not in (Source.AHEAD, Source.LOADING, Source.SUSPECTS)
)
"""What may keep samples from being sent. The others are about samples that were sent, and `collect()` asks for them: a
model that was loading at the last `collect()` may be loaded by now."""

ASKED = (
    Source.QUEUE,
    Source.AHEAD,
    Source.LOADING,
    Source.SUSPECTS,
    Source.STORED,
)
"""What only Redis can say."""

TELL_EVERY_S = 600.0
"""How often Redis is told what this run's rewards are, at most: it may have been emptied."""

COMPARE_EVERY_S = 0.5
"""How often the code that answered is compared with what other clients of the run have seen."""

TellWaiting = Callable[[Callable[[], str]], None]
"""Tells the log what a wait is for. It calls its argument, which may ask Redis, only if the log is due to be told."""


class Engine:
    """Takes samples to their outcomes, in threads of its own. A forked child makes its own.

    Args:
        app: Celery's; `app.settings` says where the servers are.
        config: The rewards, which Redis is told.
        chores: What else is to be done regularly: the rank lock is extended.
    """

    def __init__(  # noqa: PLR0913  (wires parts)
        self,
        app: Any,
        *,
        run: str,
        launch: str,
        rank: int,
        world_size: int,
        config: RewardConfig,
        chores: Sequence[Chore],
    ) -> None:
        settings: Settings = app.settings
        self.pid = os.getpid()
        self.client_id = new_client_id(run)
        self.outcomes: ClientOutcomes = client_outcomes(app)
        self.store: PayloadStore = open_store(settings, keeps_spares=True)
        self._settings, self._run = settings, run
        self._slots_over_ranks: GroupSlots | None = None
        if world_size > 1:
            self._slots_over_ranks = GroupSlots(
                self.outcomes.redis, run, launch, settings.result_ttl_s
            )
        slots = self._slots_over_ranks
        self._brokers = [CeleryBroker(app), CeleryBroker(app)]
        self._diagnosis = Diagnosis(self.outcomes, self.store)
        self._is_asking_of_idle_queues = False
        self._positions_seen: dict[str, list[RankIndex]] = {}
        """By group over ranks, which slots were filled when Redis was last asked."""

        value_bytes = MAX_REQUEST_BYTES
        with contextlib.suppress(*AWAY):  # a server that is away has the usual bound
            value_bytes = self.store.value_bytes()
        max_request_bytes = min(MAX_REQUEST_BYTES, value_bytes)
        self._state = EngineState(
            EngineConfig(
                run=run,
                rank=rank,
                client_id=self.client_id,
                max_store_bytes=settings.max_store_bytes,
                reconcile_s=settings.reconcile_s,
                payload_ttl_s=settings.payload_ttl_s,
                num_encoders=settings.sender_threads,
                shared_key=slots.key if slots is not None else None,
                part_bytes=min(PART_BYTES, value_bytes),
                max_request_bytes=max_request_bytes,
            ),
            time.monotonic(),
        )
        publisher = Publisher(
            self.outcomes,
            self.store,
            self._brokers[0],
            RequestWriter(run, TaskNames(SCORE, GROUP, COMBINE)),
            settings.payload_ttl_s,
            settings.result_ttl_s,
            max_request_bytes,
        )
        backend = Backend(
            outcomes=self.outcomes,
            store=self.store,
            groups=slots,
            publisher=publisher,
            inspector=self._brokers[1],
            encoder=SampleEncoder(run, rank, max_request_bytes),
            rank=rank,
            client_id=self.client_id,
            payload_ttl_s=settings.payload_ttl_s,
        )
        self._code_versions = code_versions = CodeVersions(run)
        self._registry = registry = RunRegistry(
            self.outcomes.redis, run, settings.result_ttl_s
        )
        tell_every_s = min(TELL_EVERY_S, settings.result_ttl_s / 4)
        self._loop = Loop(
            self._state,
            backend,
            settings.sender_threads,
            announce=lambda news: code_versions.see(news.spec, news.outcome),
            chores=[
                *chores,
                Chore(
                    tell_every_s, lambda: registry.register(config), is_due_at_once=True
                ),
                Chore(COMPARE_EVERY_S, lambda: code_versions.compare(registry)),
            ],
        )
        self._backlog = Backlog(self._loop, self.why_unsent)

    def close(self) -> None:
        """End the threads and give back the connections."""
        self._loop.close()
        # Of the last answers, for other clients. What Redis refuses, those who waited were told.
        with contextlib.suppress(*AWAY, redis.ResponseError):
            self._code_versions.compare(self._registry)
        for broker in self._brokers:
            broker.disconnect()
        self.store.close()

    # --- what callers do ---------------------------------------------------------------

    def submit(self, slots: Sequence[Slot]) -> None:
        """Encode and send these samples in the background."""
        self._backlog.count(len(slots))
        self._loop.put(ev.Submitted(slots))

    def give_up(self, slots: Sequence[Slot]) -> None:
        """Wait for these samples no more."""
        self._loop.put(ev.SlotsGivenUp(slots))

    def give_up_groups(self, split: Split, step: int, words: Mapping[Any, str]) -> None:
        """These groups get no further member: by id, what their members are told."""
        if words:
            self._loop.put(ev.GroupsIncomplete(split, step, words))

    def resume(self, ticket: Ticket, config: RewardConfig) -> list[Slot]:
        """Await what a process submitted that is gone; returns its slots.

        Args:
            config: The rewards that it was made with, as they stand in its launch.
        """
        slots, deliveries = slots_and_deliveries(
            ticket,
            config,
            self._settings.reconcile_s,
            time.monotonic(),
            lambda suffix: f"{self.client_id}.{uuid.uuid4().hex[:8]}.{suffix}",
        )
        self._loop.put(ev.TicketResumed(slots, deliveries))
        self._wait_until_taken_up()
        return slots

    def take_seconds(self) -> dict[str, float]:
        """Seconds that background threads have spent since this was asked last, by what."""
        return self._loop.take_seconds()

    # --- waits -------------------------------------------------------------------------

    @property
    def num_unsent(self) -> int:
        """Samples that were accepted and are not in a message yet."""
        return self._backlog.num_unsent

    def wait_for_backlog(self, max_backlog: int, timeout_s: float) -> None:
        """Wait while more than `max_backlog` samples are accepted and not yet sent. Raises `CollectTimeoutError`."""
        self._backlog.wait_for_room(max_backlog, timeout_s)

    def flush(self, timeout_s: float) -> None:
        """Wait until everything submitted has been encoded and sent. Raises `CollectTimeoutError`."""
        self._backlog.flush(timeout_s)

    def wait(
        self,
        slots: Sequence[Slot],
        deadline: float,
        progress: bool | None,
        tell_waiting: TellWaiting | None = None,
    ) -> bool:
        """Wait until all slots are done or the deadline (monotonic); whether they are.

        `tell_waiting` is called now and then with a function that says what is waited for.
        """
        names = _reward_names(slots)
        left = list(slots)
        ask_at = time.monotonic() + NO_WORKER_AFTER_S
        steps = frozenset(slot.step_key for slot in slots)
        with self._loop.waiting(steps), bars(names, len(slots), progress) as report:
            while True:
                left_s = deadline - time.monotonic()
                self._loop.wait_for(lambda: _are_done(left), min(left_s, LOOK_EVERY_S))
                if report is not None:
                    report({name: _count(slots, name) for name in names})
                if not left:
                    return True
                self._loop.raise_if_broken()
                if left_s <= 0:
                    return False
                if tell_waiting is not None:
                    tell_waiting(lambda: self.what_is_missing(slots))
                if time.monotonic() > ask_at:
                    ask_at = NEVER
                    self._ask_of_idle_queues()

    # --- why it is late ------------------------------------------------------------------

    def why_late(self, slots: Sequence[Slot], timeout_s: float) -> Failure:
        """The client's own reason for what is missing at the deadline; never stored."""
        num_late = sum(not slot.is_done for slot in slots)
        ending = because(self._why_missing(slots))
        return Failure(
            kind="timeout",
            message=f"{num_late} of {len(slots)} samples had no answer after {timeout_s:g} s{ending}",
        )

    def what_is_missing(self, slots: Sequence[Slot]) -> str:
        """Which rewards have no answer yet, of how many samples, and why as far as is known."""
        left = []
        for name in _reward_names(slots):
            num = sum(not slot.is_done_for(name) for slot in slots)
            if num:
                left.append(f"{name} ({num} of {len(slots)} samples)")
        return f"{', '.join(left)}{because(self._why_missing(slots))}"

    def why_unsent(self) -> str | None:
        """What keeps samples from being sent: a Redis that is away, a full store, a queue without a worker."""
        with self._loop.lock:
            deliveries = list(self._state.core.deliveries.values())
        queues = {delivery.spec.queue for delivery in deliveries}

        def ask() -> None:
            self._ask_of_queues(queues)
            self._ask_of_store()

        return self._ask(ask, KEEPS_UNSENT)

    def known_reasons(self) -> str | None:
        """What is known to keep things waiting, without asking anybody; None if nothing is."""
        with self._loop.lock:
            return self._state.why_late.words()

    def why_open(self, slot: Slot, spec: RewardSpec) -> str | None:
        """If a slot's group is not sealed since members are missing: which are there, as far as is known."""
        with self._loop.lock:
            groups = self._state.groups
            others = self._positions_seen.get(groups.shared_key_of(slot, spec.name), [])
            return groups.why_open(slot, spec.name, others)

    # --- private: why it is late -----------------------------------------------------------

    def _why_missing(self, slots: Sequence[Slot]) -> str | None:
        queues: dict[str, None] = {}
        for slot in slots:
            for spec in slot.rewards:
                if not slot.is_done_for(spec.name):
                    queues[spec.queue] = None
        with self._loop.lock:
            awaited = [
                one
                for slot in slots
                for one in slot.awaited.values()
                if one.outcome is None
            ]
            specs = [one.spec for one in awaited]
            addresses: dict[str, None] = {}
            for one in awaited:
                addresses.update(dict.fromkeys(one.in_hand_addresses))

        def ask() -> None:
            self._ask_of_groups()
            self._ask_of_queues(queues)
            self._put(Source.LOADING, self._diagnosis.loads(specs))
            self._put(Source.SUSPECTS, self._diagnosis.suspects(list(addresses)))
            self._ask_of_messages_ahead(awaited)
            self._ask_of_store()

        return self._ask(ask)

    def _ask_of_queues(self, queues: Iterable[str]) -> str | None:
        with self._loop.lock:
            ended: dict[str, Note] = dict(self._state.core.ended_workers)
        words = self._diagnosis.idle_queues(queues, ended)
        self._put(Source.QUEUE, words)
        return words

    def _ask_of_messages_ahead(self, awaited: Sequence[Awaited]) -> None:
        with self._loop.lock:
            tracking = self._state.tracking
            queued = tracking.queued(awaited)
        now = time.monotonic()
        words = self._diagnosis.ahead(queued, tracking.paces, self._run, now)
        self._put(Source.AHEAD, words)

    def _ask_of_store(self) -> None:
        """Whose bytes keep others from sending, if a store is full."""
        with self._loop.lock:
            waits = self._state.why_late.words(Source.STORE_FULL, Source.SENDING)
        words = None
        if waits:
            with contextlib.suppress(*AWAY):  # what waits for the store says so itself
                words = self._diagnosis.stored(self._run)
        self._put(Source.STORED, words)

    def _ask_of_groups(self) -> None:
        """Which slots of incomplete groups other ranks have filled."""
        if self._slots_over_ranks is None:
            return
        with self._loop.lock:
            groups = [g for g in self._state.groups if g.awaited is None]
        keys = [group.shared_key for group in groups]
        positions = self._slots_over_ranks.filled_slots(keys)
        self._positions_seen = dict(zip(keys, positions, strict=True))

    def _put(self, source: Source, words: str | None) -> None:
        with self._loop.lock:
            self._state.why_late.put(source, words)

    def _ask(
        self, question: Callable[[], object], sources: Sequence[Source] = ()
    ) -> str | None:
        """Let Redis say why, or say that it is away: within `ASK_S`, whatever its sockets would wait for.

        Args:
            sources: Whose reasons are wanted; all unless given.
        """
        failures: list[str] = []
        has_ended = threading.Event()

        def ask() -> None:
            try:
                question()
            except AWAY as error:
                failures.append(why_away(error))
            finally:
                has_ended.set()

        threading.Thread(target=ask, name="rewardq-ask", daemon=True).start()
        if not has_ended.wait(ASK_S):
            failures.append(f"Redis is away: it has not answered for {ASK_S:g} s")
        with self._loop.lock:
            if failures:  # what was known of workers is not known any more
                for source in ASKED:
                    self._state.why_late.withdraw(source)
            words = self._state.why_late.words(*sources)
        return words or (failures[0] if failures else None)

    def _ask_of_idle_queues(self) -> None:
        """Have it asked which queues have no worker, once for all who wait: while Redis is away the question waits, and
        each `collect()` of an outage would add another."""
        if not self._is_asking_of_idle_queues:
            self._is_asking_of_idle_queues = True
            self._loop.do_once(do.Lane.UPKEEP, self._warn_of_idle_queues)

    def _warn_of_idle_queues(self) -> None:
        """Let the log say once which queue of what is under way has no worker."""
        with self._loop.lock:
            deliveries = list(self._state.core.deliveries.values())
        words = self._ask_of_queues({d.spec.queue for d in deliveries})
        self._is_asking_of_idle_queues = False
        if words:
            self._loop.warn_once(words)

    # --- private: resume ---------------------------------------------------------------

    def _wait_until_taken_up(self) -> None:
        """Wait until what was put before is taken up, for a short time (where Redis is away it takes longer)."""
        is_done = threading.Event()
        self._loop.do_once(do.Lane.UPKEEP, is_done.set)
        is_done.wait(ASK_S)


def _reward_names(slots: Sequence[Slot]) -> tuple[str, ...]:
    """Names of all rewards of these slots, in their order."""
    names: dict[str, None] = {}
    for slot in slots:
        names.update((spec.name, None) for spec in slot.rewards)
    return tuple(names)


def _are_done(left: list[Slot]) -> bool:
    """Whether every slot has its outcomes; takes those from the end that have, so that no slot is looked at in vain.

    Something changes with every sample: to look at all of them each time would take the square of their number.
    """
    while left and left[-1].is_done:
        left.pop()
    return not left


def _count(slots: Sequence[Slot], name: str) -> tuple[int, int]:
    """How many slots have their outcome for a reward, and how many of these have failed."""
    num_done = sum(slot.is_done_for(name) for slot in slots)
    num_failed = sum(slot.has_failed_for(name) for slot in slots)
    return num_done, num_failed
