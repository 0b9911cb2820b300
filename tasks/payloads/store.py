"""What every payload store can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Data = bytes | bytearray
"""The bytes of a payload; a bytearray where it was put into its place part by part."""


class PayloadStore(Protocol):
    """Where payloads are. Safe between threads."""

    def identity(self) -> str:
        """The same text for every process that reaches the same store, and for no other store."""

    def put(self, payloads: Mapping[str, Any], ttl_s: float) -> None:
        """Store bytes-like payloads; each lives `ttl_s` from now. Storing the same key again is harmless."""

    def get(self, names: Sequence[str]) -> list[Data | None]:
        """The payloads in order, None where there is none, or where a part of one is missing."""

    def renew(self, names: Sequence[str], ttl_s: float) -> list[str]:
        """Let payloads live `ttl_s` from now; returns the names that are gone."""

    def free(self, names: Sequence[str]) -> None:
        """Drop payloads. A payload that is gone already is no error."""

    def bytes_in_use(self) -> int:
        """Payload bytes of all clients."""

    def bytes_by_run(self) -> dict[str, int]:
        """Payload bytes by run, of all clients; those of names that do not say their run are under an empty text."""

    def value_bytes(self) -> int:
        """Bytes of the largest value that the store takes. A larger payload has a name of `name_in_parts`."""

    def capacity_bytes(self) -> int | None:
        """Bytes that the store can hold when it is empty; None if it knows no bound."""

    def check(self) -> None:
        """Raise unless the store can be reached and written to."""

    def close(self) -> None:
        """Give back connections."""
