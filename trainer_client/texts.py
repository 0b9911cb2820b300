"""How texts are cut for logs and errors."""

from __future__ import annotations


def shorten(text: str, max_chars: int) -> str:
    """The first `max_chars` characters of a text, and `...` where it is longer."""
    return text if len(text) <= max_chars else f"{text[:max_chars]}..."
