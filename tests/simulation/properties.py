"""The oracle: what each sample must end with, and what may be left of it. It computes that by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks import keys
from tasks.groups import draw_pairs
from tasks.messages import Outcome
from tasks.rewards import RewardSpec
from tests.simulation.models import MESSAGES, score_of, win_of
from tests.simulation.ranks import is_of_ended_process
from tests.simulation.schedules import SamplePlan
from tests.simulation.trainer import RUN, key_of_content
from tests.simulation.world import BrokenPropertyError

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

SETTLE_S = 1.3
"""Within this long after the last answer everything that is not needed any more is gone."""

LOADED_WITHIN_S = 0.3
"""A message that a worker takes and loads its model for within this long is not taken for lost."""

KILLED = "its worker process ended without an answer each of the 3 times it was scored alone"
HUNG = "no return within"
UNLOADABLE = "no weights"
INVALID = "cannot be encoded"


@dataclass(frozen=True)
class Submitted:
    """One sample in its position."""

    rank: int
    step: int
    index: int
    plan: SamplePlan


def check_answers(simulation: Simulation) -> None:
    """Every sample has its own right reward, or the reason that it should have."""
    oracle = Oracle(simulation)
    for spec in simulation.specs:
        if spec.is_groupwise:
            for members in oracle.groups():
                oracle.check_group(spec, members)
        else:
            for sample in oracle.samples:
                oracle.check_sample(spec, sample)


def check_first_stays(simulation: Simulation) -> None:
    """The first reward that was written at an address stays: all ranks have seen it in all steps, and it is there.

    Not where Redis was emptied meanwhile: it knows nothing of the first then.
    """
    if simulation.schedule.may_lose_payloads:
        return
    for rank in simulation.ranks:
        for address, outcomes in rank.rewards_seen.items():
            there = simulation.services.outcomes.look_up([address])[0]
            for outcome in outcomes:
                if outcome != there:
                    raise BrokenPropertyError("replaced", f"{address}: rank {rank.number} saw {outcome}, now {there}")


class Oracle:
    """Knows what each sample of a schedule should end with."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation, self.models = simulation, simulation.models
        self.behaviours = dict(simulation.schedule.behaviours)
        self.samples = list(self._all_samples())

    def _all_samples(self) -> Iterator[Submitted]:
        for number, rank in enumerate(self.simulation.schedule.ranks):
            for step, plan in enumerate(rank.steps):
                flat = [sample for some in plan.submits for sample in some]
                for index, sample in enumerate(flat):
                    yield Submitted(number, step, index, sample)

    def groups(self) -> list[list[Submitted]]:
        """The members of each group, in slot order."""
        found: dict[tuple[int, int], list[Submitted]] = {}
        for sample in sorted(self.samples, key=lambda s: (s.rank, s.index)):
            found.setdefault((sample.step, sample.plan.group), []).append(sample)
        return list(found.values())

    # --- what it is compared with ------------------------------------------------------------------------------------

    def answer(self, spec: RewardSpec, sample: Submitted) -> Outcome | None:
        """What a rank has seen; None of what it gave up."""
        rank, position = self.simulation.ranks[sample.rank], (sample.step, sample.index, spec.name)
        outcome = rank.answers.get(position)
        if outcome is None and position not in rank.given_up:
            self.wrong(spec, sample, "has no answer")
        return outcome

    def may_be_lost(self, outcome: Outcome, sample: Submitted) -> bool:
        """Whether a sample may have a reason that is its trainer's: that was killed."""
        return self.simulation.ranks[sample.rank].num_started > 1 and is_of_ended_process(outcome)

    @staticmethod
    def wrong(spec: RewardSpec, sample: Submitted, words: str) -> None:
        raise BrokenPropertyError(
            "answer",
            f"{spec.name} of rank {sample.rank} step {sample.step} sample {sample.index} {sample.plan}: {words}",
        )

    def is_like(self, outcome: Outcome, words: str, kind: str) -> bool:
        """Whether an outcome is a failure of this kind that says so."""
        failure = outcome.failure
        return failure is not None and failure.kind == kind and words in failure.message

    def expected_failure(self, spec: RewardSpec, sample: Submitted) -> tuple[str, str] | None:
        """The words and the kind of the failure that a sample must have for a reward that is scored by itself."""
        behaviour = self.behaviours.get(sample.plan.content)
        if behaviour == "invalid":
            return INVALID, "invalid"
        if spec.part.fingerprint in self.models.unloadable:
            return UNLOADABLE, "failed"
        return {
            "raises": (MESSAGES["raises"], "failed"),
            "kills": (KILLED, "failed"),
            "hangs": (HUNG, "timeout"),
        }.get(behaviour or "")

    def address(self, spec: RewardSpec, sample: Submitted) -> str:
        """Where the outcome of a sample for a reward that is scored by itself is."""
        return f"{RUN}:{spec.part.fingerprint}:{self.key(sample)}"

    def key(self, sample: Submitted) -> str:
        if self.behaviours.get(sample.plan.content) == "invalid":
            return f"bad{sample.rank}s{sample.step}i{sample.index}"
        return key_of_content(sample.plan.content)

    # --- samples by themselves ---------------------------------------------------------------------------------------

    def check_sample(self, spec: RewardSpec, sample: Submitted) -> None:
        outcome = self.answer(spec, sample)
        if outcome is None or self.may_be_lost(outcome, sample):
            return
        if not self.is_right(outcome, spec, sample):
            self.wrong(spec, sample, f"{outcome}")

    def is_right(self, outcome: Outcome, spec: RewardSpec, sample: Submitted) -> bool:
        failure, address = self.expected_failure(spec, sample), self.address(spec, sample)
        if address in self.models.hung_with and self.is_like(outcome, HUNG, "timeout"):
            return True
        if failure is not None:
            return self.is_like(outcome, *failure)
        return outcome.reward == score_of(address)

    # --- groups ------------------------------------------------------------------------------------------------------

    def check_group(self, spec: RewardSpec, members: Sequence[Submitted]) -> None:
        answers = [self.answer(spec, member) for member in members]
        pairs = list(zip(members, answers, strict=True))
        if any(outcome is None or self.may_be_lost(outcome, member) for member, outcome in pairs):
            return
        known = [(member, outcome) for member, outcome in pairs if outcome is not None]
        {"rank": self._check_ranks, "wins": self._check_wins, "model": self._check_model}[spec.how](spec, known)

    def _check_ranks(self, spec: RewardSpec, known: Sequence[tuple[Submitted, Outcome]]) -> None:
        scores = []
        for member, outcome in known:
            is_wrong = outcome.reward is not None and outcome.info["score"] != score_of(self.address(spec, member))
            if is_wrong or (outcome.reward is None and not self.is_right(outcome, spec, member)):
                self.wrong(spec, member, f"{outcome}")
            if outcome.reward is not None:
                if self.expected_failure(spec, member) is not None:
                    self.wrong(spec, member, f"{outcome}")
                scores.append(outcome.info["score"])
        for member, outcome in known:
            if outcome.reward is None:
                continue
            score = outcome.info["score"]
            below, equal = sum(other < score for other in scores), sum(other == score for other in scores)
            if abs(outcome.reward - (below + (equal - 1) / 2) / len(scores)) > 1e-9:
                self.wrong(spec, member, f"{outcome} among {scores}")

    def _check_model(self, spec: RewardSpec, known: Sequence[tuple[Submitted, Outcome]]) -> None:
        group = f"{RUN}:{spec.fingerprint}:{self._digest([m for m, _ in known])}"
        failures = [self.expected_failure(spec, member) for member, _ in known]
        of_call = {failure for failure in failures if failure is not None and failure[1] != "invalid"}
        for (member, outcome), failure in zip(known, failures, strict=True):
            if failure is not None and failure[1] == "invalid":
                is_right = self.is_like(outcome, *failure)
            elif of_call:
                is_right = any(self.is_like(outcome, *one) for one in of_call)
            else:
                is_right = outcome.reward == score_of(f"{group} {self.address(spec, member)}")
            is_hung = group in self.models.hung_with and self.is_like(outcome, HUNG, "timeout")
            if not is_right and not is_hung:
                self.wrong(spec, member, f"{outcome} of group {group}")

    def _check_wins(self, spec: RewardSpec, known: Sequence[tuple[Submitted, Outcome]]) -> None:
        members = [member for member, _ in known]
        fit = [m for m in members if self.behaviours.get(m.plan.content) != "invalid"]
        points: dict[Submitted, list[float]] = {member: [] for member in fit}
        for i, j in draw_pairs(self._digest(members), len(fit), spec.options["opponents"]):
            both = f"{self.key(fit[i])} {self.key(fit[j])}"
            won = win_of(f"{RUN}:{spec.fingerprint}:{hashlib.sha256(both.encode()).hexdigest()[:32]}")
            points[fit[i]].append(won)
            points[fit[j]].append(1.0 - won)
        for member, outcome in known:
            if member not in points:
                is_right = self.is_like(outcome, INVALID, "invalid")
            elif spec.fingerprint in self.models.unloadable or not points[member]:
                is_right = outcome.failure is not None and outcome.failure.kind == "abstained"
            else:
                share = sum(points[member]) / len(points[member])
                is_right = outcome.reward is not None and abs(outcome.reward - share) < 1e-9
            if not is_right:
                self.wrong(spec, member, f"{outcome}, points {points.get(member)}")

    def _digest(self, members: Sequence[Submitted]) -> str:
        return hashlib.sha1("".join(self.key(member) for member in members).encode()).hexdigest()


