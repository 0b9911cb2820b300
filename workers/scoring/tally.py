"""How many samples a worker process has scored since it last logged that, by reward."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from tasks.messages import Outcome


class Tally:
    """Counts outcomes that were written. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scored: Counter[str] = Counter()
        self._failed: dict[str, Counter[str]] = {}

    def count(self, reward: str, outcomes: Iterable[Outcome]) -> None:
        """Count the outcomes of samples for a reward."""
        with self._lock:
            for outcome in outcomes:
                if outcome.failure is None:
                    self._scored[reward] += 1
                else:
                    self._failed.setdefault(reward, Counter())[
                        outcome.failure.kind
                    ] += 1

    def take(self) -> str:
        """What was counted since the last call, as one line; empty if nothing was."""
        with self._lock:
            scored, self._scored = self._scored, Counter()
            failed, self._failed = self._failed, {}
        return "; ".join(
            _words(name, scored[name], failed.get(name))
            for name in dict.fromkeys((*scored, *failed))
        )


def _words(reward: str, num_scored: int, failed: Counter[str] | None) -> str:
    """`OCR 480 scored, 3 failed (2 invalid, 1 timeout)`."""
    words = f"{reward} {num_scored} scored"
    if not failed:
        return words
    if set(failed) == {"failed"}:
        return f"{words}, {failed.total()} failed"
    kinds = ", ".join(f"{num} {kind}" for kind, num in failed.most_common())
    return f"{words}, {failed.total()} failed ({kinds})"
