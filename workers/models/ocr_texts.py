"""Texts as OCR compares them: which text a sample asks for, how two texts differ, which characters can be read."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from workers.base import Unscored
from workers.models.quotations import quoted_text

_NEEDS = 'metadata["text"] needs text, a number, or a list of one of these'

_SAME_SIGN = (
    dict.fromkeys(map(ord, "’‘ʼ´`′"), "'")
    | dict.fromkeys(map(ord, "“”″"), '"')
    | dict.fromkeys(map(ord, "‐‒–—―−"), "-")
    | dict.fromkeys(map(ord, "⁄"), "/")
)
"""Typographic signs and the plain signs that they look like: a reader writes either of the two for the same drawing.
NFKC makes such signs of U+2011 and of ⅓."""

_EXACT = 1e15
"""A float below it has all digits of its whole part."""


def target_text(prompt: str, metadata: Mapping[str, Any]) -> str | None:
    """The one text asked for: `metadata["text"]`, else what the prompt quotes; None if there is neither.

    Raises:
        Unscored: The metadata has a value that is no text, or several texts.
    """
    texts = target_texts(prompt, metadata)
    if len(texts) > 1:
        raise Unscored(
            "invalid",
            f'metadata["text"] has {len(texts)} texts, and which counts is not said: give one text (all of them in '
            "reading order, say), or set several_texts: mean in the config",
        )
    return texts[0] if texts else None


def target_texts(prompt: str, metadata: Mapping[str, Any]) -> list[str]:
    """The texts asked for: those in `metadata["text"]`, else the one that the prompt quotes, else none.

    None, NaN and blank text count as no text, in a list too: tables have these values where a value is missing.

    Raises:
        Unscored: The metadata has a value that is no text.
    """
    given = metadata.get("text")
    values = given if isinstance(given, list | tuple) else [given]
    written = [_written(value) for value in values]
    texts = [text for text in written if comparable(text)]
    if texts:
        return texts

    quoted = quoted_text(prompt)
    return [quoted] if quoted is not None and comparable(quoted) else []


def comparable(text: str) -> str:
    """The characters that are compared: NFKC, case-folded, with plain signs, without white space and invisible ones."""
    # Signs are replaced before NFKC, which makes two characters of U+00B4 and of U+2033, and again after NFKC, which
    # makes typographic signs of other characters. Case folding may undo NFKC, so NFKC is applied again.
    plain = text.translate(_SAME_SIGN)
    folded = unicodedata.normalize("NFKC", plain).casefold()
    folded = unicodedata.normalize("NFKC", folded).translate(_SAME_SIGN)
    return "".join(c for c in folded if not c.isspace() and not _is_invisible(c))


def similarity(target: str, read: str) -> float:
    """`1 - min(d, n) / n` over the comparable characters of both; 1 if `read` contains `target`."""
    target, read = comparable(target), comparable(read)
    if target in read:
        return 1.0
    distance = Levenshtein.distance(target, read)
    return 1.0 - min(distance, len(target)) / len(target)


def unreadable(text: str, alphabet: Iterable[str]) -> list[str]:
    """The characters of `text`, each once, that no text in `alphabet` can be equal to.

    A character counts as written if its comparable form is, as a whole (½) or piece by piece (ﬁ).
    """
    written = {comparable(character) for character in alphabet}
    found: list[str] = []
    for character in unicodedata.normalize("NFC", text):
        folded = comparable(character)
        if folded not in written:
            found += [piece for piece in folded if piece not in written]
    return list(dict.fromkeys(found))


def scripts_of(characters: Sequence[str]) -> list[str]:
    """The scripts of the letters among the characters, each once, as Unicode names them: `CYRILLIC`, `HANGUL`."""
    scripts: dict[str, None] = {}
    for character in characters:
        name = unicodedata.name(character, "") if character.isalpha() else ""
        if name:
            scripts[name.partition(" ")[0]] = None
    return list(scripts)


def is_right_to_left(text: str) -> bool:
    """Whether a letter is of a script written from right to left."""
    return any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)


# --- private -------------------------------------------------------------------------------------


def _written(value: Any) -> str:
    """How a value of the metadata is written on an image; "" for a value that stands for no value.

    A whole float is written without its `.0`: tables turn integers into floats where a value is missing.

    Raises:
        Unscored: The value is no text and no number, or a number that is written in several ways.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unscored("invalid", f"{_NEEDS}; found {value!r:.80}")
    if isinstance(value, int):
        return str(value)
    return "" if math.isnan(value) else _written_float(value)


def _written_float(value: float) -> str:
    is_exact = abs(value) < _EXACT and "e" not in repr(value)
    if not is_exact:
        raise Unscored(
            "invalid",
            f"{_NEEDS}; found {value!r}, which is written in several ways: give it as text",
        )
    return str(int(value)) if value.is_integer() else repr(value)


def _is_invisible(character: str) -> bool:
    """Joiners, direction marks, soft hyphens, variation selectors: drawn as nothing."""
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"
