"""What `collect()` raises: this rank's own error, and the verdict to which all ranks of a step come."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from tasks.errors import (
    CollectTimeoutError,
    ConfigError,
    RanksMissingError,
    ScoringError,
)
from tasks.messages import Failure
from tasks.rewards import ConstantOnFailure
from trainer_client.ranks.gather import Ranks, Waits
from trainer_client.results import RewardBatch
from trainer_client.steps.step_log import Summary, failure_words, joined

OnFailure = Literal["raise", "nan"]


def check_max_failure_rate(share: float) -> None:
    """Raises `ConfigError` unless it is a share."""
    if (
        isinstance(share, bool)
        or not isinstance(share, numbers.Real)
        or not 0 <= share <= 1
    ):
        raise ConfigError(
            f"max_failure_rate must be a share, from 0.0 to 1.0, found {share!r}"
        )


def check_call(timeout_s: float, on_failure: OnFailure) -> None:
    """Raises `ConfigError` unless `collect()` can be called so."""
    if not isinstance(timeout_s, numbers.Real) or timeout_s != timeout_s:
        raise ConfigError(f"timeout_s must be a number of seconds, found {timeout_s!r}")
    if on_failure not in get_args(OnFailure):
        raise ConfigError(
            f"collect(on_failure=) must be 'raise' or 'nan', found {on_failure!r}; a number in the place of a reward "
            "is the reward's own, on_failure: {value: 0.0} in the config"
        )


def error_for(
    batch: RewardBatch,
    late: Failure | None,
    on_failure: OnFailure,
    policies: Mapping[str, OnFailure | ConstantOnFailure | None],
) -> ScoringError | None:
    """What `collect()` raises for this rank's own samples, or None.

    Args:
        late: Why some have no answer at the deadline, if so.
        policies: By reward name, its own `on_failure`, which comes before the call's.
    """
    if late is not None and on_failure == "raise":
        return CollectTimeoutError(
            f"{late.message}\n{batch.describe_failures(late.message)}", batch
        )
    if any((policies.get(f.reward) or on_failure) == "raise" for f in batch.failures):
        return ScoringError(batch.describe_failures(), batch)
    return None


def error_for_rate(
    summary: Summary, max_failure_rate: float, batch: RewardBatch
) -> ScoringError | None:
    """What `collect()` raises where too many have no reward, whatever `on_failure` says; on all ranks alike.

    Args:
        summary: The step, over all ranks.
        max_failure_rate: The largest share of (sample, reward) pairs without a reward.
    """
    if not summary.failure_rate > max_failure_rate:
        return None
    where = (
        f" of all ranks' {summary.num_samples} samples"
        if summary.num_samples != len(batch)
        else ""
    )
    rate = (
        f"{summary.failure_rate:.1%} failed{where}, more than max_failure_rate={max_failure_rate:g} allows "
        "(RewardClient(max_failure_rate=1.0) never stops for it)"
    )
    return ScoringError(
        f"{rate}\n{batch.describe_failures() or failure_words(summary)}", batch
    )


def of_all_ranks(
    ranks: Ranks,
    topic: str,
    error: ScoringError | None,
    batch: RewardBatch,
    deadline: float,
    summary: Summary,
    waits: Waits,
) -> tuple[ScoringError | None, Summary]:
    """What all ranks raise, or None: one that raised alone would hang the next collective. And the step over all ranks.

    Deadlines weigh more than failures: after them the step stays open, on every rank.
    """
    kind = (
        "ok"
        if error is None
        else "late"
        if isinstance(error, CollectTimeoutError)
        else "failed"
    )
    mine = [kind, str(error or ""), summary.to_plain()]
    try:
        verdicts = ranks.gather(topic, mine, deadline, _is_late, waits)
    except RanksMissingError as missing:
        return CollectTimeoutError(f"{missing}\n{error or ''}".rstrip(), batch), summary
    over_ranks = joined([Summary.of_plain(plain) for _, _, plain in verdicts])
    others = [
        f"rank {r}: {said}"
        for r, (kind, said, _) in enumerate(verdicts)
        if kind != "ok" and r != ranks.rank
    ]
    if _is_late(verdicts):
        return CollectTimeoutError(
            "\n".join([str(error or "this rank has all its rewards"), *others]), batch
        ), over_ranks
    if others:
        return ScoringError(
            "\n".join([str(error or "this rank has all its rewards"), *others]), batch
        ), over_ranks
    return error, over_ranks


def _is_late(verdicts: Sequence[Sequence[Any]]) -> bool:
    """Whether the step stays open, and all ranks collect it again."""
    return any(kind == "late" for kind, *_ in verdicts)
