"""What every payload store can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class PayloadStore(Protocol):
    """Where payloads are. Safe between threads."""

    def identity(self) -> str:
        """The same text for every process that reaches the same store, and for no other store."""

    def put(self, payloads: Mapping[str, Any], ttl_s: float) -> None:
        """Store bytes-like payloads; each lives `ttl_s` from now. Storing the same key again is harmless."""

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        """The payloads in order, None where there is none."""

    def renew(self, names: Sequence[str], ttl_s: float) -> list[str]:
        """Let payloads live `ttl_s` from now; returns the names that are gone."""

    def free(self, names: Sequence[str]) -> None:
        """Drop payloads. A payload that is gone already is no error."""

    def bytes_in_use(self) -> int:
        """Payload bytes of all clients."""

    def check(self) -> None:
        """Raise unless the store can be reached and written to."""

    def close(self) -> None:
        """Give back connections."""
