"""Addresses of outcomes, and the Redis keys that belong to an address."""

from __future__ import annotations

from collections.abc import Iterable

from tasks import keys


def address(run: str, fingerprint: str, key: str) -> str:
    """Where the outcome of a sample for a reward lives."""
    return f"{run}:{fingerprint}:{key}"


def key_of(address: str) -> str:
    """The sample's or group's key in an address."""
    return address.rpartition(":")[2]


def redis_keys_of(addresses: Iterable[str]) -> list[str]:
    """Outcome, claim and starts of each address, as the scripts expect their KEYS."""
    found: list[str] = []
    for one in addresses:
        found += (keys.outcome(one), keys.claim(one), keys.starts(one))
    return found
