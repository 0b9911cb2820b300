"""Failures as people read them: equal reasons together, samples as ranges, the workers named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer_client.results import Failed

REASONS_SHOWN = 5
"""So many different reasons of a reward are written out."""

WORKERS_SHOWN = 3
RANGES_SHOWN = 8

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")

_OWN_NUMBER = re.compile(r"sample \d+: ")
"""How a reason of the trainer's own begins, where it names its sample."""


@dataclass(slots=True)
class Reason:
    """One reason, and the samples that it is the reason of."""

    kind: str
    words: str
    samples: list[int] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        what = f"{self.kind}{on_workers(self.workers)}" + (
            f": {self.words}" if self.words else ""
        )
        if len(self.samples) == 1:
            return f"sample {self.samples[0]}: {what}"
        return f"{len(self.samples)} x {what}: samples {ranges(self.samples)}"


def reasons_of(failures: Iterable[Failed]) -> list[Reason]:
    """The different reasons, the most frequent first; one that names its own sample is as any other's.

    Where they are more than are shown, those that differ in their numbers only (the range of each image) are one.
    """
    reasons = _equal_reasons(failures)
    if len(reasons) > REASONS_SHOWN:
        reasons = _alike_reasons(reasons)
    return sorted(reasons, key=lambda reason: -len(reason.samples))


def _equal_reasons(failures: Iterable[Failed]) -> list[Reason]:
    by_words: dict[tuple[str, str], Reason] = {}
    for failed in failures:
        words = (
            _OWN_NUMBER.sub("", failed.message, count=1)
            if _OWN_NUMBER.match(failed.message)
            else failed.message
        )
        reason = by_words.setdefault((failed.kind, words), Reason(failed.kind, words))
        reason.samples.append(failed.sample)
        if failed.worker and failed.worker not in reason.workers:
            reason.workers.append(failed.worker)
    return list(by_words.values())


def _alike_reasons(reasons: Sequence[Reason]) -> list[Reason]:
    by_words: dict[tuple[str, str], list[Reason]] = {}
    for reason in reasons:
        by_words.setdefault((reason.kind, _NUMBER.sub("0", reason.words)), []).append(
            reason
        )
    return [
        _merged(alike) if len(alike) > 1 else alike[0] for alike in by_words.values()
    ]


def _merged(alike: Sequence[Reason]) -> Reason:
    most = max(alike, key=lambda reason: len(reason.samples))
    return Reason(
        kind=most.kind,
        words=f"{most.words} (and with other numbers)",
        samples=[sample for reason in alike for sample in reason.samples],
        workers=list(
            dict.fromkeys(worker for reason in alike for worker in reason.workers)
        ),
    )


def describe(failures: Iterable[Failed], said: str | None = None) -> str:
    """The reasons of one reward's failures, in one line each of them but for those beyond `REASONS_SHOWN`.

    Args:
        said: A reason that the text says already; only its samples are given.
    """
    reasons = reasons_of(failures)
    for reason in reasons:
        reason.words = "" if reason.words == said else reason.words
    shown = "; ".join(map(str, reasons[:REASONS_SHOWN]))
    left = reasons[REASONS_SHOWN:]
    if not left:
        return shown
    num_samples = sum(len(reason.samples) for reason in left)
    return f"{shown}; and {len(left)} more reasons of {num_samples} samples"


def on_workers(workers: Sequence[str]) -> str:
    """` on gpu.7@host`, or nothing where no worker is known: then it is the trainer's own reason."""
    if not workers:
        return ""
    more = (
        f" and {len(workers) - WORKERS_SHOWN} more"
        if len(workers) > WORKERS_SHOWN
        else ""
    )
    return f" on {', '.join(workers[:WORKERS_SHOWN])}{more}"


def ranges(numbers: Sequence[int]) -> str:
    """`0-15, 18, 20-21`."""
    spans: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    shown = [
        str(first) if first == last else f"{first}-{last}"
        for first, last in spans[:RANGES_SHOWN]
    ]
    return ", ".join(shown) + (", ..." if len(spans) > RANGES_SHOWN else "")
