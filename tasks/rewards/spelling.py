"""Whether a word is a known word misspelt: stricter than `errors.nearest`, which helps where a word is wrong anyhow."""

from __future__ import annotations

from collections.abc import Iterable

LONG = 10
"""Words of so many letters may have two slips, shorter words one."""


def misspelt(
    word: str, known: Iterable[str], other_words: Iterable[str] = ()
) -> str | None:
    """The known word that `word` is a slip of, or None.

    A slip is another case or separator, or a letter that is missing, added, replaced or swapped with its neighbour. The
    first letter of a short word is right: `height` is no slip of `weight`.

    Args:
        word: Not a known one.
        known: What it may be meant for.
        other_words: Words that are close to a known one and mean something else.
    """
    if _plain(word) in map(_plain, other_words):
        return None
    for one in known:
        if _is_slip(_plain(word), _plain(one)):
            return one
    return None


def _plain(word: str) -> str:
    return word.strip().lower().replace("-", "").replace("_", "").replace(" ", "")


def _is_slip(word: str, meant: str) -> bool:
    if abs(len(word) - len(meant)) > 2:
        return False
    if len(meant) < LONG:
        return word[:1] == meant[:1] and _distance(word, meant) <= 1
    return _distance(word, meant) <= 2


def _distance(a: str, b: str) -> int:
    """Edits between two words, a swap of neighbours counting as one (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i in range(1, len(a) + 1):
        next_row = [i]
        for j in range(1, len(b) + 1):
            cost = 0 if a[i - 1] == b[j - 1] else 1
            best = min(row[j] + 1, next_row[j - 1] + 1, row[j - 1] + cost)
            is_swap = i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]
            next_row.append(min(best, before[j - 2] + 1) if is_swap else best)
        before, row = row, next_row
    return row[-1]
