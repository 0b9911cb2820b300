"""One schedule in one world: builds it, lets everything happen, and says which property broke."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from tasks import keys
from tasks.messages import Outcome
from tasks.rewards import RewardSpec
from tests.simulation import properties
from tests.simulation.models import Behaviour, Models
from tests.simulation.network import Server
from tests.simulation.queues import Chords, Message, Queues
from tests.simulation.ranks import make_ranks
from tests.simulation.redis import GroupSlots, Keyspace, Outcomes, PayloadStore
from tests.simulation.schedules import SERVERS, START_S, Fault, RewardPlan, Schedule, refusal_of
from tests.simulation.trainer import LAUNCH, RESULT_TTL_S, RUN, key_of_content
from tests.simulation.workers import Services, Worker
from tests.simulation.world import MAX_EVENTS, BrokenPropertyError, World
from trainer_client.engine.losses import MAX_PAUSE_S
from workers.scoring.quarantine import MOST_STARTS_ALONE

CLAIM_TTL_S = 1.0

RECOVERY_S = 60.0
"""So long after the last fault every sample has ended, or something waits for what does not come."""

ODD_RECOVERY_S = 200.0
"""And so long where samples end or hold up their workers, or these can do nothing for a while: pauses grow."""

ODD_RECOVERY_A_REWARD_S = MOST_STARTS_ALONE * MAX_PAUSE_S
"""And so long for each reward: a sample that ends workers is scored alone a few times, a pause between two of them."""

LOOK_EVERY_S = 0.1

REPEATED_LATE_S = 2.0
"""A message that comes twice comes again within this long."""

REWARD_TIMEOUT_S = 5.0
"""`timeout_s` of every reward."""


class KnownSpec(RewardSpec):
    """A reward whose fingerprints are computed once: here they are asked for with every event."""

    @functools.cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        return super().fingerprint

    @functools.cached_property
    def call(self) -> Any:  # type: ignore[override]
        return super().call

    @functools.cached_property
    def part(self) -> RewardSpec:  # type: ignore[override]
        part = RewardSpec(**{name: getattr(self, name) for name in RewardSpec.model_fields}).part
        return self if self.how != "rank" else KnownSpec(**part.model_dump())


MODEL_OF = {"PickScore": "PickScore", "rank": "PickScore_Rank", "wins": "pairwise_judge"}
HOW_OF = {"rank": "rank", "wins": "wins", "model": "model"}


@functools.cache
def spec_of(plan: RewardPlan, number: int) -> RewardSpec:
    """A reward as the trainer's config has it."""
    return KnownSpec(
        name=f"{plan.kind}{number}",
        reward_model=MODEL_OF.get(plan.kind, f"sim.{plan.kind}{number}"),
        how=HOW_OF.get(plan.kind, "each"),
        queue=plan.queue,
        batch_size=plan.batch_size,
        async_reward=not plan.is_held,
        timeout_s=REWARD_TIMEOUT_S,
        fields=("prompt", "image"),
        options={"opponents": plan.opponents} if plan.kind == "wins" else {},
    )


class WatchedOutcomes(Outcomes):
    """Outcomes that see to it that no suspect is given up too early."""

    def _write_one(self, address: str, outcome: Outcome) -> bool:
        if outcome.failure is not None and outcome.failure.message.startswith(properties.KILLED):
            starts = self._keys.get(keys.starts(address)) or {}
            since_ms = self._keys.now_ms() - starts.get("first_alone_ms", self._keys.now_ms())
            if starts and since_ms < 1000 * REWARD_TIMEOUT_S:
                raise BrokenPropertyError("given up early", f"{address} after {since_ms} ms alone")
        return super()._write_one(address, outcome)


