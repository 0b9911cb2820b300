"""A judge that compares images of one prompt two at a time, in both orders; see `tasks.groups` for who meets whom."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from tasks.errors import BusyError
from workers import deadline
from workers.base import (
    Accelerator,
    Inputs,
    RewardArguments,
    RewardModelOutput,
    Unscored,
)
from workers.judges import rubrics
from workers.judges.images import evenly_spaced
from workers.judges.inner_errors import cut
from workers.judges.judge import Judge
from workers.judges.long_runs import shortened
from workers.judges.rational import rubric_of
from workers.judges.reply import Reply
from workers.judges.template import Template

Verdict = Literal["first", "second", "tie"]
Answered = Reply | Unscored | BusyError

WIN, TIE, LOSS = 1.0, 0.5, 0.0

_VERDICT = re.compile(
    r"^[\s#*_>\-`]*(?:final\s+)?verdict[\s*_`]*[:：][\s*_`\[\](\"']*(?:the\s+)?(?P<verdict>first|second|tie)\b(?P<rest>.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_SEVERAL = re.compile(
    r"^\W*(?:or|/|\||,)\W*(?:the\s+)?(?:first|second|tie)", re.IGNORECASE
)
"""What follows a verdict that only repeats the form of the answer: `first / second / tie`."""

_SENTENCE_ENDS = re.compile(
    r"[.;(\n]|,(?!\W*(?:the\s+)?(?:first|second|tie)\b)|\s[-–—]+\s|\bbecause\b|\bsince\b|\bas\b"
)
"""Where the words of a verdict end and its reasons begin."""

_OTHERS = re.compile(r"\b(?:first|second|tie)\b", re.IGNORECASE)
_BETTER = re.compile(
    r"\b(?:better|beats|wins|superior|preferred|preferable|stronger)\b|>", re.IGNORECASE
)
_AGAINST = re.compile(
    r"\b(?:no|not|never|neither|nor|nobody|worse|inferior|weaker|loses|lost|loser|less|equal|equally|same|both|draw|"
    r"breaks?|breaker)\b|n['’]t\b|[?=<≈]",
    re.IGNORECASE,
)
"""What follows a verdict that the judge takes back: `first is worse`, `first = second`, `tie-breaker`."""

_AGAINST_TIE = re.compile(r"\b(?:no|not|breaks?|breaker)\b|n['’]t\b|\?", re.IGNORECASE)
"""The same behind the verdict `tie`, which may name both members."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a judge says of two members.

    Attributes:
        points: The points of the first member: 1 for a win, 0.5 for a tie, 0 for a loss; None if the judge abstains.
        reason: Why the judge abstains.
        info: The judge's words, in both orders.
    """

    points: float | None
    reason: Unscored | None = None
    info: dict[str, Any] = field(default_factory=dict)


class PairwiseJudge(Judge):
    """The points of the first of two members: 1 for a win, 0.5 for a tie, 0 for a loss; they make a group's rewards.

    Each pair is shown in both orders, which cancels a judge's position bias. A member wins if it is ahead over both
    orders; a pair is a tie if each order favours another member. A pair without both answers abstains and counts for
    neither member. Version 2.
    """

    catalog_name = "pairwise_judge"

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self._template = Template.parse(
            rubric_of(self.options, rubrics.PAIR), 2, needs_prompt=True
        )

    @property
    def params(self) -> dict[str, Any]:
        """How long the reply may be."""
        return {"max_tokens": self.options["max_tokens"]}

    def compare(
        self, prompt: str, first: Sequence[Any], second: Sequence[Any]
    ) -> Comparison:
        """Compare two members in both orders, side by side if `max_concurrent` says so.

        Args:
            prompt: The group's prompt.
            first, second: The image or the frames of each member, PIL.

        Raises:
            BusyError: No permit of the fleet's budget is left; ask later.
        """
        num_frames = self.options["frames"]
        one = self.urls(evenly_spaced(first, num_frames))
        other = self.urls(evenly_spaced(second, num_frames))
        as_given = self._template.messages(prompt, [one, other])
        swapped = self._template.messages(prompt, [other, one])

        with deadline.paused():  # requests keep timeout_s by themselves
            if self.chat.at_once > 1:
                replies = self.chat.ask([as_given, swapped], **self.params)
            else:
                replies = self.chat.ask([as_given], **self.params)
                replies += self.chat.ask([swapped], **self.params)
        return comparison_of(*replies)

    def score_inputs(self, inputs: Inputs) -> RewardModelOutput:
        """Points `(N,)` of `N` comparisons, one after another; `image` (or `video`) holds both members of each."""
        rewards: list[float | Unscored | BusyError] = []
        info: list[dict[str, Any]] = []
        for i, prompt in enumerate(inputs.prompt):
            first, second = _both_members(inputs, i)
            try:
                found = self.compare(prompt, first, second)
            except BusyError as error:
                rewards.append(error)
                info.append({})
                continue

            if found.points is None:
                rewards.append(_abstained(found))
            else:
                rewards.append(found.points)
            info.append(found.info)
        return RewardModelOutput(rewards=rewards, extra_info={"judge": info})


def comparison_of(as_given: Answered, swapped: Answered) -> Comparison:
    """The comparison that two members' replies in both orders make. Raises the `BusyError` if a reply is one."""
    total = 0.0
    words: dict[str, Any] = {}
    for order, reply, points in (
        ("as_given", as_given, {"first": WIN, "second": LOSS, "tie": TIE}),
        ("swapped", swapped, {"first": LOSS, "second": WIN, "tie": TIE}),
    ):
        if isinstance(reply, BusyError):
            raise reply
        if isinstance(reply, Unscored):
            return Comparison(None, reply, words)

        words[order] = reply.text
        try:
            verdict = read_verdict(reply.complete_text())
        except Unscored as reason:
            return Comparison(None, reason, words)
        total += points[verdict]

    mean = total / 2
    if mean == TIE:
        return Comparison(TIE, None, words)
    return Comparison(WIN if mean > TIE else LOSS, None, words)


