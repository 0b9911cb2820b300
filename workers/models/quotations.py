"""Which text a prompt quotes: the words between its first quotation marks, as a person would read these marks.

Double marks go before single ones wherever they are in the prompt, since a single mark may be an apostrophe:
`the 'old' sign "OPEN"` quotes OPEN. Of several quotations of one kind the first counts, as in Flow-GRPO.
"""

from __future__ import annotations

import re
import unicodedata

from workers.models.quotation_marks import (
    DOUBLE_MARKS,
    SINGLE_MARKS,
    SLOPPY_MARKS,
    with_plain_marks,
)

_NEST = frozenset("“«「『｢﹁﹃‹")
"""Marks that open and never close. Within a quotation such a mark opens an inner one, which ends before the outer."""

_ALSO_CLOSE = frozenset("”»’›")
"""Marks that open at the beginning of a word and close elsewhere."""

_APOSTROPHES = frozenset("'’‘`")

_SHORTENED = re.compile(
    r"\d\ds?\b|(tis|twas|twere|twill|til|till|em|cause|cos|coz|bout|round|neath|gainst|sup|kay)\b",
    re.IGNORECASE,
)
"""Years and words that begin with an apostrophe: '90s, 'tis, 'em."""

_AND = re.compile(
    r"(?<=[\w'’] )['‘’]n['’](?= \w)|(?<=[A-Z] )['‘’]N['’](?= [A-Z])|(?<=[a-z] )['‘’]N['’](?= [A-Z][a-z])"
)
"""The 'n' of rock 'n' roll: in lower case, which no quoted single letter has, or in the case of its neighbours."""

_DROPS_LETTERS = re.compile(r"\b([a-z]{2,}in|o|ol|lil|an|th|wi)\Z", re.IGNORECASE)
"""Words that end with an apostrophe: lickin', o', ol'."""


def quoted_text(prompt: str) -> str | None:
    """The text of the first quotation, None if there is none or it is blank.

    A mark behind a number is read as inches, feet or an apostrophe. Marks within a word, at the end of a plural
    (`the dogs' bowls`) and before a shortened word (`'90s`) are apostrophes. Marks may be escaped (`\\"`, `&quot;`),
    doubled (`""OPEN""`), those of TeX, or typed as several characters (`,,OPEN''`, `<<OPEN>>`). A quotation within a
    quotation is part of it.
    """
    text = with_plain_marks(prompt)
    found = _double(text)
    if found is None:
        found = _single(text)
    if found is None or not found.strip():
        return None
    return found.replace('\\"', '"')


# --- double marks --------------------------------------------------------------------------------


def _double(text: str) -> str | None:
    """The first quotation in double marks, None if there is none."""
    for at, mark in enumerate(text):
        if mark in DOUBLE_MARKS and _opens_double(text, at):
            end = _end(text, at, DOUBLE_MARKS[mark])
            if end is not None:
                return _inside(text, at, end)
    return None


def _opens_double(text: str, at: int) -> bool:
    mark, before, after = text[at], text[:at], text[at + 1 : at + 2]
    if mark in _ALSO_CLOSE:
        return not _joins(before[-1:]) and bool(after.strip())
    if mark != '"':
        return True
    if before.endswith("\\"):
        return False

    if _is_number(before[-1:]):  # inches, unless a script without spaces follows
        return after.isalpha() and not _joins(after)
    is_behind_a_number = before[-1:].isspace() and _is_number(before.rstrip()[-1:])
    return not is_behind_a_number or bool(after.strip())


def _end(text: str, start: int, closing: str) -> int | None:
    """Where the quotation that begins at `start` ends; None if it does not end."""
    mark, rest = text[start], text[start + 1 :]
    may_close = closing + SLOPPY_MARKS.get(mark, "")
    if not any(character in rest for character in may_close):
        return None

    end = _end_of_nested(text, start, closing)
    if end is not None:
        return end

    for at in range(start + 1, len(text)):
        if text[at] in may_close:
            is_of_another = mark == '"' and "“" in text[start:at]
            return None if is_of_another else at
    return None


def _end_of_nested(text: str, start: int, closing: str) -> int | None:
    """Where the right mark closes the quotation, behind the ends of the quotations within it."""
    mark = text[start]
    depth = 1
    for at in range(start + 1, len(text)):
        is_escaped = text[at] == '"' and text[at - 1] == "\\"
        if text[at] in closing and not is_escaped:
            depth -= 1
            if depth == 0:
                return at
        elif text[at] == mark and mark in _NEST:
            depth += 1
    return None


def _inside(text: str, start: int, end: int) -> str:
    """The text between two marks; French marks have a space on their inner sides."""
    inside = text[start + 1 : end]
    return inside.strip() if text[start] in "«»‹›" else inside


# --- single marks --------------------------------------------------------------------------------


def _single(text: str) -> str | None:
    """The first quotation in single marks, None if there is none."""
    without_and = _AND.sub("\0n\0", text)  # of the same length
    for at, mark in enumerate(without_and):
        if mark in SINGLE_MARKS and _opens_single(without_and, at):
            end = _end_of_single(without_and, at)
            if end is not None:
                return _inside(text, at, end)
    return None


