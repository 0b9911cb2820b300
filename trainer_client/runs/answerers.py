"""Which code answered each reward: two within one run are said, since their rewards are no numbers of one scale."""

from __future__ import annotations

import logging
import threading

from tasks.messages import Outcome
from tasks.rewards import RewardSpec
from trainer_client.runs.known import Answerer, Run

log = logging.getLogger(__name__)


class Answerers:
    """The codes that answered the rewards of a client. Safe between threads; `compare` asks Redis."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._first: dict[str, Answerer] = {}
        """By fingerprint."""
        self._others: list[tuple[RewardSpec, Answerer]] = []
        """Not yet compared with what other clients of the run have seen."""
        self._said: set[tuple[str, str]] = set()
        """Fingerprint and code."""
        self._seen: set[tuple[str, str]] = set()

    def see(self, spec: RewardSpec, outcome: Outcome) -> None:
        """An outcome has arrived; of a group, that of any member tells."""
        origins = [
            one.origin for one in (outcome, *outcome.members) if "code" in one.origin
        ]
        if not origins:
            return
        answerer = Answerer(
            str(origins[0]["code"]),
            str(outcome.origin.get("worker", origins[0].get("worker", "?"))),
        )
        with self._lock:
            if (spec.fingerprint, answerer.code) in self._seen:
                return
            self._seen.add((spec.fingerprint, answerer.code))
            first = self._first.setdefault(spec.fingerprint, answerer)
            self._others.append((spec, answerer))
        self._compare(spec, first, answerer)

    def compare(self, run: Run) -> None:
        """Compare what was seen since the last time with the code that answered this run first, for any client."""
        with self._lock:
            others = list(self._others)
        for spec, answerer in others:
            self._compare(
                spec, run.first_answerer(spec.fingerprint, answerer), answerer
            )
        with self._lock:
            self._others = self._others[len(others) :]

    def _compare(self, spec: RewardSpec, first: Answerer, answerer: Answerer) -> None:
        if first.code == answerer.code:
            return
        with self._lock:
            if (spec.fingerprint, answerer.code) in self._said:
                return
            self._said.add((spec.fingerprint, answerer.code))
        log.warning(
            "reward %r was answered by two codes of %s in run %r: %s by %s, before that %s by %s; its class was "
            "edited, or differs between workers: put the same files on all, restart them, and raise its version; "
            "`rewardq clean --run %s --reward %s` drops what is there",
            spec.name, spec.reward_model, self._run, answerer.code, answerer.worker, first.code, first.worker,
            self._run, spec.name,
        )  # fmt: skip
