"""Planted bugs: the real code with one slip each, which the simulation must find. `python -m tests.simulation.planted`.

A simulation that finds nothing may be blind. So each of these bugs, of kinds that this project has had, is planted
alone, and schedules are run until a property breaks. The invariants of the engine (`EngineState.check`) are not
asserted meanwhile: each bug breaks something that a user could see.

To add a bug: write a `Bug` with the function that it is in, a piece of the function's source that occurs once there,
and the wrong code that replaces it. Run `python -m tests.simulation.planted --bug its_name`, and enter the first seed
that finds it, and the property that broke, in `FOUND`. If no seed finds a bug, the bug is harmless (then it is none),
or no schedule gets there (`schedules.py`), or no property notices it (`properties.py`): mend that.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.groups import formulas
from tests.simulation import redis as servers
from tests.simulation.run import Failure, run
from tests.simulation.schedules import draw
from trainer_client.engine import model, resume, tracking
from trainer_client.engine.backend import Backend
from trainer_client.engine.core import Core
from trainer_client.engine.group_sealing import Sealing
from trainer_client.engine.intake import Intake
from trainer_client.engine.losses import LossPolicy
from trainer_client.engine.payloads import PayloadLedger
from trainer_client.engine.sending import Sending
from trainer_client.engine.state import EngineState
from trainer_client.engine.tracking import Tracking
from workers.scoring import group, quarantine, timeouts
from workers.scoring.chunk import ChunkScorer
from workers.scoring.context import ScoringContext
from workers.scoring.held_claims import HeldClaims

MAX_EVENTS = 20_000
"""More than twice what a schedule takes without a bug; one that waits for ever is to be seen in seconds."""


NEAR = 400
"""Seeds that are tried for a bug before it counts as not found."""


@dataclass(frozen=True)
class Bug:
    """A slip in one function."""

    name: str
    breaks: str
    """What goes wrong, in a line."""
    function: Callable[..., Any]
    right: str
    """A piece of its source that occurs once."""
    wrong: str

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Within it the bug is there, for whoever calls the function and however they know it."""
        right = self.function.__code__
        self.function.__code__ = self._wrong_code()
        try:
            with without_check():
                yield
        finally:
            self.function.__code__ = right

    def _wrong_code(self) -> Any:
        source = textwrap.dedent(inspect.getsource(self.function))
        assert source.count(self.right) == 1, f"{self.name}: {self.right!r} occurs {source.count(self.right)} times"
        wrong = source.replace(self.right, self.wrong)
        code = compile(wrong, f"<planted: {self.name}>", "exec")
        found: dict[str, Any] = {}
        exec(code, self.function.__globals__, found)
        planted = found[self.function.__name__]
        return getattr(planted, "__func__", planted).__code__


@contextlib.contextmanager
def without_check() -> Iterator[None]:
    """Within it the engine's invariants are not asserted."""
    right = EngineState.check
    EngineState.check = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        EngineState.check = right  # type: ignore[method-assign]


