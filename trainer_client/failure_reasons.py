"""Why a sample has no reward, as people read it: equal reasons together, samples as ranges, the workers named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tasks.errors import FailureKind

REASONS_SHOWN = 5
"""So many different reasons of a reward are written out; the others are counted."""

WORKERS_SHOWN = 3
RANGES_SHOWN = 8

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")

_OWN_SAMPLE = re.compile(r"sample \d+: ")
"""How a reason that the trainer gives begins where it names its sample."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Why one sample has no reward."""

    sample: int
    """Index in the batch."""
    reward: str
    """Name of the reward."""
    kind: FailureKind
    message: str
    attempts: int
    """How often it was tried, over all submits."""
    worker: str = ""
    """Name of the worker (`gpu.3211@host`) that reported it; empty where the trainer found it: unfit media, a
    deadline."""

    def __str__(self) -> str:
        where = on_workers([self.worker] if self.worker else [])
        return f"sample {self.sample}: {self.kind}{where}: {self.message}"


@dataclass(slots=True)
class Reason:
    """One reason, and the samples that failed for it."""

    kind: str
    words: str
    samples: list[int] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        what = f"{self.kind}{on_workers(self.workers)}"
        if self.words:
            what += f": {self.words}"
        if len(self.samples) == 1:
            return f"sample {self.samples[0]}: {what}"
        return f"{len(self.samples)} x {what}: samples {ranges(self.samples)}"


def reasons_of(failures: Iterable[Failed]) -> list[Reason]:
    """The different reasons, the most frequent first. The number of the failed sample makes no difference.

    If there are more than `REASONS_SHOWN`, reasons that differ only in their numbers (the range of each image) are one.
    """
    reasons = _equal_reasons(failures)
    if len(reasons) > REASONS_SHOWN:
        reasons = _alike_reasons(reasons)
    return sorted(reasons, key=lambda reason: -len(reason.samples))


def _equal_reasons(failures: Iterable[Failed]) -> list[Reason]:
    by_words: dict[tuple[str, str], Reason] = {}
    for failed in failures:
        named = _OWN_SAMPLE.match(failed.message)
        words = failed.message[named.end() :] if named else failed.message
        reason = by_words.setdefault((failed.kind, words), Reason(failed.kind, words))
        reason.samples.append(failed.sample)
        if failed.worker and failed.worker not in reason.workers:
            reason.workers.append(failed.worker)
    return list(by_words.values())


def _alike_reasons(reasons: Sequence[Reason]) -> list[Reason]:
    by_words: dict[tuple[str, str], list[Reason]] = {}
    for reason in reasons:
        without_numbers = _NUMBER.sub("0", reason.words)
        by_words.setdefault((reason.kind, without_numbers), []).append(reason)
    return list(map(_merged, by_words.values()))


def _merged(alike: Sequence[Reason]) -> Reason:
    if len(alike) == 1:
        return alike[0]
    most = max(alike, key=lambda reason: len(reason.samples))
    merged = Reason(most.kind, f"{most.words} (and with other numbers)")
    for reason in alike:
        merged.samples += reason.samples
        for worker in reason.workers:
            if worker not in merged.workers:
                merged.workers.append(worker)
    return merged


def describe(failures: Iterable[Failed], said: str | None = None) -> str:
    """The reasons of one reward's failures in one line; those beyond `REASONS_SHOWN` are counted.

    Args:
        said: A reason that the text around this line says already; only its samples are given.
    """
    reasons = reasons_of(failures)
    for reason in reasons:
        if reason.words == said:
            reason.words = ""

    shown = "; ".join(map(str, reasons[:REASONS_SHOWN]))
    left = reasons[REASONS_SHOWN:]
    if not left:
        return shown
    num_samples = sum(len(reason.samples) for reason in left)
    return f"{shown}; and {len(left)} more reasons of {num_samples} samples"


def on_workers(workers: Sequence[str]) -> str:
    """` on gpu.7@host`, or nothing where no worker is known: then the trainer itself gives the reason."""
    if not workers:
        return ""
    num_more = len(workers) - WORKERS_SHOWN
    more = f" and {num_more} more" if num_more > 0 else ""
    return f" on {', '.join(workers[:WORKERS_SHOWN])}{more}"


def ranges(numbers: Sequence[int]) -> str:
    """`0-15, 18, 20-21`."""
    spans: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))

    shown = []
    for first, last in spans[:RANGES_SHOWN]:
        shown.append(str(first) if first == last else f"{first}-{last}")
    if len(spans) > RANGES_SHOWN:
        shown.append("...")
    return ", ".join(shown)
