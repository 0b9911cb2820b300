"""The tasks of groups whose reward is made of parts: a group within one chunk, and the body of a larger one's chord."""

from __future__ import annotations

import dataclasses
from typing import Any

from tasks.celery_app import (
    COMBINE,
    COMBINE_ARGUMENTS,
    GROUP,
    SCORE_ARGUMENTS,
    app,
    named,
)
from tasks.groups import combine
from tasks.messages import GroupRequest, Outcome
from workers.scoring.chunk import ChunkScorer, answers
from workers.scoring.context import ScoringContext
from workers.scoring.handling import handle_task
from workers.scoring.task_message import TaskMessage

WAIT_FOR_OTHERS_S = 1.0
"""How long a body waits for parts that another task is scoring, before it sends itself again."""

LOOK_EVERY_S = 0.1
"""How often a body looks for those parts meanwhile."""

MOST_RETURNS = 60
"""How often a body sends itself again at most. After that the client sends the group again."""

WAITING = "waits for others"


@app.task(name=GROUP, bind=True)  # type: ignore[untyped-decorator]
def score_group(self: Any, *arguments: Any) -> str:
    """Score the parts of a group and combine them; returns a few words for people.

    The arguments are those of `SCORE_ARGUMENTS`; a later client may send more.
    """
    said = named(SCORE_ARGUMENTS, arguments)
    return handle_task(self, said, GroupRequest, score_and_combine)


@app.task(name=COMBINE, bind=True)  # type: ignore[untyped-decorator]
def combine_group(self: Any, *arguments: Any) -> str:
    """Make a group's outcome of those of its parts; the body of a chord, whose header scored them.

    The arguments are those of `COMBINE_ARGUMENTS`; a later client may send more.
    """
    said = named(COMBINE_ARGUMENTS, arguments)
    return handle_task(self, said, GroupRequest, wait_and_combine)


def score_and_combine(
    context: ScoringContext, message: TaskMessage, request: GroupRequest, taken_ms: int
) -> str:
    """Score the parts of a group and combine them; the work of `score_group`.

    Parts that another task is scoring are left to that task, and a body is sent to combine them then.
    """
    if _is_answered(context, request):
        return "answered already"
    words = "nothing to score"
    if request.parts:
        words = ChunkScorer(context, request.chunk(), taken_ms).score()
    combined = combine_parts(context, request)
    if combined == WAITING:
        context.send_body(dataclasses.replace(message, number=0, num_returns=0))
    return f"{words}; {combined}"


def wait_and_combine(
    context: ScoringContext, message: TaskMessage, request: GroupRequest, _taken_ms: int
) -> str:
    """Combine the parts of a group; the work of `combine_group`.

    If another task is still scoring parts, the body waits for a while and then sends itself again, so that it does not
    hold one of the worker's slots. If nobody is scoring them, the client sends the group again.
    """
    clock = context.clock
    ends_at = clock.monotonic() + WAIT_FOR_OTHERS_S
    words = combine_parts(context, request)
    while words == WAITING and clock.monotonic() < ends_at:
        clock.sleep(LOOK_EVERY_S)
        words = combine_parts(context, request)
    if words == WAITING and message.num_returns < MOST_RETURNS:
        num_returns = message.num_returns + 1
        context.send_body(dataclasses.replace(message, num_returns=num_returns))
    return words


def combine_parts(context: ScoringContext, request: GroupRequest) -> str:
    """Read the outcomes of a group's parts and write the group's once; returns what came of it, in words."""
    outcomes = context.outcomes
    there, missing = _look_up_parts(context, request)
    if missing:
        if any(context.retry(lambda: outcomes.claimed(missing))):
            return WAITING
        # An answer that ended its claim between the two questions is seen now.
        there, missing = _look_up_parts(context, request)
    if missing:
        return f"{len(missing)} parts are missing"

    token = context.new_token()
    claims = context.retry(
        lambda: outcomes.claim(
            [request.address], [request.attempt], token, request.deadline_ms
        )
    )
    if claims is None or claims[0].state != "claimed":
        return "combined already"
    combined = combine(request, there)
    context.retry(lambda: outcomes.write({request.address: combined}, token))
    return "combined"


def _look_up_parts(
    context: ScoringContext, request: GroupRequest
) -> tuple[dict[str, Outcome], list[str]]:
    """The outcomes of a group's parts that are there, by address, and the addresses of those that are not answered."""
    addresses = [part.address for part in request.parts]
    found = context.retry(lambda: context.outcomes.look_up(addresses))
    there: dict[str, Outcome] = {}
    missing = []
    for part, outcome in zip(request.parts, found, strict=True):
        if outcome is not None:
            there[part.address] = outcome
        if not answers(outcome, part.attempt):
            missing.append(part.address)
    return there, missing


def _is_answered(context: ScoringContext, request: GroupRequest) -> bool:
    outcome = context.retry(lambda: context.outcomes.look_up([request.address]))[0]
    return answers(outcome, request.attempt)