ENGINE = (
    Bug(
        "own_group_left_to_others",
        "a group that only a killed process had, and had not sent, is left to other ranks",
        Tracking._leave_to_other_ranks,
        "is_shared.get(one) is False",
        "False",
    ),
    Bug(
        "looked_after_once",
        "a message is looked after once, and not again",
        LossPolicy.is_lost,
        "delivery.look_at = now + self.look_every_s",
        "delivery.look_at = float('inf')",
    ),
    Bug(
        "parts_never_freed",
        "the requests of a chord's parts stay in the store",
        Core._leave_delivery,
        "free_later(delivery.requests)",
        "free_later([delivery.request])",
    ),
    Bug(
        "early_answer_never_freed",
        "a request whose answer came before its message was known to be sent stays in the store",
        Sending.on_published,
        "self._core.payloads.free_later(delivery.requests)",
        "pass",
    ),
    Bug(
        "sealed_media_freed",
        "the media of members are freed when their group is sealed",
        PayloadLedger.hand_over,
        "self.share(payload, taker)",
        "pass",
    ),
    Bug(
        "media_freed_with_first_user",
        "media are freed with the first of those that need them",
        PayloadLedger.release,
        "del payload.users[user]",
        "payload.users.clear()",
    ),
    Bug(
        "one_member_put_back",
        "after Redis was emptied one member of each group is put back",
        Sealing.put_groups_back,
        "for member in list(group.members.values()):",
        "for member in list(group.members.values())[:1]:",
    ),
    Bug(
        "old_reason_kept",
        "that a judge has no permit left is said for ever",
        Tracking._withdraw_budgets,
        "self._core.why_late.withdraw(Source.BUDGET, fingerprint)",
        "pass",
    ),
    Bug(
        "throttled_forgotten",
        "of messages that wait for a permit one goes, the others are forgotten",
        Tracking.send_throttled,
        "self._throttle.take(self._core.now):",
        "self._throttle.take(self._core.now)[:1]:",
    ),
    Bug(
        "claims_ignored",
        "what a worker has in hand is taken for lost",
        tracking._is_in_hand,
        "return any(address in claimed for address in awaited.in_hand_addresses)",
        "return False",
    ),
    Bug(
        "missed_once_is_lost",
        "a message that is missed once is sent again at once",
        LossPolicy.is_lost,
        "(delivery.is_missed and has_paused)",
        "has_paused",
    ),
    Bug(
        "attempt_not_grown",
        "what failed before is asked for with the same attempt",
        Intake.on_first_outcomes,
        "outcome.attempt + 1",
        "outcome.attempt",
    ),
    Bug(
        "any_failure_accepted",
        "a failure of an earlier attempt is an answer",
        model.Awaited.accepts,
        "outcome.attempt >= self.attempt",
        "True",
    ),
    Bug(
        "shared_outcome_given_up",
        "who gives up a sample gives up what others await of an equal one",
        EngineState._on_given_up,
        "if not awaited.slots:",
        "if True:",
    ),
    Bug(
        "carried_dropped",
        "what should travel with a group is forgotten when the group is sealed",
        Sealing._join_member,
        "awaited.group.carried += carried",
        "pass",
    ),
    Bug(
        "answered_not_resumed",
        "what was answered when its ticket was pickled is not asked for again",
        resume.slots_and_deliveries,
        "if mine:",
        "if False:",
    ),
    Bug(
        "other_rank_not_looked_after",
        "a group's message that another rank has sent is not looked after",
        Sealing._watch_other_ranks,
        "self._losses.sent(delivery, self._core.now)",
        "delivery.look_at = float('inf')",
    ),
    Bug(
        "store_measured_once",
        "a full store is not measured again",
        Intake.start_storing,
        "self._room.is_due(self._core.now)",
        "not self._room.is_known and self._room.is_due(self._core.now)",
    ),
    Bug(
        "full_store_deadlock",
        "a store that is full of incomplete groups takes no member of theirs",
        Intake.on_measured,
        "is_deadlock = ",
        "is_deadlock = False and ",
    ),
    Bug(
        "restored_under_wrong_name",
        "media that are stored again get another name than their request has",
        Backend._bring_back,
        "{name: found[digest].data for",
        "{digest: found[digest].data for",
    ),
    Bug(
        "resumed_not_sent_again",
        "a lost message of an earlier process is never sent again",
        Tracking.on_request_checked,
        "self._core.act(do.PublishAgain(delivery, delivery.request))",
        "pass",
    ),
)

