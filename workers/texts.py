"""Texts that others wrote (the user's code, libraries, servers), as this package passes them on."""

from __future__ import annotations


def cut(text: str, max_chars: int) -> str:
    """A text of at most `max_chars`: of a longer one the beginning, and how long the whole is. See `encodable`."""
    text = encodable(text)
    if len(text) <= max_chars:
        return text
    end = f"... ({len(text)} characters)"
    return text[: max_chars - len(end)] + end


def encodable(text: object) -> str:
    """The text of an object, each lone surrogate in it replaced: UTF-8 has none."""
    return str(text).encode("utf-8", "replace").decode()


def cut_middle(text: str, max_chars: int) -> str:
    """The beginning and the end of a text that is longer than `max_chars`."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}\n... ({len(text)} characters) ...\n{text[-half:]}"
