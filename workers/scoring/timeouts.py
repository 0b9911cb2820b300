"""Writes the outcome of samples whose model hangs, instead of their task, which will not return."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.messages import Failure, Outcome, SampleRequest
from tasks.outcomes import WorkerOutcomes
from workers.scoring.held_claims import HeldClaims


def write_timeouts(
    outcomes: WorkerOutcomes,
    claims: HeldClaims,
    samples: Sequence[SampleRequest],
    message: str,
) -> None:
    """Write a failure `timeout` with this message for each sample that this process still has claimed."""
    tokens = claims.tokens
    claims.drop(sample.address for sample in samples)
    failure = Failure(kind="timeout", message=message)
    for sample in samples:
        token = tokens.get(sample.address)
        if token is None:
            continue
        outcome = Outcome(
            failure=failure, attempt=sample.attempt, shared_key=sample.shared_key
        )
        # A process that was stopped (SIGSTOP) for as long looks the same. By now another may score its samples.
        outcomes.write({sample.address: outcome}, token, only_claimed=True)