def _opens_single(text: str, at: int) -> bool:
    """Whether a quotation can begin here: before a word, and not within one."""
    before, after = text[:at][-1:], text[at + 1 : at + 2]
    if _joins(before) or before in _APOSTROPHES:
        return False
    return bool(after.strip()) or text[at] == "‹"


def _end_of_single(text: str, start: int) -> int | None:
    """Where the quotation that begins at `start` ends; None if its mark is no quotation mark."""
    mark = text[start]
    if mark in "‹›❛":  # which are never apostrophes
        return _end(text, start, SINGLE_MARKS[mark])

    next_opening, ends = _possible_ends(text, start)
    if not ends:
        return None
    if _begins_shortened(text, start):
        is_last = next_opening == len(text)
        return _end_of_shortened(text, start, ends[0], is_last=is_last)
    return _end_among(text, start, ends)


def _possible_ends(text: str, start: int) -> tuple[int, list[int]]:
    """Where the next quotation begins, and where the one that begins at `start` can end before that."""
    mark = text[start]
    next_opening = _next_opening(text, start, may_be_shortened=False)
    ends = _ends_before(text, start, next_opening)
    if not ends and not _begins_shortened(text, start):  # 'Class of '99'
        next_opening = _next_opening(text, start, may_be_shortened=True)
        ends = _ends_before(text, start, next_opening)

    if mark == "`":  # `print('HI')`
        backticks = [at for at in ends if text[at] == "`"]
        ends = backticks or ends
    return next_opening, ends


def _end_of_shortened(text: str, start: int, end: int, *, is_last: bool) -> int | None:
    """The end of a quotation that begins with a shortened word, as `'til dawn'` does, unless its mark is an apostrophe.

    Args:
        is_last: No other quotation follows.
    """
    is_one_word = " " not in text[start:end]
    is_sure = is_last and not _may_be_apostrophe(text, end)
    is_quotation = (is_one_word or is_sure) and not _ends_a_plural(text, end)
    return end if is_quotation else None


def _end_among(text: str, start: int, ends: list[int]) -> int | None:
    """Which of the marks that can end a quotation does: the first, unless that may be an apostrophe."""
    first = ends[0]
    sure = [at for at in ends if not _may_be_apostrophe(text, at)]
    if text[start] == "’" and first not in sure:
        return None  # this mark opens rarely: without a sure end both are apostrophes
    if sure and (_ends_a_plural(text, first) or _drops_letters(text, first)):
        return sure[0]
    return first


def _next_opening(text: str, start: int, *, may_be_shortened: bool) -> int:
    """Where the next quotation begins, the length of the text if none does.

    Args:
        may_be_shortened: A mark before a shortened word is its apostrophe, and begins no quotation.
    """
    for at in range(start + 1, len(text)):
        if not _opens_another(text, start, at):
            continue
        is_apostrophe = may_be_shortened and _begins_shortened(text, at)
        if not is_apostrophe:
            return at
    return len(text)


def _ends_before(text: str, start: int, limit: int) -> list[int]:
    """Where the quotation that begins at `start` can end before `limit`."""
    closing = SINGLE_MARKS[text[start]]
    ends = []
    for at in range(start + 2, limit):
        if text[at] in closing and _closes_single(text, at):
            ends.append(at)
    return ends


def _opens_another(text: str, start: int, at: int) -> bool:
    """Whether the mark at `at` begins another quotation than the one at `start`, and does not end this one."""
    if text[at] != text[start] or text[at - 1] not in " \t\n([{":
        return False
    return _opens_single(text, at)


def _closes_single(text: str, at: int) -> bool:
    """Whether a quotation can end here: behind a word, and not within one."""
    return not text[at - 1].isspace() and not _joins(text[at + 1 : at + 2])


def _may_be_apostrophe(text: str, at: int) -> bool:
    """Whether the mark behind a word may be that of a plural, of dropped letters, or of feet."""
    if _is_number(text[at - 1]):
        return True
    return _ends_a_plural(text, at) or _drops_letters(text, at)


def _begins_shortened(text: str, at: int) -> bool:
    """Whether a shortened word follows the mark, which may be its apostrophe."""
    return _SHORTENED.match(text, at + 1) is not None


def _ends_a_plural(text: str, at: int) -> bool:
    """Whether the mark may be the apostrophe of `the dogs' bowls`."""
    return text[at - 1] in "sS" and _is_before_a_word(text, at)


def _drops_letters(text: str, at: int) -> bool:
    """Whether the mark may be the apostrophe of `finger lickin' good`."""
    if not _is_before_a_word(text, at):
        return False
    return _DROPS_LETTERS.search(text[:at]) is not None


def _is_before_a_word(text: str, at: int) -> bool:
    return text[at + 1 : at + 2] == " " and text[at + 2 : at + 3].isalpha()


# --- characters ----------------------------------------------------------------------------------


def _joins(character: str) -> bool:
    """Whether a mark beside this character is within a word; scripts without spaces do not join."""
    if not character.isalnum():
        return False
    return unicodedata.east_asian_width(character) not in ("W", "F")


def _is_number(character: str) -> bool:
    return character != "" and character in "0123456789¼½¾⅓⅔⅛⅜⅝⅞′"
