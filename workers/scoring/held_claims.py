"""The claims that the tasks of a worker process hold, and how often they are extended."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from tasks.outcomes import WorkerOutcomes

EXTENSIONS_A_TTL = 4
"""How many times a claim is extended within its life, so that it survives a few lost packets. A worker's heartbeat is
written as often."""


class HeldClaims:
    """Claims by address, each with the token of the task that holds it. Safe between threads.

    A claim expires on Redis unless `extend` is called within its life; `workers.process.heartbeat` has a thread that
    does.
    """

    def __init__(self, outcomes: WorkerOutcomes) -> None:
        self._outcomes = outcomes
        self._lock = threading.Lock()
        self._extending = threading.Lock()
        self._tokens: dict[str, str] = {}

    def hold(self, addresses: Iterable[str], token: str) -> None:
        """Extend these claims from now on, until they are dropped."""
        with self._lock:
            self._tokens.update(dict.fromkeys(addresses, token))

    def drop(self, addresses: Iterable[str], token: str | None = None) -> None:
        """Extend these claims no longer; with a token only those that another task has not claimed since.

        No extension of them is under way when this returns, so that a claim that is released after it stays free.
        """
        with self._extending, self._lock:
            for address in addresses:
                if token in (None, self._tokens.get(address)):
                    self._tokens.pop(address, None)

    @property
    def tokens(self) -> dict[str, str]:
        """The token of each held claim, by address."""
        with self._lock:
            return dict(self._tokens)

    def extend(self) -> None:
        """Extend the life of every held claim on Redis."""
        with self._extending:
            self._outcomes.extend(self.tokens)

    def release_all(self) -> None:
        """Give every held claim back for others, when the process ends with tasks unfinished."""
        held = self.tokens
        for token in dict.fromkeys(held.values()):
            addresses = [address for address, by in held.items() if by == token]
            self.drop(addresses, token)
            self._outcomes.release(addresses, token)
