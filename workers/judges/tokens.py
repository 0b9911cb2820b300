"""Tokens of a judge's reply as words, and which token is the first of the answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from workers.judges.thought import end_of_thought, has_thought

_SPACES = "\u0120\u010a\u0109\u010d"
"""How byte-level tokenizers write a space, a newline, a tab and a carriage return: as G and C with accents."""

_NUMERO = "№º"
"""Signs that NFKC turns into letters: `№` would become `No`, and so would `nº`."""

_SPECIAL = re.compile(
    r"\s*(?:<[|｜][^<>]*[|｜]>|</?(?:s|eos|bos|answer|response|end_of_turn)>|<0x0[9AD]>)\s*",
    re.IGNORECASE,
)
"""A token that is no text: a special token of the model, or a tag around its answer."""


def word_of(token: str) -> str:
    """The word in a token, case-folded, without the marks that tokenizers and markup put around a word.

    ` Yes`, `**Yes`, `Yes,`, `"Yes`, `ĠYes`, `▁yes` and the full-width form are `yes`. Marks within a word stay, so
    `Yes/No` is another word than `Yes`. A token without a word is "".
    """
    if any(sign in token for sign in _NUMERO):
        return token

    bare = token.removesuffix("</w>").lstrip(_SPACES).rstrip("\u0120\u010a")
    text = unicodedata.normalize("NFKC", bare)
    start, end = 0, len(text)
    while start < end and _is_mark(text[start]):
        start += 1
    while start < end and _is_mark(text[end - 1]):
        end -= 1
    return text[start:end].casefold()


def answer_begins(tokens: Sequence[str], answer: str, is_thinking: bool) -> int | None:
    """The index of the answer's first token that is more than marks; None if the tokens do not cover the answer.

    Args:
        tokens: The tokens of the reply, or of a part of the reply that ends with the answer.
        answer: The text of the reply without the thought; not empty.
        is_thinking: Whether the server said that there was a thought.
    """
    start = _start_of_ending(tokens, answer)
    if start is None:
        text = "".join(tokens)
        is_thinking = is_thinking or has_thought(text)
        # without a thought the tokens are the answer, only written otherwise than the text
        start = _token_at(tokens, end_of_thought(text)) if is_thinking else 0
    if start is None:
        return None

    for i in range(start, len(tokens)):
        if word_of(tokens[i]) and not _SPECIAL.fullmatch(tokens[i]):
            return i
    return start


def end_with(tokens: Sequence[str], text: str) -> bool:
    """Whether the text of the tokens ends with a text, white space aside."""
    return _letters("".join(tokens)).endswith(_letters(text))


# --- private -------------------------------------------------------------------------------------


def _is_mark(character: str) -> bool:
    """Whether a character is white space, punctuation, a symbol or invisible; a not sign is part of its word."""
    if character == "¬":
        return False
    return unicodedata.category(character)[0] in "PSZC" or character == "\ufe0f"


def _start_of_ending(tokens: Sequence[str], answer: str) -> int | None:
    """The index of the first of the last tokens whose text together is the answer; None if there are no such tokens."""
    end = len(tokens)
    while end and _is_empty(tokens[end - 1]):
        end -= 1

    wanted = _letters(answer)
    found = ""
    for i in range(end - 1, -1, -1):
        found = _letters(tokens[i]) + found
        if found == wanted:
            return i
        if len(found) > len(wanted):
            return None
    return None


def _is_empty(token: str) -> bool:
    """Whether a token adds nothing to the text: a special token, or white space."""
    return _SPECIAL.fullmatch(token) is not None or not _letters(token)


def _letters(text: str) -> str:
    """A text without white space, however a tokenizer writes it."""
    return "".join(c for c in text if not c.isspace() and c not in _SPACES and c != "▁")


def _token_at(tokens: Sequence[str], offset: int) -> int | None:
    """The index of the first token that begins at this offset of the text or later; None if none does or it is 0."""
    if not offset:
        return None
    begins = 0
    for i, token in enumerate(tokens):
        if begins >= offset:
            return i
        begins += len(token)
    return None
