"""Which text a prompt quotes: the words between its first quotation marks, as a person would say where those are.

Double marks go before single ones wherever they stand, since a single one may be an apostrophe: `the 'old' sign
"OPEN"` quotes OPEN. Of several quotations of one kind the first counts, as in Flow-GRPO.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator

DOUBLE_MARKS = {
    '"': '"', "“": "”", "‟": "”", "„": "“”‟", "”": "”", "«": "»", "»": "«»", "「": "」", "『": "』", "｢": "｣",
    "﹁": "﹂", "﹃": "﹄", "〝": "〞〟", "❝": "❞",
}  # fmt: skip
"""Opening marks, and what closes each; of every language, also where it uses another's closing mark to open."""

SINGLE_MARKS = {
    "'": "'",
    "‘": "’'",
    "‚": "‘’",
    "’": "’",
    "‹": "›",
    "›": "‹›",
    "‛": "’'",
    "❛": "❜",
    "`": "`'",
}

_SLOPPY = {'"': "”", "“": '"“', "‟": '"', "„": '"', "‘": "‘"}
"""What else people close with, where the right mark does not come."""

_NEST = frozenset("“«「『｢﹁﹃‹")
"""Marks that open only: within a quotation they open another, whose end is not the end."""

_ALSO_CLOSE = frozenset("”»’›")
"""Marks that open only at the beginning of a word: elsewhere they close."""

_APOSTROPHES = frozenset("'’‘`")

_SHORTENED = re.compile(
    r"\d\ds?\b|(tis|twas|twere|twill|til|till|em|cause|cos|coz|bout|round|neath|gainst|sup|kay)\b",
    re.IGNORECASE,
)
"""Years and words that begin with an apostrophe: '90s, 'tis, 'em."""

_AND = re.compile(
    r"(?<=[\w'’] )['‘’]n['’](?= \w)|(?<=[A-Z] )['‘’]N['’](?= [A-Z])|(?<=[a-z] )['‘’]N['’](?= [A-Z][a-z])"
)
"""The 'n' of rock 'n' roll, in lower case as no quoted letter is, or in the case of its neighbours."""

_DROPS_LETTERS = re.compile(r"\b([a-z]{2,}in|o|ol|lil|an|th|wi)\Z", re.IGNORECASE)
"""Words that end with an apostrophe: lickin', o', ol'."""

_SAME_MARK = str.maketrans({"＂": '"', "＇": "'", "ʼ": "'", "´": "'"})

_HTML_MARK = re.compile(
    r"&(quot|apos|[lr][sd]quo|[bs]bquo|bdquo|[lr]aquo|#0*3[49]|#x0*2[27]|#0*82(16|17|20|21));",
    re.IGNORECASE,
)

_WRITTEN_AS_SEVERAL = (
    (re.compile(r'"""(?=\S)([^"]+)(?<=\S)"""'), '"'),
    (re.compile(r"'''(?=\S)([^']+)(?<=\S)'''"), '"'),
    (re.compile(r"(?<!`)`{2,3}(?=\S)([^`]+?)(?<=\S)(?:`{2,3}|'')", re.DOTALL), '"'),
    (re.compile(r"(?<!')''(?=\S)([^']+?)(?<=\S)''(?!')"), '"'),
    (re.compile(r'(?<!")""(?=[^\s"])([^"]*[^\s"])""(?!")'), '"'),
    (re.compile(r"‘‘(?=\S)([^‘]+?)(?<=\S)’’"), '"'),
    (re.compile(r"(?<![,\w]),,(?=[^\s,])((?:(?!,,)[^\"“”])+?)(?:''|``|[\"“”])"), '"'),
    (re.compile(r"(?<![\d′])[″ʺ](?=\S)([^″ʺ]+)[″ʺ]"), '"'),
    (re.compile(r"(?<!<)<<\s*([^<>]+?)\s*>>(?!>)"), "«»"),
)
"""Quotations whose marks are typed as several characters, or as primes, and the marks they stand for."""


