"""Reads a rubric judge's reply: the score of each aspect, or that it does not apply; nothing is guessed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from workers.judges.thought import without_thought

LOWEST, HIGHEST = 1.0, 4.0
"""The rubric's scale; a score a little outside it counts as its nearest end."""

ANOTHER_SCALE = 4.5
"""A score above this is one on another scale, of 5, 10 or 100, and says nothing on ours."""

SCALE_FROM_0 = 0.5
"""A score below this is one on another scale too, that of [0, 1] for example."""

TITLES = {
    "text_faithfulness": r"text\s+faithfulness",
    "image_faithfulness": r"image\s+faithfulness",
    "physical_quality": r"physical\s+(?:and|&)\s+visual\s+quality",
    "text_rendering": r"text\s+rendering",
}
"""Aspect to the title of its section."""

NOT_APPLICABLE: Final = "N/A"

Score = float | Literal["N/A"]

_MARKS = r"[\s#*_>\-`•]*"
"""What may stand before a word that begins a line, or around it: bold, headings, quotes, list marks."""

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
"""What behind a number says that it is not the score: part of a word, another scale, a percentage, a range."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a reply says.

    Attributes:
        scores: By aspect, in [1, 4], or `N/A`; what the reply lacks is not in it.
        unclear: Aspects whose scores contradict each other.
        refined_request: How the judge would put the request; empty if it does not say.
        beyond: By aspect, the number on another scale that stands for its score.
    """

    scores: Mapping[str, Score]
    unclear: tuple[str, ...]
    refined_request: str
    beyond: Mapping[str, float] = field(default_factory=dict)


def read_judgement(text: str) -> Judgement:
    """The scores in a reply. The summary and what follows it are not looked at, nor a model's thinking."""
    text = without_thought(text)
    scores: dict[str, Score] = {}
    unclear: dict[str, None] = {}
    beyond: dict[str, float] = {}
    for aspect, values in _values(_judged_part(text)):
        for found in (n for n in map(_number, values) if n is not None):
            score = _on_scale(found)
            if scores.setdefault(aspect, score) != score:
                unclear[aspect] = None
            if (
                not isinstance(found, str)
                and not SCALE_FROM_0 <= found <= ANOTHER_SCALE
            ):
                beyond.setdefault(aspect, found)
    kept = {aspect: score for aspect, score in scores.items() if aspect not in unclear}
    return Judgement(kept, tuple(unclear), _refined_request(text), beyond)


def read_score(value: str) -> Score | None:
    """The score that stands behind `Score:`, clamped to [1, 4]; None if it is no one number on that scale."""
    found = _number(value)
    return None if found is None else _on_scale(found)


def mean_reward(
    scores: Mapping[str, float], weights: Mapping[str, float]
) -> float | None:
    """`(weighted mean - 1) / 3`, in [0, 1]; None if nothing has a weight."""
    total = math.fsum(weights.get(aspect, 1.0) for aspect in scores)
    if not total > 0.0:
        return None
    mean = (
        math.fsum(weights.get(aspect, 1.0) * score for aspect, score in scores.items())
        / total
    )
    return (mean - LOWEST) / (HIGHEST - LOWEST)


# --- private -------------------------------------------------------------------------------------


def _on_scale(found: Score) -> Score:
    return found if isinstance(found, str) else min(max(found, LOWEST), HIGHEST)


def _number(value: str) -> Score | None:
    """The one number that stands behind `Score:`, as it is, or that there is no score; None if it is neither."""
    if _NONE.match(value):
        return NOT_APPLICABLE
    found = _NUMBER.match(value)
    if found is None:
        return None
    of_four = _OF_FOUR.match(found["rest"])
    if _NO_SCORE.match(of_four["rest"] if of_four else found["rest"]):
        return None
    number = float(found["number"].replace(",", "."))
    return number if math.isfinite(number) else None


def _judged_part(text: str) -> str:
    """From the heading of the judgement, if there is one, to the summary."""
    heading = _JUDGEMENT.search(text)
    part = text[heading.end() :] if heading else text
    summary = _SUMMARY.search(part)
    return part[: summary.start()] if summary else part


def _values(text: str) -> Iterator[tuple[str, Sequence[str]]]:
    """Each section's aspect, and what stands behind its score labels (on the next line, if the label's is empty)."""
    aspect: str | None = None
    values: list[str] = []
    label_is_empty = False
    for line in text.splitlines():
        title = _TITLE.match(line)
        if title is not None:
            if aspect is not None:
                yield aspect, values
            aspect, values, label_is_empty = (
                next(a for a in TITLES if title[a]),
                [],
                False,
            )
            line = title["rest"].lstrip(":： ")
        label = _SCORE.search(line)
        if label is not None:
            label_is_empty = not label["value"].strip(" *_`")
            if not label_is_empty:
                values.append(label["value"])
        elif label_is_empty and line.strip():
            values.append(line)
            label_is_empty = False
    if aspect is not None:
        yield aspect, values


def _refined_request(text: str) -> str:
    found = list(_REFINED.finditer(text))
    return text[found[-1].end() :].strip() if found else ""
