"""A judge that compares images of one prompt two at a time, in both orders; see `tasks.groups` for who meets whom."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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
"""What behind a verdict says that it is only the form of one: `first / second / tie`."""


_SENTENCE_ENDS = re.compile(
    r"[.;(\n]|,(?!\W*(?:the\s+)?(?:first|second|tie)\b)|\s[-–—]+\s|\bbecause\b|\bsince\b|\bas\b"
)
"""Where what belongs to a verdict ends, and reasons begin."""
_OTHERS = re.compile(r"\b(?:first|second|tie)\b", re.IGNORECASE)
_BETTER = re.compile(
    r"\b(?:better|beats|wins|superior|preferred|preferable|stronger)\b|>", re.IGNORECASE
)
_AGAINST = re.compile(
    r"\b(?:no|not|never|neither|nor|nobody|worse|inferior|weaker|loses|lost|loser|less|equal|equally|same|both|draw|"
    r"breaks?|breaker)\b|n['’]t\b|[?=<≈]",
    re.IGNORECASE,
)
"""What behind a verdict takes it back: `first is worse`, `first = second`, `tie-breaker`."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a judge says of two members.

    Attributes:
        points: What the first one gets: 1 a win, 0.5 a tie, 0 a loss; None if the judge abstains.
        reason: Why it abstains.
        info: The judge's words, in both orders.
    """

    points: float | None
    reason: Unscored | None = None
    info: dict[str, Any] = field(default_factory=dict)


class PairwiseJudge(Judge):
    """The points of the first of two members: 1 a win, 0.5 a tie, 0 a loss; a group's rewards are made of them.

    Each pair is shown in both orders, which cancels a judge's liking for one place: a member wins if it is ahead over
    both; it is a tie if each order speaks for another. A pair that misses an answer abstains and counts for neither.
    Version 2.
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
            prompt: The group's.
            first, second: The image or the frames of each, PIL.

        Raises:
            BusyError: The fleet's budget is in use; ask again later.
        """
        one, other = (
            self.urls(evenly_spaced(frames, self.options["frames"]))
            for frames in (first, second)
        )
        chats = [
            self._template.messages(prompt, images)
            for images in ([one, other], [other, one])
        ]
        replies: list[Answered] = []
        with deadline.paused():  # requests keep timeout_s by themselves
            for some in [chats] if self.chat.at_once > 1 else [chats[:1], chats[1:]]:
                replies += self.chat.ask(some, **self.params)
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


def _both_members(inputs: Inputs, i: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """The frames of the two members that comparison `i` is about; an image is one frame."""
    if inputs.video is not None and inputs.video[i] is not None:
        first, second = inputs.video[i]
        return first, second

    images = inputs.image[i] if inputs.image is not None else None
    first, second = images or []
    return [first], [second]


def comparison_of(as_given: Answered, swapped: Answered) -> Comparison:
    """What two members' replies in both orders come to. Raises the `BusyError` if one is."""
    points: list[float] = []
    words: dict[str, Any] = {}
    for order, reply, values in (
        ("as_given", as_given, (WIN, LOSS)),
        ("swapped", swapped, (LOSS, WIN)),
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
        points.append({"first": values[0], "second": values[1], "tie": TIE}[verdict])
    mean = sum(points) / 2
    return Comparison(WIN if mean > TIE else LOSS if mean < TIE else TIE, None, words)


def read_verdict(text: str) -> Verdict:
    """The verdict that ends a reply.

    Raises:
        Unscored: `unparsable`; there is none, two that differ, or one whose line says something else as well.
    """
    lines = [m for m in _VERDICT.finditer(text) if not _SEVERAL.match(m["rest"])]
    unclear = next(
        (m for m in lines if _takes_back(m["verdict"].lower(), m["rest"])), None
    )
    if unclear is not None:
        raise Unscored(
            "unparsable",
            f"the judge's verdict is unclear: {cut(unclear[0].strip())!r}; it needs one line 'Verdict: first', second "
            "or tie",
        )
    found = {m["verdict"].lower() for m in lines}
    for verdict in ("first", "second", "tie"):
        if found == {verdict}:
            return verdict  # type: ignore[return-value]
    what = "two verdicts that differ" if found else "no verdict"
    raise Unscored(
        "unparsable",
        f"the judge's reply has {what}; it needs one line 'Verdict: first', second or tie",
    )


def _takes_back(verdict: str, rest: str) -> bool:
    """Whether what follows a verdict in its line says that it is another, or none."""
    head = _SENTENCE_ENDS.split(rest)[0]
    if verdict == "tie":  # `tie between first and second` is one
        return bool(
            re.search(
                r"\b(?:no|not|breaks?|breaker)\b|n['’]t\b|\?", head, re.IGNORECASE
            )
        )
    if _AGAINST.search(head):
        return True
    return bool(_OTHERS.search(head)) and not _BETTER.search(head)


def _abstained(found: Comparison) -> Unscored:
    assert found.reason is not None, "without points there is a reason"
    return Unscored(found.reason.kind, found.reason.message, {"judge": found.info})
