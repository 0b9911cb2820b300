"""What `collect()` raises: this rank's own error, and the verdict on which all ranks of a step agree."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from tasks.errors import (
    CollectTimeoutError,
    ConfigError,
    RanksMissingError,
    ScoringError,
)
from tasks.messages import Failure
from tasks.rewards import ConstantOnFailure, OnFailure
from trainer_client.ranks.gather import OnWaiting, RankGather
from trainer_client.results import RewardBatch
from trainer_client.steps.step_summary import StepSummary, failure_words, joined

MAX_FAILURE_RATE = 0.5
"""Where more than half of the rewards are missing, something is broken that `on_failure: nan` was not meant for."""

OK, LATE, FAILED = "ok", "late", "failed"
"""What a rank tells the others of its own verdict."""


def check_max_failure_rate(share: float) -> None:
    """Raises `ConfigError` unless it is a share, from 0 to 1."""
    is_number = isinstance(share, numbers.Real) and not isinstance(share, bool)
    if not (is_number and 0 <= share <= 1):
        raise ConfigError(
            f"max_failure_rate must be a share, from 0.0 to 1.0, found {share!r}"
        )


def max_failure_rate_of(
    of_this_call: float | None, of_client: float | None, on_failure: OnFailure
) -> float:
    """The share of pairs without a reward above which one `collect()` raises.

    Who asks for NaN in the call itself is given all of them, unless a share was named. A policy in the config is no
    such word, since nobody may be looking at the failures.

    Raises:
        ConfigError: The share of this call is none.
    """
    if of_this_call is not None:
        check_max_failure_rate(of_this_call)
        return of_this_call
    if of_client is not None:
        return of_client
    return 1.0 if on_failure == "nan" else MAX_FAILURE_RATE


def check_call(timeout_s: float, on_failure: OnFailure) -> None:
    """Raises `ConfigError` if an argument of `collect()` is wrong."""
    is_nan = timeout_s != timeout_s
    if not isinstance(timeout_s, numbers.Real) or is_nan:
        raise ConfigError(f"timeout_s must be a number of seconds, found {timeout_s!r}")
    if on_failure not in get_args(OnFailure):
        raise ConfigError(
            f"collect(on_failure=) must be 'raise' or 'nan', found {on_failure!r}; a number instead of a missing "
            "reward is set for each reward in the config, on_failure: {value: 0.0}"
        )


def error_for(
    batch: RewardBatch,
    late: Failure | None,
    on_failure: OnFailure,
    policies: Mapping[str, OnFailure | ConstantOnFailure | None],
) -> ScoringError | None:
    """What `collect()` raises for this rank's own samples, or None.

    Args:
        late: Why samples have no answer at the deadline; None if all have one.
        policies: By reward name, its own `on_failure`, which comes before that of the call.
    """
    if late is not None and on_failure == "raise":
        return CollectTimeoutError(
            f"{late.message}\n{batch.describe_failures(late.message)}", batch
        )
    for failed in batch.failures:
        policy = policies.get(failed.reward) or on_failure
        if policy == "raise":
            return ScoringError(batch.describe_failures(), batch)
    return None


def error_for_rate(
    summary: StepSummary, max_failure_rate: float, batch: RewardBatch
) -> ScoringError | None:
    """What `collect()` raises if too many samples have no reward, whatever `on_failure` says; on all ranks alike.

    Args:
        summary: The step, over all ranks.
        max_failure_rate: The largest share of (sample, reward) pairs without a reward.
    """
    if summary.failure_rate <= max_failure_rate:
        return None

    is_of_all_ranks = summary.num_samples != len(batch)
    where = f" of all ranks' {summary.num_samples} samples" if is_of_all_ranks else ""
    rate = (
        f"{summary.failure_rate:.1%} failed{where}, more than max_failure_rate={max_failure_rate:g} allows "
        "(RewardClient(max_failure_rate=1.0) never stops for it)"
    )
    return ScoringError(
        f"{rate}\n{batch.describe_failures() or failure_words(summary)}", batch
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `collect()` comes to, on one rank or on all."""

    error: ScoringError | None
    """What it raises, if it does."""
    summary: StepSummary
    """The step in numbers."""


def agree(
    ranks: RankGather,
    topic: str,
    own: Verdict,
    batch: RewardBatch,
    deadline: float,
    on_waiting: OnWaiting,
) -> Verdict:
    """The verdict of all ranks, in which the summary is that of all ranks' samples.

    All ranks raise or none does: the others would hang in the next collective of a rank that raised alone. Deadlines
    weigh more than failures: after a deadline the step stays open, on every rank.

    Args:
        own: This rank's verdict.
        batch: This rank's samples; the error carries it.
    """
    mine = [_kind(own.error), str(own.error or ""), own.summary.to_plain()]
    try:
        verdicts = ranks.gather(topic, mine, deadline, _is_late, on_waiting)
    except RanksMissingError as missing:
        text = f"{missing}\n{own.error or ''}".rstrip()
        return Verdict(CollectTimeoutError(text, batch), own.summary)

    summaries, texts = [], [str(own.error or "this rank has all its rewards")]
    for rank, (kind, text, plain_summary) in enumerate(verdicts):
        summaries.append(StepSummary.of_plain(plain_summary))
        if kind != OK and rank != ranks.rank:
            texts.append(f"rank {rank}: {text}")
    summary = joined(summaries)

    if _is_late(verdicts):
        return Verdict(CollectTimeoutError("\n".join(texts), batch), summary)
    if len(texts) > 1:
        return Verdict(ScoringError("\n".join(texts), batch), summary)
    return Verdict(own.error, summary)


def _kind(error: ScoringError | None) -> str:
    if error is None:
        return OK
    return LATE if isinstance(error, CollectTimeoutError) else FAILED


def _is_late(verdicts: Sequence[Sequence[Any]]) -> bool:
    """Whether the step stays open, and all ranks collect it again."""
    return any(kind == LATE for kind, *_ in verdicts)