WORKERS = (
    Bug(
        "claims_not_released",
        "the claims and starts of samples that were not scored stay",
        ChunkScorer._release_left,
        "if self.left:",
        "if False:",
    ),
    Bug(
        "answered_claims_kept",
        "claims of answered samples are kept alive",
        ChunkScorer._write,
        "self.context.claims.drop(complete, self.token)",
        "pass",
    ),
    Bug(
        "claims_not_extended",
        "claims are not kept alive",
        HeldClaims.extend,
        "self._outcomes.extend(self.tokens)",
        "self._outcomes.extend({})",
    ),
    Bug(
        "suspects_with_others",
        "a sample that may have ended its process is scored with others, for ever",
        ChunkScorer._score_claimed,
        "if starts <= USUAL_STARTS]",
        "]",
    ),
    Bug(
        "suspect_never_given_up",
        "a sample that ends its process each time is started for ever",
        quarantine.decide,
        "if earlier < MOST_STARTS_ALONE:",
        "if True:",
    ),
    Bug(
        "token_shared",
        "all tasks of a process claim with one token",
        ScoringContext.new_token,
        ".{next(self.token_numbers)}",
        "",
    ),
    Bug(
        "others_claims_ignored",
        "what another task has claimed is scored too",
        ChunkScorer._claim,
        'claim.state == "claimed"',
        'claim.state != "answered"',
    ),
    Bug(
        "answered_scored_again",
        "what is answered is scored again",
        ChunkScorer._claim,
        'claim.state == "claimed"',
        'claim.state != "claimed by another"',
    ),
    Bug(
        "missing_media_ignored",
        "a sample is scored without media that are gone",
        ChunkScorer._fetch,
        "if missing:",
        "if damaged:",
    ),
    Bug(
        "attempt_not_written",
        "a failure does not say which attempt it is of",
        ChunkScorer._write,
        '"attempt": samples[address].attempt,',
        "",
    ),
    Bug(
        "slots_not_written",
        "a group's outcome does not say which slots over ranks it is of",
        formulas.combine,
        "shared_key=request.shared_key",
        "shared_key=''",
    ),
    Bug(
        "hung_not_timed_out",
        "a sample whose model hangs is not timed out",
        timeouts.write_timeouts,
        "tokens = claims.tokens",
        "tokens = {}",
    ),
    Bug(
        "combined_without_all",
        "a group is put together although parts of it are missing",
        group.combine_parts,
        "there, missing = _look_up_parts(context, request)\n    if missing:\n        if",
        "there, missing = _look_up_parts(context, request)[0], []\n    if missing:\n        if",
    ),
)

SERVERS = (
    Bug(
        "consumed_offset_goes_back",
        "a queue's consumed offset goes back",
        servers.Outcomes.take,
        "if 0 < number <= sent and (consumed < number or consumed > sent):",
        "if 0 < number <= sent:",
    ),
    Bug(
        "starts_not_taken_back",
        "a claim that is released counts as a start",
        servers.Outcomes.release,
        'fields.get("starts", 0) - 1',
        'fields.get("starts", 0)',
    ),
    Bug(
        "starts_kept",
        "the starts of an answered sample stay",
        servers.Outcomes.write,
        "self._keys.delete(keys.starts(address))",
        "pass",
    ),
    Bug(
        "gone_media_not_told",
        "who renews media is not told that they are gone",
        servers.PayloadStore._count,
        "return gone",
        "return []",
    ),
    Bug(
        "sealed_without_last",
        "a group is sealed before its last member is there",
        servers.GroupSlots._seal_if_full,
        "if len(slots) < size:",
        "if len(slots) < size - 1:",
    ),
    Bug(
        "old_failure_is_answer",
        "a worker is told of a failure of an earlier attempt that it is the answer",
        servers.Outcomes._claim_one,
        "keys.outcome(address)), attempt)",
        "keys.outcome(address)), 0)",
    ),
)

BUGS = (*ENGINE, *WORKERS, *SERVERS)

