"""Where a judge's thought ends and its answer begins, by the marks that current models put around a thought."""

from __future__ import annotations

import re

HINT = "a thinking model? extra_body: {chat_template_kwargs: {enable_thinking: false}} turns its thinking off"
"""What to do about a judge that thinks before it answers. vLLM and SGLang pass the field on to the chat template."""

_NAMES = r"(?:think(?:ing)?|thoughts?|reasoning|reflection|scratchpad)"

_OPENS = re.compile(
    "|".join(
        (
            rf"<(?:[\w-]+:)?{_NAMES}(?:\s+[\w-]+\s*=[^<>]*)?\s*>",  # Qwen, DeepSeek, <seed:think>, EXAONE's <thought>
            r"\[think(?:ing)?\]",  # Magistral
            r"◁think(?:ing)?▷",  # Kimi-VL
            rf"<[|｜](?:(?:start|begin)[_▁]?(?:of[_▁])?)?{_NAMES}[|｜]>",  # Command A, OpenThinker
            r"<\|channel\|>\s*(?:analysis|commentary)",  # gpt-oss
            r"<\|channel>\s*thought",  # Gemma
            r"<unused94>",  # MedGemma
        )
    ),
    re.IGNORECASE,
)
_CLOSES = re.compile(
    "|".join(
        (
            rf"</\s*(?:[\w-]+:)?{_NAMES}\s*>",
            r"\[/think(?:ing)?\]",
            r"◁/think(?:ing)?▷",
            rf"<[|｜](?:end[_▁]?(?:of[_▁])?|/){_NAMES}[|｜]>",
            r"<\|channel\|>\s*final[^<]*<\|message\|>",
            r"<channel\|>",
            r"<unused95>",
        )
    ),
    re.IGNORECASE,
)

_IN_WORDS = (
    (
        re.compile(r"^\s*analysis(?=[A-Z])"),
        re.compile(r"assistant\s*final"),
    ),  # gpt-oss without its special tokens
    (
        re.compile(r"^\s*here is my thought process:", re.I),
        re.compile(r"^\s*here is my response:", re.I | re.M),
    ),
)
"""First words of a thought, and words that end it. In a text that begins with other words they mean nothing."""

_MARKS = (
    "<think",
    "<thought",
    "<reasoning",
    "<seed:think",
    "<|channel|>",
    "<|channel>",
    "<|start",
    "<|think",
    "[think",
    "◁think",
)
"""How the marks of a thought begin, for a first token that has only a part of a mark."""

_BEGINNINGS = frozenset(
    (
        "so",
        "okay",
        "ok",
        "got",
        "let",
        "first",
        "alright",
        "hmm",
        "we",
        "wait",
        "thinking",
        "thought",
        "analysis",
    )
)
"""First words of a thought whose opening mark is in the prompt."""


def without_thought(text: str) -> str:
    """The answer in a reply: the text from the last end of a thought to the next thought, without outer white space.

    A thought may lack its beginning, which is in the prompt of some models, or its end, if the reply was cut. The
    answer is empty if the reply is all thought.
    """
    for opens, closes in _IN_WORDS:
        if opens.match(text):
            end = _end_of_last(closes, text)
            text = text[end:] if end else ""

    text = text[_end_of_last(_CLOSES, text) :]
    begins = _OPENS.search(text)
    return (text[: begins.start()] if begins else text).strip()


def end_of_thought(text: str) -> int:
    """How many characters of a text the thought takes, its last mark included; 0 if no thought ends in the text."""
    end = _end_of_last(_CLOSES, text)
    for opens, closes in _IN_WORDS:
        if opens.match(text):
            end = max(end, _end_of_last(closes, text))
    return end


def has_thought(text: str) -> bool:
    """Whether a thought begins or ends in a text."""
    if _OPENS.search(text) or _CLOSES.search(text):
        return True
    return any(opens.match(text) for opens, _ in _IN_WORDS)


def looks_like_thought(token: str) -> bool:
    """Whether a reply that begins with this token looks like one that begins with a thought."""
    bare = token.strip(" \t\r\n\u0120\u010a▁*,.:'\"“")
    word = bare.casefold()
    is_part_of_mark = bare != "" and any(mark.startswith(word) for mark in _MARKS)
    return has_thought(bare) or is_part_of_mark or word in _BEGINNINGS


# --- private -------------------------------------------------------------------------------------


def _end_of_last(pattern: re.Pattern[str], text: str) -> int:
    end = 0
    for found in pattern.finditer(text):
        end = found.end()
    return end
