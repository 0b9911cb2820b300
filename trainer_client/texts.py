"""How texts are cut for logs and errors."""

from __future__ import annotations


def shorten(text: str, max_chars: int) -> str:
    """The first `max_chars` characters of a text, and `...` where it is longer."""
    return text if len(text) <= max_chars else f"{text[:max_chars]}..."


MAX_ERROR_CHARS = 500
"""Of the words of an error that somebody else's code raised."""


def words_of(error: BaseException) -> str:
    """Class and words of an error that somebody else's code raised, whose text may be long, or raise itself."""
    try:
        words = str(error)
    except Exception:  # an error of the user's, whose text cannot be made
        words = "(its text cannot be read)"
    name = type(error).__name__
    return f"{name}: {shorten(words, MAX_ERROR_CHARS)}" if words else name


def in_words(seconds: float) -> str:
    """A duration for people, from seconds to days: `12 s`, `5 min`, `2.5 h`."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "less than a second"
