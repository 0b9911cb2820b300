"""The marks that people quote with, and a prompt in which each mark is one character."""

from __future__ import annotations

import html
import re

DOUBLE_MARKS = {
    '"': '"', "“": "”", "‟": "”", "„": "“”‟", "”": "”", "«": "»", "»": "«»", "「": "」", "『": "』", "｢": "｣",
    "﹁": "﹂", "﹃": "﹄", "〝": "〞〟", "❝": "❞",
}  # fmt: skip
"""By opening mark, the marks that close it. Some languages open with what closes in others, so `”` opens too."""

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

SLOPPY_MARKS = {'"': "”", "“": '"“', "‟": '"', "„": '"', "‘": "‘"}
"""By opening mark, what else people close with. It counts only if none of the right marks follows."""

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
"""Quotations whose marks are typed as several characters or as primes, and the marks that these stand for."""


def with_plain_marks(prompt: str) -> str:
    """The prompt with one character for each mark."""
    text = _unescaped(prompt).translate(_SAME_MARK).replace("\\'", "'")
    all_are_escaped = text.count('"') == text.count('\\"')
    if all_are_escaped:
        text = re.sub(r'\\+"', '"', text)

    for quotation, marks in _WRITTEN_AS_SEVERAL:
        text = quotation.sub(rf"{marks[0]}\1{marks[-1]}", text)
    return text


def _unescaped(prompt: str) -> str:
    """The content of a prompt that is still a field of a CSV file, a string of JSON, or HTML; else the prompt."""
    text = prompt.strip()
    is_quoted = len(text) > 2 and text[0] == text[-1] == '"'
    if is_quoted:
        inside = text[1:-1]
        for escaped in ('\\"', '""'):
            is_only_escaped = '"' not in inside.replace(escaped, "")
            if escaped in inside and is_only_escaped:
                return inside.replace(escaped, '"')
    return html.unescape(prompt) if _HTML_MARK.search(prompt) else prompt
