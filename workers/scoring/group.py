"""The tasks of groups whose reward is made of parts: a group within one chunk, and the body of a larger one's chord."""

from __future__ import annotations

import time
from typing import Any

from tasks.celery_app import COMBINE, GROUP, PRIORITY_FIRST, app
from tasks.groups import combine
from tasks.messages import WIRE_VERSION, GroupRequest
from workers.scoring.chunk import Chunk
from workers.scoring.messages import Desk, Message, lasting, new_token, on_desk

WAIT_FOR_OTHERS_S = 1.0
"""A body waits so long for parts that another task is scoring, before it sends itself again."""

MOST_RETURNS = 60
"""A body sends itself again so often at most; then it is the client's to send."""

WAITING = "waits for others"


@app.task(name=GROUP, bind=True)  # type: ignore[untyped-decorator]
def score_group(
    self: Any,
    label: str,
    request_id: str,
    wire: int,
    number: int = 0,
    store: str = "",
    *_later: Any,
) -> str:
    """Score the parts of a group and combine them; returns a few words for people.

    The arguments are those of `workers.scoring.chunk.score`.

    Parts that another task is scoring are left to it, and a body is sent to combine them then.
    """

    def work(desk: Desk, request: GroupRequest, taken_ms: int) -> str:
        if _is_answered(desk, request):
            return "answered already"
        words = (
            Chunk(desk, request.chunk(), taken_ms).score()
            if request.parts
            else "nothing to score"
        )
        combined = _combine(desk, request)
        if combined == WAITING:
            _send_body(self, label, request_id, store, num_returns=0)
        return f"{words}; {combined}"

    return on_desk(
        self, label, Message(request_id, wire, number, store), GroupRequest, work
    )


@app.task(name=COMBINE, bind=True)  # type: ignore[untyped-decorator]
def combine_group(
    self: Any,
    label: str,
    request_id: str,
    wire: int,
    store: str = "",
    num_returns: int = 0,
    *_later: Any,
) -> str:
    """Make a group's outcome of those of its parts; the body of a chord, whose header scored them.

    Parts that another task is still scoring are waited for: after a pause the body sends itself again. Parts that
    nobody is scoring are left to the client, which sends the group again.
    """

    def work(desk: Desk, request: GroupRequest, _taken_ms: int) -> str:
        ends_at = time.monotonic() + WAIT_FOR_OTHERS_S
        while (
            words := _combine(desk, request)
        ) == WAITING and time.monotonic() < ends_at:
            time.sleep(0.1)
        if words == WAITING and num_returns < MOST_RETURNS:
            _send_body(self, label, request_id, store, num_returns + 1)
        return words

    return on_desk(self, label, Message(request_id, wire, 0, store), GroupRequest, work)


def _send_body(
    task: Any, label: str, request_id: str, store: str, num_returns: int
) -> None:
    queue = task.request.delivery_info.get("routing_key") or app.conf.task_default_queue
    args = [label, request_id, WIRE_VERSION, store, num_returns]
    app.send_task(
        COMBINE,
        args=args,
        queue=queue,
        argsrepr=label,
        priority=PRIORITY_FIRST,
        ignore_result=True,
    )


def _combine(desk: Desk, request: GroupRequest) -> str:
    """Read the parts' outcomes and write the group's once; what came of it."""
    outcomes, parts = desk.outcomes, request.parts
    addresses = [p.address for p in parts]
    found = dict(
        zip(addresses, lasting(lambda: outcomes.look_up(addresses)), strict=True)
    )
    there = {a: o for a, o in found.items() if o is not None}
    missing = [
        p.address
        for p in parts
        if p.address not in there
        or not (there[p.address].is_final or there[p.address].attempt >= p.attempt)
    ]
    if missing:
        return (
            WAITING
            if any(lasting(lambda: outcomes.claimed(missing)))
            else f"{len(missing)} parts are missing"
        )
    token = new_token(desk.node)
    claims = lasting(
        lambda: outcomes.claim(
            [request.address], [request.attempt], token, request.deadline_ms
        )
    )
    if claims is None or claims[0].state != "claimed":
        return "combined already"
    whole = combine(request, there)
    lasting(lambda: outcomes.write({request.address: whole}, token))
    return "combined"


def _is_answered(desk: Desk, request: GroupRequest) -> bool:
    outcome = lasting(lambda: desk.outcomes.look_up([request.address]))[0]
    return outcome is not None and (
        outcome.is_final or outcome.attempt >= request.attempt
    )
