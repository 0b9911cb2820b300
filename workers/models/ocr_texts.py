"""Texts as OCR compares them: which text a sample asks for, how two texts differ, what a reader can write at all."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from workers.base import Unscored
from workers.models.quotations import quoted_text

_NEEDS = 'metadata["text"] needs text, a number, or a list of one of these'

_SAME_SIGN = {
    ord(sign): plain
    for plain, signs in {"'": "’‘ʼ´`′", '"': "“”″", "-": "‐‒–—―−", "/": "⁄"}.items()
    for sign in signs
}
"""Signs that are drawn as another is: readers write the plain one for it, or now one and now the other. U+2011 and ⅓
come to them under NFKC."""

_EXACT = 1e15
"""Floats below it have all digits of their whole part."""


def target_text(prompt: str, metadata: Mapping[str, Any]) -> str | None:
    """The one text asked for: `metadata["text"]`, else what the prompt quotes; None where there is none.

    Raises:
        Unscored: The metadata has something that is no text, or several texts.
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

    None, NaN and blank text are no text, in a list too, as tables have them where a value is missing.

    Raises:
        Unscored: The metadata has something that is no text.
    """
    given = metadata.get("text")
    entries = given if isinstance(given, list | tuple) else [given]
    written = [text for text in map(_written, entries) if comparable(text)]
    if written:
        return written
    quoted = quoted_text(prompt)
    return [quoted] if quoted is not None and comparable(quoted) else []


def comparable(text: str) -> str:
    """The characters that are compared: NFKC, case folded, typographic signs as the plain ones, without white space
    and what is never drawn."""
    plain = text.translate(
        _SAME_SIGN
    )  # before NFKC, which makes two of U+00B4 and U+2033
    folded = unicodedata.normalize(
        "NFKC", unicodedata.normalize("NFKC", plain).casefold()
    ).translate(_SAME_SIGN)
    return "".join(c for c in folded if not c.isspace() and not _is_invisible(c))


def similarity(target: str, read: str) -> float:
    """`1 - min(d, n) / n` over the comparable characters of both; 1 where `read` contains `target`."""
    target, read = comparable(target), comparable(read)
    if target in read:
        return 1.0
    return 1.0 - min(Levenshtein.distance(target, read), len(target)) / len(target)


def unreadable(text: str, alphabet: Iterable[str]) -> list[str]:
    """The characters of `text`, each once, that nothing written in `alphabet` is equal to: as a whole (½) or piece by
    piece (ﬁ)."""
    written = {comparable(character) for character in alphabet}
    found: list[str] = []
    for character in unicodedata.normalize("NFC", text):
        folded = comparable(character)
        if folded not in written:
            found += [c for c in folded if c not in written]
    return list(dict.fromkeys(found))


def scripts_of(characters: Sequence[str]) -> list[str]:
    """The scripts of letters by their names in Unicode: `CYRILLIC`, `HANGUL`, each once."""
    names = (unicodedata.name(c, "") for c in characters if c.isalpha())
    return list(dict.fromkeys(name.partition(" ")[0] for name in names if name))


def is_right_to_left(text: str) -> bool:
    """Whether a letter is of a script written from right to left."""
    return any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)


# --- private -------------------------------------------------------------------------------------


def _written(value: Any) -> str:
    """How a value of the metadata is written on an image; "" for one that stands for no value.

    A whole float is written without its `.0`: tables make floats of integers where a value is missing.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unscored("invalid", f"{_NEEDS}; found {value!r:.80}")
    if isinstance(value, int):
        return str(value)
    if not abs(value) < _EXACT or "e" in repr(value):
        raise Unscored(
            "invalid",
            f"{_NEEDS}; found {value!r}, which is written in several ways: give it as text",
        )
    return str(int(value)) if value.is_integer() else repr(value)


def _is_invisible(character: str) -> bool:
    """Joiners, direction marks, soft hyphens, variation selectors: drawn as nothing."""
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"
