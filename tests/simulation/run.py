"""Runs schedules: `python -m tests.simulation.run --seeds 1000..2000 --jobs 2`, or `--trace 1234` to read one.

`--shrink 1234` takes everything out of a schedule that its failure does not need, and prints what is left.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tests.simulation.schedules import RankPlan, Schedule, StepPlan, draw
from tests.simulation.simulation import Simulation
from tests.simulation.world import MAX_EVENTS

SEEDS_A_TURN = 50
"""One process of several takes so many seeds at a time."""

MOST_SHRINKING_RUNS = 300

SAY_EVERY_S = 60.0
"""How often a long run says how far it is."""


@dataclass(frozen=True)
class Failure:
    """A schedule that went wrong."""

    seed: int
    property: str
    words: str

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.property}: {self.words}"


def run(schedule: Schedule, max_events: int = MAX_EVENTS) -> Failure | None:
    """Carry out a schedule; returns what went wrong."""
    try:
        Simulation(schedule, max_events=max_events).run()
    except Exception as error:
        name = getattr(error, "name", None) or type(error).__name__
        return Failure(schedule.seed, str(name), str(error))
    return None


def run_seeds(seeds: Sequence[int]) -> list[Failure]:
    """Carry out the schedules of these seeds; returns what went wrong."""
    failures = []
    for seed in seeds:
        failure = run(draw(seed))
        if failure is not None:
            failures.append(failure)
    gc.collect()
    return failures


# --- to read one -----------------------------------------------------------------------------------------------------


def trace(schedule: Schedule) -> Iterator[str]:
    """What happens in a schedule, a line for each call, fault and answer; at the end what went wrong."""
    simulation = Simulation(schedule, traces=True)
    happened = simulation.world.trace
    assert happened is not None
    words = "all properties hold"
    try:
        simulation.run()
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
    for at, process, what, *details in happened:
        yield f"{at:10.4f} {process:8s} {what:14s} {' '.join(_shown(detail) for detail in details)}"
    yield words


def _shown(detail: object) -> str:
    text = str(_sorted(detail))
    return text if len(text) <= 200 else f"{text[:200]}..."


def _sorted(detail: object) -> object:
    """In an order that says nothing of the hashes of texts. What a call is given as a set has no order to it either."""
    if isinstance(detail, set | frozenset):
        return sorted(detail)
    if isinstance(detail, dict):
        return dict(sorted(detail.items()))
    if type(detail) is tuple:
        return tuple(_sorted(one) for one in detail)
    return detail


def describe(schedule: Schedule) -> Iterator[str]:
    """A schedule, a line for each thing in it."""
    yield f"{schedule.num_servers} servers; {schedule.weather}"
    yield from (f"reward {reward}" for reward in schedule.rewards)
    yield from (f"worker {worker}" for worker in schedule.workers)
    for number, rank in enumerate(schedule.ranks):
        yield f"rank {number} starts after {rank.starts_at:.3f} s, store of {rank.max_store_bytes} bytes"
        yield from (f"  step {step}: {plan}" for step, plan in enumerate(rank.steps))
    yield from (f"content {content} {behaviour}" for content, behaviour in schedule.behaviours)
    yield from (f"fault {fault}" for fault in schedule.faults)


# --- to make one smaller ---------------------------------------------------------------------------------------------


def shrink(schedule: Schedule, failure: Failure) -> Schedule:
    """Take out of a schedule, one by one, what it does not need to break the same property."""
    runs = itertools.count()
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for smaller in _smaller(schedule):
            if next(runs) > MOST_SHRINKING_RUNS:
                return schedule
            found = run(smaller)
            if found is not None and found.property == failure.property:
                schedule, is_smaller = smaller, True
                break
    return schedule


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    for faults in _without_one(schedule.faults):
        yield replace(schedule, faults=faults)
    yield from _calmer(schedule)
    for ranks in _fewer_samples(schedule.ranks):
        yield replace(schedule, ranks=ranks)
    if len(schedule.rewards) > 1:
        for rewards in _without_one(schedule.rewards):
            yield replace(schedule, rewards=rewards)
    for behaviours in _without_one(schedule.behaviours):
        yield replace(schedule, behaviours=behaviours)
    yield from _fewer_workers(schedule)


def _with(things: tuple, number: int, thing: object) -> tuple:  # type: ignore[type-arg]
    """`things` with another one at this index."""
    return (*things[:number], thing, *things[number + 1 :])


def _without_one(things: tuple) -> Iterator[tuple]:  # type: ignore[type-arg]
    for number in range(len(things)):
        yield things[:number] + things[number + 1 :]


def _calmer(schedule: Schedule) -> Iterator[Schedule]:
    """With a better network."""
    weather = schedule.weather
    for name in ("cut_before", "cut_after", "slow", "message_lost", "message_repeated"):
        if getattr(weather, name):
            yield replace(schedule, weather=replace(weather, **{name: 0.0}))


def _fewer_workers(schedule: Schedule) -> Iterator[Schedule]:
    needed = {reward.queue for reward in schedule.rewards}
    for workers in _without_one(schedule.workers):
        served = {queue for worker in workers for queue in worker.queues}
        is_hit = any(fault.kind.endswith(" worker") and fault.target >= len(workers) for fault in schedule.faults)
        if needed <= served and not is_hit:
            yield replace(schedule, workers=workers)


def _fewer_samples(ranks: tuple[RankPlan, ...]) -> Iterator[tuple[RankPlan, ...]]:
    for number, rank in enumerate(ranks):
        for step_number, step in enumerate(rank.steps):
            for smaller in _smaller_steps(step):
                steps = _with(rank.steps, step_number, smaller)
                yield _with(ranks, number, replace(rank, steps=steps))


def _smaller_steps(step: StepPlan) -> Iterator[StepPlan]:
    """A step without one whole submit; or without one sample, if no group has a size that is then not reached."""
    for number, samples in enumerate(step.submits):
        if any(sample.group_size is not None for sample in samples):
            continue
        yield replace(step, submits=step.submits[:number] + step.submits[number + 1 :])
        for fewer in _without_one(samples):
            yield replace(step, submits=_with(step.submits, number, fewer))


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments say; returns 1 if a property broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.run", description=__doc__)
    parser.add_argument("--seeds", default="0..1000", help="from..to, the last one not included")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--trace", type=int, help="print what happens in this one schedule")
    parser.add_argument("--shrink", type=int, help="take out of this one schedule what its failure does not need")
    given = parser.parse_args(arguments)
    if given.trace is not None:
        return _print_trace(draw(given.trace))
    if given.shrink is not None:
        return _print_shrunk(given.shrink)
    first, _, last = given.seeds.partition("..")
    return _run_all(range(int(first), int(last or int(first) + 1)), given.jobs)


def _print_trace(schedule: Schedule) -> int:
    lines = list(trace(schedule))
    print(*describe(schedule), *lines, sep="\n")
    return int(lines[-1] != "all properties hold")


def _print_shrunk(seed: int) -> int:
    failure = run(draw(seed))
    if failure is None:
        print(f"seed {seed}: all properties hold")
        return 0
    print(failure)
    _print_trace(shrink(draw(seed), failure))
    return 1


def _run_all(seeds: range, num_jobs: int) -> int:
    started = time.monotonic()
    turns = [range(at, min(at + SEEDS_A_TURN, seeds.stop)) for at in range(seeds.start, seeds.stop, SEEDS_A_TURN)]
    failures: list[Failure] = []
    said_at = started
    with multiprocessing.Pool(num_jobs) as pool:
        for turn, found in zip(turns, pool.imap(run_seeds, turns), strict=True):
            for failure in found:
                print(failure, flush=True)
            failures += found
            if time.monotonic() >= said_at + SAY_EVERY_S:
                said_at = time.monotonic()
                print(f"{turn.stop - seeds.start:,} of {len(seeds):,} schedules", file=sys.stderr, flush=True)
    seconds = time.monotonic() - started
    counts = Counter(failure.property for failure in failures)
    print(f"{len(seeds)} schedules in {seconds:.0f} s ({len(seeds) / seconds:.0f} a second), {len(failures)} failures")
    print(*(f"{name}: {num}" for name, num in counts.most_common()), sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
