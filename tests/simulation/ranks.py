"""What each rank of the trainer does: submits its steps, collects them, is killed, comes again with its tickets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.messages import Outcome
from tasks.rewards import RewardSpec
from tests.simulation.schedules import MUCH_ROOM, RankPlan, Schedule, StepPlan, incomplete_groups
from tests.simulation.trainer import Client, Settings, outcomes_of
from tests.simulation.workers import Services
from tests.simulation.world import BrokenPropertyError, Process, Signal, World

RESTART_S = 0.7
"""A trainer that was killed comes again so much later."""

CHECKPOINT_EVERY_S = 0.15
"""A trainer that collects a step pickles its tickets so often."""

COLLECT_AGAIN_S = 50.0

LATE_S = 0.01
"""A wait may outlive its deadline by so much."""

SEEN_WITHIN_S = 0.5
"""An answer is seen within this long after it was written, if nothing goes wrong."""

ENDED_WITH_PROCESS = (
    "the process that submitted it ended before it was sent",
    "its media left the payload store with the process that held them",
)
"""What samples of a process that was killed may be told."""

INCOMPLETE = "its group lacks a member"

Position = tuple[int, int, str]
"""A step, an index in it, the name of a reward."""


def is_of_ended_process(outcome: Outcome) -> bool:
    """Whether a sample has no reward since its trainer was killed."""
    return outcome.failure is not None and outcome.failure.message in ENDED_WITH_PROCESS


class Barrier:
    """Ranks wait for each other at the end of a step, as a trainer's all-gather has them do."""

    def __init__(self, world: World, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._arrived: dict[int, set[int]] = {}
        self._signal = Signal(world)

    def wait(self, rank: int, step: int) -> None:
        """Return once all ranks have come as far."""
        arrived = self._arrived.setdefault(step, set())
        arrived.add(rank)
        if len(arrived) == self._num_ranks:
            self._signal.notify()
        while len(arrived) < self._num_ranks:
            self._signal.wait()

    def has_opened(self, step: int) -> bool:
        """Whether all ranks have come as far."""
        return len(self._arrived.get(step, ())) == self._num_ranks

    def leave(self, rank: int, step: int) -> None:
        """A rank that was killed while it waited has not arrived."""
        self._arrived.get(step, set()).discard(rank)


@dataclass
class Rank:
    """One rank of a trainer, over all its processes."""

    world: World
    services: Services
    plan: RankPlan
    settings: Settings
    barrier: Barrier
    on_done: Callable[[], None]
    schedule: Schedule
    num_started: int = 0
    _open: tuple[int, StepPlan, list[Any]] | None = None
    """The step that is collected."""
    num_steps_done: int = 0
    is_done: bool = False
    answers: dict[Position, Outcome] = field(default_factory=dict)
    given_up: set[Position] = field(default_factory=set)
    rewards_seen: dict[str, list[Outcome]] = field(default_factory=dict)
    """By address, each other outcome that was a reward, or a group's with rewards only."""
    failed_before: dict[str, int] = field(default_factory=dict)
    """By address, the attempt whose failure was collected in an earlier step."""
    tickets: dict[tuple[int, int], Any] = field(default_factory=dict)
    """On disk: by step and number of the submit, what was pickled."""

    def __post_init__(self) -> None:
        self.world.nobody.spawn(self._start_first, f"launcher of rank {self.number}")

    @property
    def number(self) -> int:
        """Which rank it is."""
        return self.settings.rank

    @property
    def may_be_killed(self) -> bool:
        """Whether a fault ends its process: then its tickets are needed."""
        faults = self.schedule.faults
        return any(fault.kind == "kill trainer" and fault.target == self.number for fault in faults)

    @property
    def waits_for_room(self) -> bool:
        """Whether samples may wait until there is room for their media; they do not ask for answers meanwhile."""
        return self.plan.max_store_bytes < MUCH_ROOM

    def hit(self, what: str, seconds: float) -> None:
        """A fault hits the process that it is now."""
        if self.process.is_dead or not self.num_started:
            return
        if what == "stall trainer":
            self.process.stall(seconds)
        elif what == "cut off trainer":
            self.process.cut_off(seconds)
        elif not self.is_done:
            self.process.kill("killed")
            if self.barrier.has_opened(self.num_steps_done):  # the others go on: they were all together
                self.num_steps_done += 1
            else:
                self.barrier.leave(self.number, self.num_steps_done)
            self.world.nobody.spawn(self._start_again, f"launcher of rank {self.number}")

    def _start_first(self) -> None:
        self.process = Process(self.world, "not started")
        self.world.sleep(self.plan.starts_at)
        self._start()

    def _start_again(self) -> None:
        self.world.sleep(RESTART_S)
        self._start()

    def _start(self) -> None:
        self.num_started += 1
        self._open = None
        name = f"r{self.number}.{self.num_started}"
        self.process = self.world.process(name)
        self.client = Client(self.process, self.services, self.settings, name)
        self.process.spawn(self._train, "main")
        self.process.spawn(self._save_checkpoints, "checkpoints")

    # --- what it does ------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        for step in range(self.num_steps_done, len(self.plan.steps)):
            self._train_step(step, self.plan.steps[step])
            self.num_steps_done = step + 1
        while not self.client.is_idle:
            self.world.sleep(0.1)
        self.is_done = True
        self.on_done()

    def _train_step(self, step: int, plan: StepPlan) -> None:
        slots = self._submit(step, plan)
        if self.settings.world_size == 1:
            words = dict.fromkeys(incomplete_groups(plan.submits), INCOMPLETE)
            if words and self.client.has_groups:
                self.client.give_up_groups(step, words)
        self._open = step, plan, slots
        is_complete = self._collect(slots, plan.timeout_s)
        if not is_complete and plan.is_given_up:
            slots = self._give_up(slots)
        while not is_complete:
            is_complete = self._collect(slots, COLLECT_AGAIN_S)
        self.barrier.wait(self.number, step)
        self._open = None
        self._remember_failures(slots)
        self.client.give_up(slots)

    def _give_up(self, slots: list[Any]) -> list[Any]:
        """Cancel the first ticket of a step, or all where a group would wait for its members; returns the rest."""
        is_grouped = any(spec.is_groupwise for spec in self.settings.rewards)
        cancelled = [slot for slot in slots if is_grouped or slot.ticket == 0]
        for slot, reward, outcome in outcomes_of(cancelled):
            if outcome is None:
                self.given_up.add((slot.step, slot.index, reward))
        self.client.give_up(cancelled)
        return [slot for slot in slots if slot not in cancelled]

    def _submit(self, step: int, plan: StepPlan) -> list[Any]:
        slots: list[Any] = []
        for number, samples in enumerate(plan.submits):
            ticket = self.tickets.get((step, number))
            if ticket is not None and self._may_resume(ticket, step):
                slots += self.client.resume(ticket)
            else:
                slots += self.client.submit(step, len(slots), samples, ticket=number)
            self._pickle(step, plan, slots)
            if plan.pause_s:
                self.world.sleep(plan.pause_s)
                self._pickle(step, plan, slots)
        return slots

    def _may_resume(self, ticket: bytes, step: int) -> bool:
        """Whether the samples of a ticket are not to be submitted anew. A group waits for ever for a member that was
        not sent, and other ranks also for one whose media are gone with its process."""
        if self.settings.world_size > 1:
            return not self.schedule.may_lose_payloads and self.client.is_sent(ticket)
        is_submitted = all((step, number) in self.tickets for number in range(len(self.plan.steps[step].submits)))
        return is_submitted or not any(spec.is_groupwise for spec in self.settings.rewards)

    def _pickle(self, step: int, plan: StepPlan, slots: Sequence[Any]) -> None:
        if not (plan.is_pickled and self.may_be_killed):
            return
        for number in range(len(plan.submits)):
            mine = [slot for slot in slots if slot.ticket == number]
            if mine:
                self.tickets[step, number] = self.client.pickle(mine)

    def _save_checkpoints(self) -> None:
        """Pickle the tickets of the step that is collected, again and again: some of it is answered then."""
        while True:
            self.world.sleep(CHECKPOINT_EVERY_S)
            if self._open is not None:
                self._pickle(*self._open)

    def _collect(self, slots: Sequence[Any], timeout_s: float) -> bool:
        """Whether all is there by then."""
        began, deadline = self.world.now, self.world.now + timeout_s
        is_complete = self.client.collect(slots, timeout_s)
        if self.world.now > deadline + LATE_S and not self.process.hit_since(deadline):
            raise BrokenPropertyError("late", f"a wait until {deadline:.3f} ended at {self.world.now:.3f}")
        for slot, reward, outcome in outcomes_of(slots):
            if outcome is not None:
                self._see((slot.step, slot.index, reward), outcome)
        self._see_rewards(slots)
        self._check_are_tried_anew(slots)
        if is_complete and self.schedule.is_faultless and not self.waits_for_room:
            self._check_is_soon(slots, began)
        return is_complete

    def _check_is_soon(self, slots: Sequence[Any], began: float) -> None:
        """An answer is seen soon after it was written, if nothing goes wrong."""
        written_ms = self.services.outcomes.written_ms
        addresses = [awaited.address for slot in slots for awaited in slot.awaited.values()]
        if not all(address in written_ms for address in addresses):  # some have a reason that is the client's own
            return
        last = max([began, *(written_ms[address] / 1000 for address in addresses)])
        if self.world.now > last + SEEN_WITHIN_S:
            raise BrokenPropertyError("seen late", f"there since {last:.3f}, seen at {self.world.now:.3f}")

    def _see_rewards(self, slots: Sequence[Any]) -> None:
        for slot in slots:
            for awaited in slot.awaited.values():
                seen = self.rewards_seen.setdefault(awaited.address, [])
                if awaited.outcome is not None and awaited.outcome.is_final and awaited.outcome not in seen:
                    seen.append(awaited.outcome)

    def _remember_failures(self, slots: Sequence[Any]) -> None:
        for awaited in failures_of(slots):
            told = (awaited.outcome, *awaited.outcome.members)
            if any(one.origin for one in told):  # else it is the client's own reason, which Redis does not know
                self.failed_before[awaited.address] = awaited.outcome.attempt

    def _check_are_tried_anew(self, slots: Sequence[Any]) -> None:
        """What failed in an earlier step was tried anew, unless Redis was emptied and knows nothing of that."""
        for awaited in failures_of(slots):
            before = self.failed_before.get(awaited.address, 0)
            if awaited.outcome.attempt <= before and not self.schedule.may_lose_results:
                raise BrokenPropertyError("old failure", f"{awaited.address} failed before: {awaited.outcome}")

    def _see(self, position: Position, outcome: Outcome) -> None:
        """An answer is seen: from now on it is no other. (A failure may be, to a process that tries again.)"""
        seen = self.answers.get(position)
        if seen is not None and seen.reward is not None and seen.reward != outcome.reward:
            if is_of_ended_process(outcome):  # its ticket was pickled before
                return
            if self._is_forgotten(outcome):
                return
            raise BrokenPropertyError("changed", f"rank {self.number} {position}: {seen} became {outcome}")
        self.answers[position] = outcome
        self.world.say(self.process, "sees", position, outcome.reward, outcome.failure)

    def _is_forgotten(self, outcome: Outcome) -> bool:
        """Whether nobody knows of the reward any more: Redis was emptied, and the process that saw it was killed.

        Its successor asks anew, and may be told of a failure that the first process has tried anew.
        """
        return outcome.reward is None and self.num_started > 1 and self.schedule.may_lose_results


def failures_of(slots: Sequence[Any]) -> Iterator[Any]:
    """What is awaited of these slots, and was answered by a failure."""
    for slot in slots:
        for awaited in slot.awaited.values():
            outcome = awaited.outcome
            if awaited.address and outcome is not None and not outcome.is_final:
                yield awaited


def make_ranks(
    world: World,
    services: Services,
    rewards: tuple[RewardSpec, ...],
    invalid: frozenset[int],
    on_done: Callable[[], None],
    schedule: Schedule,
) -> list[Rank]:
    """All ranks of a trainer."""
    plans = schedule.ranks
    barrier = Barrier(world, len(plans))
    ranks = []
    for number, plan in enumerate(plans):
        settings = Settings(number, len(plans), rewards, invalid, plan.max_store_bytes, schedule.is_calm)
        ranks.append(Rank(world, services, plan, settings, barrier, on_done, schedule))
    return ranks
