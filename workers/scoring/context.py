"""What the scoring tasks of a worker process need, in one object.

Nothing of scoring is kept at module level, and nothing of it reads the clock by itself: a simulation runs several
worker processes within one interpreter, each with a context of its own, on a virtual clock.
"""

from __future__ import annotations

import itertools
import random
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tasks.outcomes import WorkerOutcomes
from tasks.payloads import PayloadStore
from workers.scoring.held_claims import HeldClaims
from workers.scoring.quarantine import Quarantine
from workers.scoring.retry import Clock, retry
from workers.scoring.runner import ModelRunner
from workers.scoring.tally import Tally
from workers.scoring.task_message import TaskMessage, send_body

REDIS_AWAY_S = 120.0
"""How long a task waits for a Redis that is away before it leaves its chunk to be sent again."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ScoringContext:
    """What the tasks of one worker process score with. Safe between threads."""

    node: str
    """The worker's name, as Celery has it."""
    outcomes: WorkerOutcomes
    store: PayloadStore
    claims: HeldClaims
    runner: ModelRunner
    tally: Tally = field(default_factory=Tally)
    refusal: Callable[[BaseException], str] = lambda _error: ""
    """Why this process ends, if an error says that a Redis will not serve the process any more; else empty."""
    send_body: Callable[[TaskMessage], None] = send_body
    """Sends the body of a group's chord; by Celery, unless a simulation gives another."""
    quarantine: Quarantine = field(default_factory=Quarantine)
    """Where suspects are scored, one at a time in a process."""
    clock: Clock = field(default_factory=Clock)
    rng: random.Random = field(default_factory=random.Random)
    """Draws how long a retry pauses."""
    process_id: str = field(default_factory=lambda: secrets.token_hex(4))
    """Random, not the number of the process: several containers may be process 1 of one host name."""
    token_numbers: Iterator[int] = field(default_factory=itertools.count)

    def new_token(self) -> str:
        """A token for a task's claims, unlike that of any other task of any process."""
        return f"{self.node}/{self.process_id}.{next(self.token_numbers)}"

    def retry(self, call: Callable[[], T]) -> T:
        """Call `call`, which may run twice, for as long as a task waits for a Redis that is away."""
        return retry(call, REDIS_AWAY_S, self.clock, self.rng)


def set_context(app: Any, context: ScoringContext) -> None:
    """Let the tasks of this Celery app, of which a process has one, score with `context`."""
    app.scoring_context = context


def context_of(app: Any) -> ScoringContext:
    """What the tasks of a Celery app score with.

    Raises:
        RuntimeError: This process has not set a context, so it is no worker of ours.
    """
    context: ScoringContext | None = getattr(app, "scoring_context", None)
    if context is None:
        raise RuntimeError(
            "this process has no scoring context; start it by `celery -A tasks worker`, whose start-up "
            "(workers.process.startup) makes one"
        )
    return context