FOUND: dict[str, tuple[int, str]] = {
    "looked_after_once": (3, "OutOfTimeError"),
    "parts_never_freed": (5, "left over"),
    "early_answer_never_freed": (47, "left over"),
    "sealed_media_freed": (1, "OutOfTimeError"),
    "media_freed_with_first_user": (1, "KeyError"),
    "one_member_put_back": (27, "OutOfTimeError"),
    "old_reason_kept": (20, "old reason"),
    "throttled_forgotten": (20, "OutOfTimeError"),
    "claims_ignored": (1276, "OutOfTimeError"),
    "missed_once_is_lost": (2, "sent again"),
    "attempt_not_grown": (46, "old failure"),
    "any_failure_accepted": (46, "old failure"),
    "shared_outcome_given_up": (165, "OutOfTimeError"),
    "carried_dropped": (4, "OutOfTimeError"),
    "answered_not_resumed": (399, "OutOfTimeError"),
    "other_rank_not_looked_after": (34, "OutOfTimeError"),
    "store_measured_once": (1, "spins"),
    "full_store_deadlock": (1, "OutOfTimeError"),
    "restored_under_wrong_name": (4, "OutOfTimeError"),
    "resumed_not_sent_again": (146, "OutOfTimeError"),
    "claims_not_released": (35, "claim kept"),
    "answered_claims_kept": (1, "claim kept"),
    "claims_not_extended": (26, "answer"),
    "suspects_with_others": (11, "paid twice"),
    "suspect_never_given_up": (11, "OutOfTimeError"),
    "token_shared": (1, "paid twice"),
    "others_claims_ignored": (1, "paid twice"),
    "answered_scored_again": (5, "paid twice"),
    "missing_media_ignored": (4, "media"),
    "attempt_not_written": (12, "OutOfTimeError"),
    "slots_not_written": (102781, "OutOfTimeError"),
    "own_group_left_to_others": (3748, "OutOfTimeError"),
    "hung_not_timed_out": (26, "answer"),
    "combined_without_all": (11, "KeyError"),
    "consumed_offset_goes_back": (1657, "seen late"),
    "starts_not_taken_back": (40, "left over"),
    "starts_kept": (1, "left over"),
    "gone_media_not_told": (4, "OutOfTimeError"),
    "sealed_without_last": (5, "answer"),
    "old_failure_is_answer": (5, "OutOfTimeError"),
}
"""The first seed that finds each bug, and the property that breaks there."""


def seed_passes(seed: int) -> bool:
    """Whether all properties hold in a schedule, without a bug."""
    return run(draw(seed), MAX_EVENTS) is None


def find(bug: Bug, seed: int) -> Failure | None:
    """What goes wrong in one schedule with a bug."""
    with bug.planted():
        return run(draw(seed), MAX_EVENTS)


def find_near(bug: Bug) -> Failure | None:
    """What goes wrong with a bug in the schedule that is recorded for it, or else in one of the next.

    A schedule is another one after most changes of the code that it runs: a call more or less shifts what follows.
    """
    first, _ = FOUND[bug.name]
    for seed in range(first, first + NEAR):
        failure = find(bug, seed)
        if failure is not None:
            return failure
    return None


def main(arguments: Sequence[str]) -> int:
    """Print which of these seeds find which bug; returns 1 if a bug is found by none of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.planted", description=__doc__)
    parser.add_argument("--seeds", default="1..51", help="from..to, the last one not included")
    parser.add_argument("--bug", help="this one alone, until a seed finds it")
    given = parser.parse_args(arguments)
    first, _, last = given.seeds.partition("..")
    seeds = range(int(first), int(last))
    bugs = [bug for bug in BUGS if given.bug in (None, bug.name)]
    print(f"| bug | what it breaks | first seed | property | found by, of {len(seeds)} |\n|---|---|---|---|---|")
    are_all_found = [_print_row(bug, seeds, is_first_enough=given.bug is not None) for bug in bugs]
    return int(not all(are_all_found))


def _print_row(bug: Bug, seeds: Sequence[int], is_first_enough: bool) -> bool:
    failures = []
    for seed in seeds:
        failure = find(bug, seed)
        if failure is not None and seed_passes(seed):
            failures.append(failure)
            if is_first_enough:
                break
    seed, name = (failures[0].seed, failures[0].property) if failures else FOUND.get(bug.name, ("none", ""))
    print(f"| `{bug.name}` | {bug.breaks} | {seed} | {name} | {len(failures)} |", flush=True)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
