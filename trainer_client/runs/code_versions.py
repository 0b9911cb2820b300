"""Which code answered each reward of a run. Two versions are warned of: their rewards are not on one scale."""

from __future__ import annotations

import logging
import threading

from tasks.messages import Outcome
from tasks.rewards import RewardSpec
from trainer_client.runs.registry import CodeVersion, RunRegistry

log = logging.getLogger(__name__)


class CodeVersions:
    """The code versions that answered the rewards of a client. Safe between threads; `compare` asks Redis."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._first: dict[str, CodeVersion] = {}
        """By fingerprint."""
        self._uncompared: list[tuple[RewardSpec, CodeVersion]] = []
        """Not yet compared with what other clients of the run have seen."""
        self._warned: set[tuple[str, str]] = set()
        """Fingerprint and code."""
        self._seen: set[tuple[str, str]] = set()
        """Fingerprint and code."""

    def see(self, spec: RewardSpec, outcome: Outcome) -> None:
        """Take note of an outcome that has arrived."""
        found = _code_version_of(outcome)
        if found is None:
            return
        with self._lock:
            if (spec.fingerprint, found.code) in self._seen:
                return
            self._seen.add((spec.fingerprint, found.code))
            first = self._first.setdefault(spec.fingerprint, found)
            self._uncompared.append((spec, found))
        self._warn_unless_equal(spec, first, found)

    def compare(self, registry: RunRegistry) -> None:
        """Compare what was seen since the last call with the code that answered this run first, for any client."""
        with self._lock:
            uncompared = list(self._uncompared)
        for spec, found in uncompared:
            first = registry.first_code_version(spec.fingerprint, found)
            self._warn_unless_equal(spec, first, found)
        with self._lock:
            # Only now: if Redis went away meanwhile, they are compared next time.
            self._uncompared = self._uncompared[len(uncompared) :]

    def _warn_unless_equal(
        self, spec: RewardSpec, first: CodeVersion, found: CodeVersion
    ) -> None:
        if first.code == found.code:
            return
        with self._lock:
            if (spec.fingerprint, found.code) in self._warned:
                return
            self._warned.add((spec.fingerprint, found.code))
        log.warning(
            "reward %r was answered by two codes of %s in run %r: %s by %s, before that %s by %s; its class was "
            "edited, or differs between workers: put the same files on all, restart them, and raise its version; "
            "`rewardq clean --run %s --reward %s` drops what is there",
            spec.name, spec.reward_model, self._run, found.code, found.worker, first.code, first.worker,
            self._run, spec.name,
        )  # fmt: skip


def _code_version_of(outcome: Outcome) -> CodeVersion | None:
    """The code that answered; None where an outcome does not name it. All members of a group have the same code."""
    for part in (outcome, *outcome.members):
        if "code" in part.origin:
            worker = outcome.origin.get("worker", part.origin.get("worker", "?"))
            return CodeVersion(str(part.origin["code"]), str(worker))
    return None