class Simulation:
    """A schedule that is carried out.

    Args:
        traces: Keep what happens, for people.
        max_events: A schedule that takes more waits for ever.
    """

    def __init__(self, schedule: Schedule, traces: bool = False, max_events: int = MAX_EVENTS) -> None:
        self.schedule = schedule
        self.world = World(schedule.seed, traces, max_events)
        self.specs = tuple(spec_of(plan, number) for number, plan in enumerate(schedule.rewards))
        self._make_servers()
        self.models = self._make_models()
        self.services = self._make_services()
        self.workers = [Worker(self.world, self.services, self.models, plan) for plan in schedule.workers]
        invalid = frozenset(c for c, behaviour in schedule.behaviours if behaviour == "invalid")
        self.ranks = make_ranks(
            self.world,
            self.services,
            self.specs,
            invalid,
            self._one_is_done,
            schedule,
        )
        for fault in schedule.faults:
            self._plan(fault)

    def run(self) -> None:
        """Let everything happen.

        Raises:
            BrokenPropertyError, OutOfTimeError: What must not happen.
        """
        recovery_s = RECOVERY_S
        if self.schedule.is_odd:
            recovery_s = ODD_RECOVERY_S + len(self.schedule.rewards) * ODD_RECOVERY_A_REWARD_S
        with quiet_workers():
            self.world.run(max(0.0, self.schedule.faults_end - self.world.now) + recovery_s)

    # --- what there is -----------------------------------------------------------------------------------------------

    def _make_servers(self) -> None:
        names = SERVERS if self.schedule.num_servers == 3 else ("results", "results", "payloads")
        if self.schedule.num_servers == 1:
            names = ("results", "results", "results")
        made = {name: Server(self.world, name) for name in dict.fromkeys(names)}
        self.servers = tuple(made[name] for name in names)

    def _make_models(self) -> Models:
        models = Models(self.world, self.servers[0])
        for spec, plan in zip(self.specs, self.schedule.rewards, strict=True):
            fingerprint = spec.part.fingerprint
            if plan.budget is not None:
                models.budgets[fingerprint] = plan.budget
            if plan.is_unloadable:
                models.unloadable.add(fingerprint)
            if spec.how == "wins":
                models.comparing.add(fingerprint)
            else:
                models.behaviours |= self._behaviours_for(fingerprint)
        return models

    def _behaviours_for(self, fingerprint: str) -> dict[tuple[str, str], Behaviour]:
        behaviours: dict[tuple[str, str], Behaviour] = {}
        for content, behaviour in self.schedule.behaviours:
            if behaviour != "invalid":
                behaviours[fingerprint, key_of_content(content)] = behaviour
        return behaviours

    def _make_services(self) -> Services:
        results, broker, payloads = self.servers
        self.keyspace, self.media_keyspace = Keyspace(self._now_ms), Keyspace(self._now_ms)
        results.flushes.append(self.keyspace.flush)
        payloads.flushes.append(self.media_keyspace.flush)
        chords = Chords()
        results.flushes.append(chords.counts.clear)
        return Services(
            results_server=results,
            broker_server=broker,
            payloads_server=payloads,
            outcomes=WatchedOutcomes(self.keyspace, CLAIM_TTL_S, RESULT_TTL_S),
            store=PayloadStore(self.media_keyspace, "store"),
            other_store=PayloadStore(Keyspace(self._now_ms), "other store"),
            queues=Queues(self.world, broker, self._copies),
            chords=chords,
            groups=GroupSlots(self.keyspace, RUN, LAUNCH, RESULT_TTL_S),
            weather=self.schedule.weather,
            claim_ttl_s=CLAIM_TTL_S,
        )

    def _now_ms(self) -> int:
        return int(1000 * self.world.now)

    def _copies(self, _message: Message) -> Sequence[float]:
        """How often a message comes, and when."""
        weather, rng = self.schedule.weather, self.world.random
        if self.world.now >= weather.until:
            return (0.0,)
        if rng.random() < weather.message_lost:
            return ()
        if rng.random() < weather.message_repeated:
            return (0.0, REPEATED_LATE_S * rng.random())
        return (0.0,)

    # --- what goes wrong ---------------------------------------------------------------------------------------------

    def _plan(self, fault: Fault) -> None:
        def happen() -> None:
            self.world.sleep(fault.at - START_S)
            self.world.say(self.world.nobody, "fault", str(fault))
            self._happen(fault)

        self.world.nobody.spawn(happen, "fault")

    def _happen(self, fault: Fault) -> None:
        where, what = fault.kind.split(" ", 1)[0], fault.kind
        if what.endswith(" worker"):
            self._hit_worker(what, fault)
        elif what.endswith(" trainer"):
            self.ranks[fault.target].hit(what, fault.seconds)
        elif where == "payload":
            self._lose_payload(fault)
        else:
            self._hit_server(what, self.servers[fault.target], fault)

    def _hit_worker(self, what: str, fault: Fault) -> None:
        running = self.workers[fault.target].running
        if running is None:
            return
        if what == "kill worker":
            running.process.kill("killed")
        elif what == "stall worker":
            running.process.stall(fault.seconds)
        elif what == "stop worker":
            running.stop()
        else:
            running.process.cut_off(fault.seconds)

    def _hit_server(self, what: str, server: Server, fault: Fault) -> None:
        if what == "server away":
            server.go_away(fault.seconds, is_emptied=False)
        elif what == "server restarted":
            server.go_away(fault.seconds, is_emptied=True)
        elif what == "server emptied":
            server.flush()
        elif what == "server refuses":
            server.refuses_until, server.refusal = self.world.now + fault.seconds, refusal_of(fault)
        else:
            server.hangs_until = self.world.now + fault.seconds

    def _lose_payload(self, fault: Fault) -> None:
        names = self.services.store.names()
        if names:
            self.services.store.free([names[fault.detail % len(names)]])

    # --- how it ends -------------------------------------------------------------------------------------------------

    def _one_is_done(self) -> None:
        """A rank has collected everything."""
        if all(rank.is_done for rank in self.ranks):
            self.world.nobody.spawn(self._end, "end")

    @property
    def _is_quiet(self) -> bool:
        """Whether no rank and no worker has anything in hand."""
        processes = [worker.running for worker in self.workers if worker.running is not None]
        return all(rank.client.is_idle for rank in self.ranks) and not any(p.num_in_hand for p in processes)

    def _end(self) -> None:
        """Look at what is left, once what is under way has ended."""
        properties.check_answers(self)
        properties.check_first_stays(self)
        self.world.sleep(max(0.0, self.schedule.faults_end - self.world.now))
        while not self._is_quiet:
            self.world.sleep(LOOK_EVERY_S)
        self.world.sleep(properties.SETTLE_S)
        properties.check_left_over(self)
        properties.check_starts(self)
        self.world.is_over = True


@contextlib.contextmanager
def quiet_workers() -> Iterator[None]:
    """Meanwhile workers log nothing: they raise and end all the time."""
    log = logging.getLogger("workers")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
