"""Tokens of a judge's reply as words, and which token is the first of the answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from workers.judges.thought import end_of_thought, has_thought

_SPACES = "\u0120\u010a\u0109\u010d"
"""How byte-level tokenizers write a space, a newline, a tab and a carriage return: G and C with marks."""

_NUMERO = "№º"
"""Signs that NFKC turns into letters: `№` would be a No, and so would `nº`."""

_SPECIAL = re.compile(
    r"\s*(?:<[|｜][^<>]*[|｜]>|</?(?:s|eos|bos|answer|response|end_of_turn)>|<0x0[9AD]>)\s*",
    re.IGNORECASE,
)
"""A token that is no text: a special one of the model, or a tag around its answer."""


def word_of(token: str) -> str:
    """The word in a token, case-folded, without the marks that tokenizers and markup put around a word.

    ` Yes`, `**Yes`, `Yes,`, `"Yes`, `ĠYes`, `▁yes` and the full-width form are `yes`. What stands within a word stays:
    `Yes/No` is another word than `Yes`. A token without a word is "".
    """
    if any(sign in token for sign in _NUMERO):
        return token
    text = unicodedata.normalize(
        "NFKC", token.removesuffix("</w>").lstrip(_SPACES).rstrip("\u0120\u010a")
    )
    start, end = 0, len(text)
    while start < end and _is_mark(text[start]):
        start += 1
    while start < end and _is_mark(text[end - 1]):
        end -= 1
    return text[start:end].casefold()


def answer_begins(tokens: Sequence[str], answer: str, is_thinking: bool) -> int | None:
    """The place of the answer's first token that is more than marks; None if the tokens do not cover the answer.

    Args:
        tokens: Those of the reply, or of a part of the reply that ends with the answer.
        answer: The text of the reply without the thought; not empty.
        is_thinking: Whether the server said that there was a thought.
    """
    start = _place_of_ending(tokens, answer)
    if start is None:
        text = "".join(tokens)
        is_thinking = is_thinking or has_thought(text)
        # without a thought the text and its tokens are only written differently
        start = _token_at(tokens, end_of_thought(text)) if is_thinking else 0
    if start is None:
        return None
    for place in range(start, len(tokens)):
        if word_of(tokens[place]) and not _SPECIAL.fullmatch(tokens[place]):
            return place
    return start


def end_with(tokens: Sequence[str], text: str) -> bool:
    """Whether a text is the last that the tokens say, white space aside."""
    return _letters("".join(tokens)).endswith(_letters(text))


# --- private -------------------------------------------------------------------------------------


def _is_mark(character: str) -> bool:
    """Whether a character is white space, punctuation, a symbol or invisible; a not sign is part of its word."""
    return character != "¬" and (
        unicodedata.category(character)[0] in "PSZC" or character == "\ufe0f"
    )


def _place_of_ending(tokens: Sequence[str], answer: str) -> int | None:
    """Where the tokens begin whose text is the whole answer and that end the reply; None if there are none."""
    wanted = _letters(answer)
    end = len(tokens)
    while end and (
        _SPECIAL.fullmatch(tokens[end - 1]) or not _letters(tokens[end - 1])
    ):
        end -= 1
    found = ""
    for place in range(end - 1, -1, -1):
        found = _letters(tokens[place]) + found
        if found == wanted:
            return place
        if len(found) > len(wanted):
            return None
    return None


def _letters(text: str) -> str:
    """A text without white space, however a tokenizer writes it."""
    return "".join(c for c in text if not c.isspace() and c not in _SPACES and c != "▁")


def _token_at(tokens: Sequence[str], offset: int) -> int | None:
    """The first token that begins at this place of the whole text or later; None for place 0, and behind the last."""
    if not offset:
        return None
    begins = 0
    for place, token in enumerate(tokens):
        if begins >= offset:
            return place
        begins += len(token)
    return None
