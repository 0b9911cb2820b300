"""Reads a rubric judge's reply: for each aspect its score, or that the aspect does not apply; nothing is guessed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from workers.judges.long_runs import shortened
from workers.judges.thought import without_thought

LOWEST, HIGHEST = 1.0, 4.0
"""The rubric's scale; a score a little outside the scale counts as its nearest end."""

ANOTHER_SCALE = 4.5
"""A score above this is on another scale, of 5, 10 or 100, and says nothing on ours."""

SCALE_FROM_0 = 0.5
"""A score below this is on another scale too, that of [0, 1] for example."""

TITLES = {
    "text_faithfulness": r"text\s+faithfulness",
    "image_faithfulness": r"image\s+faithfulness",
    "physical_quality": r"physical\s+(?:and|&)\s+visual\s+quality",
    "text_rendering": r"text\s+rendering",
}
"""By aspect, a pattern of the title of its section."""

NOT_APPLICABLE: Final = "N/A"

Score = float | Literal["N/A"]

_MARKS = r"[\s#*_>\-`•]*"
"""Marks before the first word of a line, or around it: bold, headings, quotes, lists."""

_TITLE = re.compile(
    rf"^{_MARKS}(?:\(?\d+[.):]?\)?{_MARKS})?(?:aspect{_MARKS}\d*{_MARKS}:{_MARKS})?"
    rf"(?:{'|'.join(f'(?P<{aspect}>{title})' for aspect, title in TITLES.items())})"
    rf"{_MARKS}(?=$|[:：(\[]|score\b)(?P<rest>.*)$",
    re.IGNORECASE,
)
_SCORE = re.compile(
    rf"(?:^{_MARKS}|##{_MARKS})(?:final\s+)?score{_MARKS}(?:\([^)]*\){_MARKS})?[:：=]\s*(?P<value>.*)$",
    re.IGNORECASE,
)
_JUDGEMENT = re.compile(
    rf"^{_MARKS}detailed\s+judge?ment{_MARKS}[:：]?{_MARKS}$",
    re.IGNORECASE | re.MULTILINE,
)
_SUMMARY = re.compile(
    r"^\s*(?:#+[\s*_]*(?:summary|user\s+request\s+refinement)\b|[*_]+\s*summary\b|summary\s*[:：])",
    re.IGNORECASE | re.MULTILINE,
)
_REFINED = re.compile(
    rf"^{_MARKS}refined\s+request{_MARKS}[:：]{_MARKS}", re.IGNORECASE | re.MULTILINE
)

_AROUND = r"[\s*_`\[\](){}\"'~]*"
_NONE = re.compile(rf"^{_AROUND}(?:n\s*[/.]?\s*a\b|not\s+applicable\b)", re.IGNORECASE)
_NUMBER = re.compile(rf"^{_AROUND}(?P<number>[+-]?\d+(?:[.,]\d+)?)(?P<rest>.*)$")
_OF_FOUR = re.compile(
    rf"^{_AROUND}(?:/|out\s+of|of){_AROUND}4(?:[.,]0+)?(?![\d.,]*\d)(?P<rest>.*)$",
    re.IGNORECASE,
)
_NO_SCORE = re.compile(
    rf"^(?:\w|[.,]\d|{_AROUND}(?:[/%^]|\d|(?:points?|stars?)?\s*(?:out\s+of|of)\s*\d|"
    r"(?:[-–—~,&→=>:]+|\.\.+|to|or|and)\s*[\[(*_]*\d))",
    re.IGNORECASE,
)
"""What follows a number that is not the score: it is part of a word, on another scale, a percentage, a range."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a reply says.

    Attributes:
        scores: By aspect, in [1, 4], or `N/A`; without the aspects for which the reply has no score.
        unclear: Aspects whose scores contradict each other.
        refined_request: How the judge would word the request; empty if the reply does not say.
        beyond: By aspect, a number that the judge gave on another scale.
    """

    scores: Mapping[str, Score]
    unclear: tuple[str, ...]
    refined_request: str
    beyond: Mapping[str, float] = field(default_factory=dict)


def read_judgement(text: str) -> Judgement:
    """The scores in a reply. A model's thought, the summary and what follows the summary are left out."""
    text = shortened(without_thought(text))
    scores: dict[str, Score] = {}
    unclear: dict[str, None] = {}
    beyond: dict[str, float] = {}
    for aspect, value in _values(_judged_part(text)):
        found = _number(value)
        if found is None:
            continue
        score = _on_scale(found)
        if scores.setdefault(aspect, score) != score:
            unclear[aspect] = None
        if not isinstance(found, str) and not SCALE_FROM_0 <= found <= ANOTHER_SCALE:
            beyond.setdefault(aspect, found)

    for aspect in unclear:
        del scores[aspect]
    return Judgement(scores, tuple(unclear), _refined_request(text), beyond)


def read_score(value: str) -> Score | None:
    """The score behind `Score:`, clamped to [1, 4]; None unless it is a single number or `N/A`."""
    found = _number(value)
    return None if found is None else _on_scale(found)


def mean_reward(
    scores: Mapping[str, float], weights: Mapping[str, float]
) -> float | None:
    """`(weighted mean - 1) / 3`, in [0, 1]; None if no aspect has a weight. A weight is 1 unless given."""
    used = [weights.get(aspect, 1.0) for aspect in scores]
    total = math.fsum(used)
    if not total > 0.0:
        return None

    weighted = [
        weight * score for weight, score in zip(used, scores.values(), strict=True)
    ]
    mean = math.fsum(weighted) / total
    return (mean - LOWEST) / (HIGHEST - LOWEST)


# --- private -------------------------------------------------------------------------------------


def _on_scale(found: Score) -> Score:
    return found if isinstance(found, str) else min(max(found, LOWEST), HIGHEST)


def _number(value: str) -> Score | None:
    """The single number behind `Score:`, as it is, or `N/A`; None if the value is neither."""
    if _NONE.match(value):
        return NOT_APPLICABLE
    found = _NUMBER.match(value)
    if found is None:
        return None

    of_four = _OF_FOUR.match(found["rest"])
    behind = of_four["rest"] if of_four else found["rest"]
    if _NO_SCORE.match(behind):
        return None
    number = float(found["number"].replace(",", "."))
    return number if math.isfinite(number) else None


def _judged_part(text: str) -> str:
    """From the heading of the judgement, if there is one, to the summary."""
    heading = _JUDGEMENT.search(text)
    part = text[heading.end() :] if heading else text
    summary = _SUMMARY.search(part)
    return part[: summary.start()] if summary else part


def _values(text: str) -> Iterator[tuple[str, str]]:
    """The aspect of each score label, and the value behind the label, or on the next line if the label's line ends."""
    aspect: str | None = None
    label_is_empty = False
    for line in text.splitlines():
        title = _TITLE.match(line)
        if title is not None:
            aspect = _aspect_of(title)
            label_is_empty = False
            line = title["rest"].lstrip(":： ")

        value = ""
        label = _SCORE.search(line)
        if label is not None:
            label_is_empty = not label["value"].strip(" *_`")
            value = "" if label_is_empty else label["value"]
        elif label_is_empty and line.strip():
            label_is_empty = False
            value = line
        if aspect is not None and value:
            yield aspect, value


def _aspect_of(title: re.Match[str]) -> str:
    for aspect in TITLES:
        if title[aspect]:
            return aspect
    raise AssertionError("a title is that of an aspect")


def _refined_request(text: str) -> str:
    found = list(_REFINED.finditer(text))
    return text[found[-1].end() :].strip() if found else ""
