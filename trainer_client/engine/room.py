"""Room in the payload store: what may be stored now, within REWARDQ_MAX_STORE_BYTES of all clients."""

from __future__ import annotations

MEASURE_S = 0.2
"""How often the bytes in the store are asked for, while something is to be stored."""

STUCK_S = 5.0
"""A store that is full, and that nothing has left for so long, may be full of groups that lack members."""


class Room:
    """The bytes in the store, as they were measured last, and what this client has put there since.

    What other clients store between two measurements is not counted: the bound may be passed by that.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes: int | None = None
        self._last_measured = 0
        self._measured_at = self._left_at = 0.0
        self.is_measuring = False

    def is_due(self, now: float) -> bool:
        """Whether the store should be measured (again)."""
        return not self.is_measuring and now >= self.measure_at

    @property
    def measure_at(self) -> float:
        """When it should be measured again."""
        return 0.0 if self._num_bytes is None else self._measured_at + MEASURE_S

    def measured(self, num_bytes: int, now: float) -> None:
        """The store holds so many bytes of all clients."""
        if self._num_bytes is None or num_bytes < self._last_measured:
            self._left_at = now
        self._num_bytes = self._last_measured = num_bytes
        self._measured_at = now
        self.is_measuring = False

    def admit(self, num_bytes: int) -> bool:
        """Whether so many bytes may be stored, and if so count them.

        A single payload always fits into an empty store.
        """
        if self._num_bytes is None:
            return False
        if self._num_bytes and self._num_bytes + num_bytes > self._max_bytes:
            return False
        self._num_bytes += num_bytes
        return True

    def admit_anyway(self, num_bytes: int) -> None:
        """Count bytes that are stored although there is no room: the store waits for just these."""
        self._num_bytes = (self._num_bytes or 0) + num_bytes

    def is_stuck(self, now: float) -> bool:
        """Whether nothing has left a full store for long."""
        return self._num_bytes is not None and now >= self._left_at + STUCK_S

    @property
    def is_known(self) -> bool:
        """Whether it was ever measured."""
        return self._num_bytes is not None

    @property
    def words(self) -> str:
        """Why senders wait."""
        return (
            f"the payload store holds {self._num_bytes} bytes of all clients, REWARDQ_MAX_STORE_BYTES is "
            f"{self._max_bytes}; sending waits for workers to score what is there (what `async_reward: false` holds "
            "they score from collect() on)"
        )