def check_left_over(simulation: Simulation) -> None:
    """No payload, no request, no claim and no start is left."""
    names = simulation.keyspace.names()
    claims = [name for name in names if name.startswith(keys.claim(""))]
    if claims:
        raise BrokenPropertyError("left over", f"claims: {claims}")
    starts = [name for name in names if name.startswith(keys.starts(""))]
    if starts and not any(rank.given_up for rank in simulation.ranks):
        raise BrokenPropertyError("left over", f"starts: {starts}")
    mine = [f"r{rank.number}.{rank.num_started}." for rank in simulation.ranks]
    payloads = [name for name in simulation.services.store.names() if name.startswith(tuple(mine))]
    if payloads:
        raise BrokenPropertyError("left over", f"payloads and requests: {payloads}")


def check_reasons(simulation: Simulation) -> None:
    """Where nothing is awaited, there is no reason why it would be late."""
    for rank in simulation.ranks:
        words = rank.client.state.why_late.words()
        if words is not None:
            raise BrokenPropertyError("old reason", f"rank {rank.number} awaits nothing, and says: {words}")


def check_sends(simulation: Simulation) -> None:
    """Nothing was taken for lost if nothing was.

    What waits for a permit is, once its permit was given to another; so is what waits for a load that takes long, where
    another worker has the model.
    """
    schedule = simulation.schedule
    most_starts = simulation.services.outcomes.most_starts
    if schedule.is_calm and most_starts > 1:
        raise BrokenPropertyError("suspected", f"a sample was started {most_starts} times, and no process has ended")
    is_slow = any(worker.load_s > LOADED_WITHIN_S for worker in schedule.workers)
    if not schedule.is_calm or is_slow or any(reward.budget is not None for reward in schedule.rewards):
        return
    for rank in simulation.ranks:
        if rank.client.num_sent_again:
            raise BrokenPropertyError("sent again", f"rank {rank.number} did so {rank.client.num_sent_again} times")
