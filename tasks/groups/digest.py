"""The digest of a group: its identity, under which its outcome lives."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def digest(member_keys: Sequence[str]) -> str:
    """40 hex digits of the members' keys in slot order; the script that seals a group (`slots`) makes the same."""
    return hashlib.sha1("".join(member_keys).encode()).hexdigest()
