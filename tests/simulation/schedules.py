"""What one seed draws: trainers, samples, rewards, workers, and the faults that hit them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from tests.simulation.models import Behaviour
from tests.simulation.network import REFUSALS, Weather
from tests.simulation.workers import WorkerPlan

START_S = 1000.0
"""The virtual clock of a world begins here."""

Kind = Literal["each", "PickScore", "rank", "model", "wins"]
"""How a reward is computed: sample by sample, as that which is ranked, ranked, of whole groups, by comparisons."""

MUCH_ROOM, LITTLE_ROOM = 2**30, 300
"""Bytes that the payload store may hold: media of all, or of two samples."""

SERVERS = ("results", "broker", "payloads")


@dataclass(frozen=True)
class RewardPlan:
    """One reward of the trainer's."""

    kind: Kind
    queue: str
    batch_size: int
    budget: int | None = None
    is_held: bool = False
    """`async_reward: false`."""
    is_unloadable: bool = False
    opponents: int | Literal["all"] = "all"


@dataclass(frozen=True)
class SamplePlan:
    """One sample: equal contents are equal samples."""

    content: int
    group: int
    group_size: int | None = None
    """One more than its group gets, where the trainer forgets a member."""


@dataclass(frozen=True)
class StepPlan:
    """One step of one rank."""

    submits: tuple[tuple[SamplePlan, ...], ...]
    """A ticket for each."""
    pause_s: float = 0.0
    """Between two submits."""
    timeout_s: float = 30.0
    """Of the first `collect()`; later ones wait for as long as it takes."""
    is_given_up: bool = False
    """What is not there at that deadline is cancelled."""
    is_pickled: bool = False
    """Its tickets are pickled after each submit, and found by a successor."""


def incomplete_groups(submits: Sequence[Sequence[SamplePlan]]) -> list[int]:
    """Groups of a step of a trainer with one rank that lack a member."""
    sizes: dict[int, int | None] = {}
    counts: Counter[int] = Counter()
    for sample in itertools.chain.from_iterable(submits):
        sizes[sample.group] = sample.group_size
        counts[sample.group] += 1
    return [group for group, size in sizes.items() if size is not None and counts[group] < size]


