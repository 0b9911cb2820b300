"""Hashes of plain data, equal on every host: identities of rewards and of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgpack


def hash_of(parts: list[Any], num_digits: int) -> str:
    """The first hex digits of the SHA-256 of the parts' msgpack bytes."""
    return hashlib.sha256(msgpack.packb(parts)).hexdigest()[:num_digits]


def canonical(value: Any) -> Any:
    """`value` with its mappings in the order of their keys, so that equal content gives equal bytes."""
    if isinstance(value, Mapping):
        return {key: canonical(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return value
