"""What `collect()` raises: this rank's own error, and the verdict to which all ranks of a step come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from tasks.errors import CollectTimeoutError, RanksMissingError, ScoringError
from tasks.messages import Failure
from tasks.rewards import ConstantOnFailure
from trainer_client.ranks import Ranks
from trainer_client.results import RewardBatch

OnFailure = Literal["raise", "nan"]


def error_for(
    batch: RewardBatch,
    late: Failure | None,
    on_failure: OnFailure,
    policies: Mapping[str, OnFailure | ConstantOnFailure | None],
    max_failure_rate: float,
) -> ScoringError | None:
    """What `collect()` raises for this rank's own samples, or None.

    Args:
        late: Why some have no answer at the deadline, if so.
        policies: By reward name, its own `on_failure`, which comes before the call's.
        max_failure_rate: Share of failures above which nothing keeps it from raising.
    """
    if late is not None and on_failure == "raise":
        return CollectTimeoutError(f"{late.message}\n{batch.describe_failures()}", batch)
    if any((policies.get(f.reward) or on_failure) == "raise" for f in batch.failures):
        return ScoringError(batch.describe_failures(), batch)
    if batch.failures and batch.failure_rate > max_failure_rate:
        rate = f"{batch.failure_rate:.1%} failed, more than max_failure_rate={max_failure_rate:.1%}"
        return ScoringError(f"{rate}\n{batch.describe_failures()}", batch)
    return None


def of_all_ranks(
    ranks: Ranks, topic: str, error: ScoringError | None, batch: RewardBatch, deadline: float
) -> ScoringError | None:
    """What all ranks raise, or None: one that raised alone would hang the next collective.

    Deadlines weigh more than failures: after them the step stays open, on every rank.
    """
    mine = ["late" if isinstance(error, CollectTimeoutError) else "failed", str(error)] if error else ["ok", ""]
    try:
        verdicts = ranks.gather(topic, mine, deadline, _is_late)
    except RanksMissingError as missing:
        return CollectTimeoutError(f"{missing}\n{error or ''}".rstrip(), batch)
    others = [f"rank {r}: {words}" for r, (kind, words) in enumerate(verdicts) if kind != "ok" and r != ranks.rank]
    if _is_late(verdicts):
        return CollectTimeoutError("\n".join([str(error or "this rank has all its rewards"), *others]), batch)
    if others:
        return ScoringError("\n".join([str(error or "this rank has all its rewards"), *others]), batch)
    return error


def _is_late(verdicts: Sequence[Sequence[str]]) -> bool:
    """Whether the step stays open, and all ranks collect it again."""
    return any(kind == "late" for kind, _ in verdicts)