@dataclass(frozen=True)
class RankPlan:
    """One rank of the trainer."""

    steps: tuple[StepPlan, ...]
    starts_at: float = 0.0
    max_store_bytes: int = MUCH_ROOM


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, at a time, for a while."""

    at: float
    kind: str
    target: int
    """Which worker, rank or server."""
    seconds: float = 0.0
    detail: int = 0

    def __str__(self) -> str:
        return f"{self.at:.3f} {self.kind} of {self.target} for {self.seconds:.3f} s ({self.detail})"


@dataclass(frozen=True)
class Schedule:
    """What happens in one world."""

    seed: int
    rewards: tuple[RewardPlan, ...]
    ranks: tuple[RankPlan, ...]
    workers: tuple[WorkerPlan, ...]
    faults: tuple[Fault, ...] = ()
    weather: Weather = field(default_factory=Weather)
    behaviours: tuple[tuple[int, Behaviour | Literal["invalid"]], ...] = ()
    """By content; of pointwise rewards and of what is ranked."""
    num_servers: int = 3

    @property
    def faults_end(self) -> float:
        """From then on nothing goes wrong any more."""
        times = [fault.at + fault.seconds for fault in self.faults]
        times.append(self.weather.until)
        return max(times)

    @property
    def may_lose_payloads(self) -> bool:
        """Whether a fault takes payloads out of the store."""
        return any(fault.kind in ("server emptied", "server restarted", "payload lost") for fault in self.faults)

    @property
    def may_lose_results(self) -> bool:
        """Whether a fault takes outcomes out of Redis."""
        return any(fault.kind in ("server emptied", "server restarted") for fault in self.faults)

    @property
    def is_odd(self) -> bool:
        """Whether samples end or hold up their workers, or workers can do nothing for a while."""
        if any(behaviour in ("kills", "hangs") for _, behaviour in self.behaviours):
            return True
        return any(w.load_hangs or w.other_wire or w.other_store or w.outdated for w in self.workers)

    @property
    def is_faultless(self) -> bool:
        """Whether nothing goes wrong at all."""
        return not (self.faults or self.weather.until or self.is_odd)

    @property
    def is_calm(self) -> bool:
        """Whether nothing is to be sent twice: nothing goes wrong, no judge has a budget, nothing is cancelled.

        What is cancelled takes its media with it, and the others of its chunk are sent again. So is what waits for a
        slow load, once another worker has the model.
        """
        is_cancelled = any(step.is_given_up for rank in self.ranks for step in rank.steps)
        if is_cancelled or any(reward.budget is not None for reward in self.rewards):
            return False
        loads_slowly = len(self.workers) > 1 and any(worker.load_s > LOADED_WITHIN_S for worker in self.workers)
        return self.is_faultless and not loads_slowly

    @property
    def num_samples(self) -> int:
        """Over all ranks and steps."""
        return sum(len(some) for rank in self.ranks for step in rank.steps for some in step.submits)


LOADED_WITHIN_S = 0.1
"""A worker that loads longer may have messages in hand for which others look meanwhile."""

WORKER_FAULTS = ("kill worker", "stall worker", "stop worker", "cut off worker")
TRAINER_FAULTS = ("stall trainer", "cut off trainer", "kill trainer")
SERVER_FAULTS = ("server away", "server emptied", "server restarted", "server refuses", "server hangs", "payload lost")


def draw(seed: int) -> Schedule:
    """The schedule of a seed."""
    rng = random.Random(seed)
    num_ranks = rng.choice((1, 1, 1, 2, 3))
    rewards = _draw_rewards(rng)
    ranks = _draw_ranks(rng, num_ranks, rewards)
    workers = _draw_workers(rng, rewards)
    is_calm = rng.random() < 0.1
    faults = () if is_calm else _draw_faults(rng, num_ranks, len(workers))
    if any(fault.kind == "kill trainer" for fault in faults):  # what it stored takes room for longer than we look
        ranks = tuple(replace(rank, max_store_bytes=MUCH_ROOM) for rank in ranks)
    return Schedule(
        seed=seed,
        rewards=rewards,
        ranks=ranks,
        workers=workers,
        faults=faults,
        weather=Weather() if is_calm else _draw_weather(rng),
        behaviours=_draw_behaviours(rng, ranks),
        num_servers=rng.choice((1, 2, 3)),
    )


def _draw_rewards(rng: random.Random) -> tuple[RewardPlan, ...]:
    kinds: list[Kind] = rng.choice(
        (
            ["each"],
            ["each"],
            ["each", "each"],
            ["rank"],
            ["PickScore", "rank"],
            ["model"],
            ["each", "model"],
            ["wins"],
            ["each", "rank", "model"],
            ["PickScore", "wins"],
        )
    )
    return tuple(_draw_reward(rng, kind) for kind in kinds)


def _draw_reward(rng: random.Random, kind: Kind) -> RewardPlan:
    is_judge = kind == "wins" or rng.random() < 0.25
    return RewardPlan(
        kind=kind,
        queue="vlm" if is_judge else "gpu",
        batch_size=rng.choice((1, 2, 3, 4)),
        budget=rng.choice((1, 2, None)) if is_judge else None,
        is_held=rng.random() < 0.1,
        is_unloadable=rng.random() < 0.02,
        opponents=rng.choice(("all", 1, 2)),
    )


def _draw_ranks(rng: random.Random, num_ranks: int, rewards: tuple[RewardPlan, ...]) -> tuple[RankPlan, ...]:
    num_steps = rng.choice((1, 1, 2))
    steps: list[list[StepPlan]] = [[] for _ in range(num_ranks)]
    for _ in range(num_steps):
        for rank, plan in enumerate(_draw_step(rng, num_ranks)):
            steps[rank].append(plan)
    max_bytes = rng.choice((MUCH_ROOM, MUCH_ROOM, LITTLE_ROOM))
    return tuple(RankPlan(tuple(plans), rng.choice((0.0, rng.random())), max_bytes) for plans in steps)


def _draw_step(rng: random.Random, num_ranks: int) -> list[StepPlan]:
    """One step of every rank; groups have members of any of them."""
    groups = []
    for group in range(rng.choice((1, 1, 2, 3))):
        size = rng.choice((1, 2, 3, 4, 5))
        contents = [rng.randint(0, 12) for _ in range(size)]
        known_size = rng.choice((None, size, size, size + 1)) if num_ranks == 1 else size
        groups += [SamplePlan(content, group, known_size) for content in contents]
    if rng.random() < 0.3:
        rng.shuffle(groups)
    of_ranks: list[list[SamplePlan]] = [[] for _ in range(num_ranks)]
    for sample in groups:
        of_ranks[rng.randrange(num_ranks)].append(sample)
    may_give_up = num_ranks == 1
    return [_draw_step_of_rank(rng, samples, may_give_up) for samples in of_ranks]


def _draw_step_of_rank(rng: random.Random, samples: list[SamplePlan], may_give_up: bool) -> StepPlan:
    cut = rng.randint(0, len(samples))
    submits = tuple(tuple(some) for some in (samples[:cut], samples[cut:]) if some)
    is_hasty = rng.random() < 0.3
    return StepPlan(
        submits=submits,
        pause_s=rng.choice((0.0, 0.05, 0.5)),
        timeout_s=rng.choice((0.1, 0.5, 2.0)) if is_hasty else 300.0,
        is_given_up=is_hasty and may_give_up and rng.random() < 0.5,
        is_pickled=rng.random() < 0.6,
    )


def _draw_workers(rng: random.Random, rewards: tuple[RewardPlan, ...]) -> tuple[WorkerPlan, ...]:
    queues = sorted({reward.queue for reward in rewards})
    sets = [tuple(queues)] if rng.random() < 0.5 else [(queue,) for queue in queues]
    plans = []
    for number in range(max(len(sets), rng.choice((1, 2, 2, 3)))):
        served = sets[number % len(sets)]
        plans.append(_draw_worker(rng, f"w{number}", served))
    return tuple(plans)


def _draw_worker(rng: random.Random, name: str, queues: tuple[str, ...]) -> WorkerPlan:
    oddity = rng.random()
    return WorkerPlan(
        name=name,
        queues=queues,
        num_slots=rng.choice((1, 2, 2, 4)),
        starts_at=rng.choice((0.0, 0.0, 0.5)),
        restart_s=rng.choice((0.2, 1.0)),
        load_s=rng.choice((0.01, 0.1, 0.6)),
        load_hangs=oddity < 0.03,
        call_s=rng.choice((0.005, 0.03, 0.2)),
        stop_grace_s=rng.choice((0.2, 2.0)),
        other_wire=0.03 <= oddity < 0.06,
        other_store=0.06 <= oddity < 0.09,
        outdated=0.09 <= oddity < 0.13,
        replaced_at=rng.choice((1.0, 5.0)),
    )


def _draw_faults(rng: random.Random, num_ranks: int, num_workers: int) -> tuple[Fault, ...]:
    faults = []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4))):
        at = START_S + rng.choice((rng.uniform(0.0, 0.5), rng.uniform(0.0, 2.5)))
        seconds = rng.choice((0.1, 0.7, rng.uniform(0.0, 2.5)))
        draw = rng.random()
        if draw < 0.5:
            kind, target = rng.choice(WORKER_FAULTS), rng.randrange(num_workers)
        elif draw < 0.7:
            kind, target = rng.choice(TRAINER_FAULTS), rng.randrange(num_ranks)
        else:
            kind, target = rng.choice(SERVER_FAULTS), rng.randrange(len(SERVERS))
        faults.append(Fault(at, kind, target, seconds, rng.randrange(12)))
    if num_ranks > 1 and rng.random() < 0.25:
        faults += _draw_late_rank(rng, num_ranks)
    return tuple(sorted(faults, key=lambda fault: fault.at))


def _draw_late_rank(rng: random.Random, num_ranks: int) -> list[Fault]:
    """A rank stands still while the others get their answers, and these are lost before it has read them."""
    at = START_S + rng.uniform(0.2, 1.5)
    stall = Fault(at, "stall trainer", rng.randrange(num_ranks), rng.uniform(1.0, 2.0))
    return [stall, Fault(at + rng.uniform(0.3, 1.3), "server emptied", SERVERS.index("results"))]


def _draw_weather(rng: random.Random) -> Weather:
    if rng.random() < 0.4:
        return Weather()
    return Weather(
        until=START_S + rng.choice((0.5, 1.5, 3.0)),
        cut_before=rng.choice((0.0, 0.02, 0.1)),
        cut_after=rng.choice((0.0, 0.02, 0.1)),
        slow=rng.choice((0.0, 0.1)),
        message_lost=rng.choice((0.0, 0.1, 0.5)),
        message_repeated=rng.choice((0.0, 0.1, 0.5)),
    )


def _draw_behaviours(
    rng: random.Random, ranks: tuple[RankPlan, ...]
) -> tuple[tuple[int, Behaviour | Literal["invalid"]], ...]:
    contents = sorted({s.content for rank in ranks for step in rank.steps for some in step.submits for s in some})
    behaviours: dict[int, Behaviour | Literal["invalid"]] = {}
    for content in contents:
        draw = rng.random()
        if draw < 0.06:
            behaviours[content] = "raises"
        elif draw < 0.09:
            behaviours[content] = "invalid"
        elif draw < 0.14:
            behaviours[content] = "fails once"
    if rng.random() < 0.06:
        behaviours[rng.choice(contents)] = rng.choice(("kills", "hangs"))
    return tuple(sorted(behaviours.items()))


def refusal_of(fault: Fault) -> Exception:
    """What a server that takes no writes raises."""
    return REFUSALS[fault.detail % len(REFUSALS)]