def read_verdict(text: str) -> Verdict:
    """The verdict that ends a reply.

    Raises:
        Unscored: `unparsable`; there is no verdict, there are two that differ, or the line of one says something else
            as well.
    """
    verdicts: set[str] = set()
    for line in _VERDICT.finditer(shortened(text)):
        if _SEVERAL.match(line["rest"]):
            continue
        verdict = line["verdict"].lower()
        if _takes_back(verdict, line["rest"]):
            raise Unscored(
                "unparsable",
                f"the judge's verdict is unclear: {cut(line[0].strip())!r}; it needs one line 'Verdict: first', second "
                "or tie",
            )
        verdicts.add(verdict)

    if len(verdicts) != 1:
        what = "two verdicts that differ" if verdicts else "no verdict"
        raise Unscored(
            "unparsable",
            f"the judge's reply has {what}; it needs one line 'Verdict: first', second or tie",
        )
    return cast(Verdict, verdicts.pop())


# --- private -------------------------------------------------------------------------------------


def _takes_back(verdict: str, rest: str) -> bool:
    """Whether the words behind a verdict in its line say that it is another verdict, or none."""
    head = _SENTENCE_ENDS.split(rest)[0]
    if verdict == "tie":  # `tie between first and second` is a tie
        return _AGAINST_TIE.search(head) is not None
    if _AGAINST.search(head):
        return True
    return bool(_OTHERS.search(head)) and not _BETTER.search(head)


def _both_members(inputs: Inputs, i: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """The frames of the two members that comparison `i` is about; an image is one frame."""
    if inputs.video is not None and inputs.video[i] is not None:
        first, second = inputs.video[i]
        return first, second

    images = inputs.image[i] if inputs.image is not None else None
    first, second = images or []
    return [first], [second]


def _abstained(found: Comparison) -> Unscored:
    assert found.reason is not None, "without points there is a reason"
    return Unscored(found.reason.kind, found.reason.message, {"judge": found.info})