def quoted_text(prompt: str) -> str | None:
    """The text of the first quotation, None where there is none or it is blank.

    A mark after a number is inches, feet or an apostrophe, and so is one within a word, at the end of a plural
    (`the dogs' bowls`) and before a shortened word (`'90s`). Marks may be escaped (`\\"`, `&quot;`), doubled
    (`""OPEN""`), those of TeX, or typed as several characters (`,,OPEN''`, `<<OPEN>>`); a quotation within a quotation
    is part of it.
    """
    text = _plain_marks(prompt)
    for quotation in (*_double(text), *_single(text)):
        found = quotation.replace('\\"', '"')
        return found if found.strip() else None
    return None


def _plain_marks(prompt: str) -> str:
    """The prompt with one character for each mark."""
    text = _unescaped(prompt).translate(_SAME_MARK).replace("\\'", "'")
    if text.count('"') == text.count('\\"'):
        text = re.sub(r'\\+"', '"', text)
    for quotation, marks in _WRITTEN_AS_SEVERAL:
        text = quotation.sub(rf"{marks[0]}\1{marks[-1]}", text)
    return text


def _unescaped(prompt: str) -> str:
    """The prompt itself, of one that still is a field of a CSV file, a string of JSON, or HTML."""
    text = prompt.strip()
    if len(text) > 2 and text[0] == text[-1] == '"':
        inside = text[1:-1]
        for escaped in ('\\"', '""'):
            if escaped in inside and '"' not in inside.replace(escaped, ""):
                return inside.replace(escaped, '"')
    return html.unescape(prompt) if _HTML_MARK.search(prompt) else prompt


# --- double marks --------------------------------------------------------------------------------


def _double(text: str) -> Iterator[str]:
    """The first quotation in double marks."""
    for at, mark in enumerate(text):
        if mark in DOUBLE_MARKS and _opens_double(text, at):
            end = _end(text, at, DOUBLE_MARKS[mark])
            if end is not None:
                yield _inside(text, at, end)
                return


def _opens_double(text: str, at: int) -> bool:
    mark, before, after = text[at], text[:at], text[at + 1 : at + 2]
    if mark in _ALSO_CLOSE:
        return not _joins(before[-1:]) and bool(after.strip())
    if mark != '"':
        return True
    if before.endswith("\\"):
        return False
    if _is_number(before[-1:]):  # inches, unless a script without spaces goes on
        return after.isalpha() and not _joins(after)
    return not (
        _is_number(before.rstrip()[-1:]) and before[-1:].isspace() and not after.strip()
    )


def _end(text: str, start: int, closing: str) -> int | None:
    """Where the quotation that begins at `start` ends."""
    mark = text[start]
    if not any(
        character in text[start + 1 :] for character in closing + _SLOPPY.get(mark, "")
    ):
        return None
    depth = 1
    for at in range(start + 1, len(text)):
        if text[at] in closing and not (text[at] == '"' and text[at - 1] == "\\"):
            depth -= 1
            if depth == 0:
                return at
        elif text[at] == mark and mark in _NEST:
            depth += 1
    ends = [
        at
        for at in range(start + 1, len(text))
        if text[at] in closing + _SLOPPY.get(mark, "")
    ]
    if not ends or (
        mark == '"' and "“" in text[start : ends[0]]
    ):  # the end is another quotation's
        return None
    return ends[0]


def _inside(text: str, start: int, end: int) -> str:
    """What is between two marks; French ones have a space on their inner sides."""
    inside = text[start + 1 : end]
    return inside.strip() if text[start] in "«»‹›" else inside


# --- single marks --------------------------------------------------------------------------------


def _single(text: str) -> Iterator[str]:
    """The first quotation in single marks."""
    whole, text = text, _AND.sub("\0n\0", text)
    for at, mark in enumerate(text):
        if mark in SINGLE_MARKS and _opens_single(text, at):
            end = (
                _end(text, at, SINGLE_MARKS[mark])
                if mark in "‹›❛"
                else _end_of_word(text, at, SINGLE_MARKS[mark])
            )
            if end is not None:
                yield _inside(whole, at, end)
                return


