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
from tests.simulation.ranks import INCOMPLETE, is_of_ended_process
from tests.simulation.schedules import SamplePlan, incomplete_groups
from tests.simulation.trainer import RUN, key_of_content
from tests.simulation.world import BrokenPropertyError

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

SETTLE_S = 1.3
"""Within this long after the last answer everything that is not needed any more is gone."""

KILLED = "its worker process ended without an answer each of the 3 times it was scored alone"
HUNG = "no return within"
UNLOADABLE = "no weights"
INVALID = "cannot be encoded"

ONCE = (MESSAGES["raises"], "failed")
"""The reason of a sample that fails at its first attempt."""

MAY_COME = frozenset({ONCE, (HUNG, "timeout")})
"""Reasons beside which a reward is right as well."""


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
    if simulation.schedule.may_lose_results:
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
        self._failed_in = self._first_failures()

    def _first_failures(self) -> dict[str, int]:
        """By address, the first step in which it was seen that a call had raised."""
        first: dict[str, int] = {}
        for sample in self.samples:
            for spec in self.simulation.specs:
                outcome = self.simulation.ranks[sample.rank].answers.get((sample.step, sample.index, spec.name))
                if outcome is not None and self.is_like(outcome, MESSAGES["raises"], "failed"):
                    address = self.address(spec, sample)
                    first[address] = min(sample.step, first.get(address, sample.step))
        return first

    def may_have_failed_once(self, spec: RewardSpec, sample: Submitted) -> bool:
        """Whether a sample whose first attempt fails may have that as its answer: not if a step before had it."""
        if self.behaviours.get(sample.plan.content) != "fails once":
            return False
        is_first = self._failed_in.get(self.address(spec, sample), sample.step) >= sample.step
        was_started_again = self.simulation.ranks[sample.rank].num_started > 1
        return is_first or was_started_again or self.simulation.schedule.may_lose_results

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
        if self.may_have_failed_once(spec, sample) and self.is_like(outcome, MESSAGES["raises"], "failed"):
            return True
        return outcome.reward == score_of(address)

    # --- groups ------------------------------------------------------------------------------------------------------

    def check_group(self, spec: RewardSpec, members: Sequence[Submitted]) -> None:
        answers = [self.answer(spec, member) for member in members]
        pairs = list(zip(members, answers, strict=True))
        if any(outcome is None or self.may_be_lost(outcome, member) for member, outcome in pairs):
            return None
        known = [(member, outcome) for member, outcome in pairs if outcome is not None]
        if self._is_incomplete(members[0]):
            return self._check_incomplete(spec, known)
        return {"rank": self._check_ranks, "wins": self._check_wins, "model": self._check_model}[spec.how](spec, known)

    def _is_incomplete(self, member: Submitted) -> bool:
        ranks = self.simulation.schedule.ranks
        return len(ranks) == 1 and member.plan.group in incomplete_groups(ranks[0].steps[member.step].submits)

    def _check_incomplete(self, spec: RewardSpec, known: Sequence[tuple[Submitted, Outcome]]) -> None:
        for member, outcome in known:
            is_unfit = self.behaviours.get(member.plan.content) == "invalid"
            if not self.is_like(outcome, INVALID if is_unfit else INCOMPLETE, "invalid"):
                self.wrong(spec, member, f"{outcome} of a group that lacks a member")

    def _check_ranks(self, spec: RewardSpec, known: Sequence[tuple[Submitted, Outcome]]) -> None:
        scores = []
        for member, outcome in known:
            if outcome.reward is None:
                is_right = self.is_right(outcome, spec, member)
            else:
                scores.append(outcome.info["score"])
                is_fit = self.expected_failure(spec, member) is None
                is_right = is_fit and scores[-1] == score_of(self.address(spec, member))
            if not is_right:
                self.wrong(spec, member, f"{outcome}")
        for member, outcome in known:
            if outcome.reward is not None and not is_near(outcome.reward, rank_in(outcome.info["score"], scores)):
                self.wrong(spec, member, f"{outcome} among {scores}")

    def _check_model(self, spec: RewardSpec, known: Sequence[tuple[Submitted, Outcome]]) -> None:
        group = f"{RUN}:{spec.fingerprint}:{self._digest([m for m, _ in known])}"
        reasons = self._reasons_of_call(spec, group, [m for m, _ in known])
        for member, outcome in known:
            failure = self.expected_failure(spec, member)
            own = {failure} if failure is not None and failure[1] == "invalid" else reasons
            is_right = any(self.is_like(outcome, *reason) for reason in own)
            if own <= MAY_COME:
                is_right = is_right or outcome.reward == score_of(f"{group} {self.address(spec, member)}")
            if not is_right:
                self.wrong(spec, member, f"{outcome} of group {group}")

    def _reasons_of_call(
        self, spec: RewardSpec, group: str, members: Sequence[Submitted]
    ) -> frozenset[tuple[str, str]]:
        """Why the one call for a whole group may fail."""
        reasons = set()
        for member in members:
            failure = self.expected_failure(spec, member)
            if failure is not None and failure[1] != "invalid":
                reasons.add(failure)
            if self.behaviours.get(member.plan.content) == "fails once":
                reasons.add(ONCE)
        if group in self.models.hung_with:
            reasons.add((HUNG, "timeout"))
        return frozenset(reasons)

    def _check_wins(self, spec: RewardSpec, known: Sequence[tuple[Submitted, Outcome]]) -> None:
        points = self._points(spec, [member for member, _ in known])
        for member, outcome in known:
            won = points.get(member)
            if won is None:
                is_right = self.is_like(outcome, INVALID, "invalid")
            elif spec.fingerprint in self.models.unloadable or not won:
                is_right = self.is_like(outcome, "", "abstained")
            else:
                is_right = outcome.reward is not None and is_near(outcome.reward, sum(won) / len(won))
            if not is_right:
                self.wrong(spec, member, f"{outcome}, points {won}")

    def _points(self, spec: RewardSpec, members: Sequence[Submitted]) -> dict[Submitted, list[float]]:
        """What each member that can be compared wins of each comparison."""
        fit = [m for m in members if self.behaviours.get(m.plan.content) != "invalid"]
        points: dict[Submitted, list[float]] = {member: [] for member in fit}
        for i, j in draw_pairs(self._digest(members), len(fit), spec.options["opponents"]):
            both = f"{self.key(fit[i])} {self.key(fit[j])}"
            won = win_of(f"{RUN}:{spec.fingerprint}:{hashlib.sha256(both.encode()).hexdigest()[:32]}")
            points[fit[i]].append(won)
            points[fit[j]].append(1.0 - won)
        return points

    def _digest(self, members: Sequence[Submitted]) -> str:
        return hashlib.sha1("".join(self.key(member) for member in members).encode()).hexdigest()