def _opens_single(text: str, at: int) -> bool:
    """Whether a quotation can begin here: before a word, and not within one."""
    before, after = text[:at][-1:], text[at + 1 : at + 2]
    return (
        not _joins(before)
        and before not in _APOSTROPHES
        and (bool(after.strip()) or text[at] == "‹")
    )


def _end_of_word(text: str, start: int, closing: str) -> int | None:
    """Where a quotation ends whose marks may be apostrophes as well."""
    next_opening, ends = _ends_before_another(
        text, start, closing, may_be_shortened=False
    )
    if not ends and not _SHORTENED.match(text, start + 1):  # 'Class of '99'
        next_opening, ends = _ends_before_another(
            text, start, closing, may_be_shortened=True
        )
    ends = [
        at for at in ends if text[at] == text[start] == "`"
    ] or ends  # `print('HI')`
    if not ends:
        return None
    first, sure = ends[0], [at for at in ends if not _may_be_apostrophe(text, at)]
    if _SHORTENED.match(text, start + 1):  # its mark may be an apostrophe
        is_one_word = " " not in text[start:first]
        is_whole = is_one_word or (next_opening == len(text) and first in sure)
        return first if is_whole and not _ends_a_plural(text, first) else None
    if text[start] == "’" and first not in sure:
        return None
    return (
        sure[0]
        if sure and (_ends_a_plural(text, first) or _drops_letters(text, first))
        else first
    )


def _ends_before_another(
    text: str, start: int, closing: str, *, may_be_shortened: bool
) -> tuple[int, list[int]]:
    """Where the next quotation begins, and where before it this one can end.

    Args:
        may_be_shortened: A mark before a shortened word is its apostrophe, and begins no quotation.
    """
    others = (
        at for at in range(start + 1, len(text)) if _opens_another(text, start, at)
    )
    if may_be_shortened:
        others = (at for at in others if not _SHORTENED.match(text, at + 1))
    next_opening = next(others, len(text))
    return next_opening, [
        at
        for at in range(start + 2, next_opening)
        if text[at] in closing and _closes_single(text, at)
    ]


def _opens_another(text: str, start: int, at: int) -> bool:
    """Whether the mark at `at` begins another quotation than the one at `start`, and does not end this one."""
    return (
        text[at] == text[start]
        and text[at - 1] in " \t\n([{"
        and _opens_single(text, at)
    )


def _closes_single(text: str, at: int) -> bool:
    """Whether a quotation can end here: behind a word, and not within one."""
    return not text[at - 1].isspace() and not _joins(text[at + 1 : at + 2])


def _may_be_apostrophe(text: str, at: int) -> bool:
    """Whether the mark behind a word may be of a plural, of dropped letters, or of feet."""
    return (
        _ends_a_plural(text, at) or _drops_letters(text, at) or _is_number(text[at - 1])
    )


def _ends_a_plural(text: str, at: int) -> bool:
    """Whether the mark may be the apostrophe of `the dogs' bowls`."""
    return (
        text[at - 1] in "sS"
        and text[at + 1 : at + 2] == " "
        and text[at + 2 : at + 3].isalpha()
    )


def _drops_letters(text: str, at: int) -> bool:
    """Whether the mark may be the apostrophe of `finger lickin' good`."""
    return (
        text[at + 1 : at + 2] == " "
        and text[at + 2 : at + 3].isalpha()
        and _DROPS_LETTERS.search(text[:at]) is not None
    )


# --- characters ----------------------------------------------------------------------------------


def _joins(character: str) -> bool:
    """Whether a mark beside it would be within a word; scripts without spaces do not join."""
    return character.isalnum() and unicodedata.east_asian_width(character) not in (
        "W",
        "F",
    )


def _is_number(character: str) -> bool:
    return character != "" and character in "0123456789¼½¾⅓⅔⅛⅜⅝⅞′"