def is_near(found: float, expected: float) -> bool:
    """Whether two rewards are equal but for rounding."""
    return abs(found - expected) < 1e-9


def rank_in(score: float, scores: Sequence[float]) -> float:
    """The mean rank of a score among scores, of which it is one, divided by their number."""
    below = sum(other < score for other in scores)
    equal = sum(other == score for other in scores)
    return (below + (equal - 1) / 2) / len(scores)


def check_left_over(simulation: Simulation) -> None:
    """No payload, no request, no claim, no start and no reason is left."""
    mine = tuple(f"r{rank.number}.{rank.num_started}." for rank in simulation.ranks)
    check_none("payloads and requests", mine, simulation.services.store.names())
    names = simulation.keyspace.names()
    check_none("claims", (keys.claim(""),), names)
    # What nobody waits for any more may have been begun by a worker that died.
    if not any(rank.given_up or rank.num_started > 1 for rank in simulation.ranks):
        check_none("starts", (keys.starts(""),), names)
    for rank in simulation.ranks:
        words = rank.client.state.why_late.words()
        if words is not None:
            raise BrokenPropertyError("old reason", f"rank {rank.number} still says: {words}")


def check_none(what: str, prefixes: tuple[str, ...], names: Sequence[str]) -> None:
    """Raises `BrokenPropertyError` if there is a name with one of these prefixes."""
    found = [name for name in names if name.startswith(prefixes)]
    if found:
        raise BrokenPropertyError("left over", f"{what}: {found}")


def check_starts(simulation: Simulation) -> None:
    """Where nothing goes wrong no sample is started twice: a start without an answer is taken back."""
    most_starts = simulation.services.outcomes.most_starts
    if simulation.schedule.is_faultless and most_starts > 1:
        raise BrokenPropertyError("suspected", f"a sample was started {most_starts} times, and no process has ended")
