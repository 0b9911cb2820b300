"""A judge that compares the images of one prompt two at a time, in both orders; comparisons to win rates."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tasks import catalog
from tasks.errors import BusyError
from workers.base import (
    Accelerator,
    GroupwiseRewardModel,
    RewardArguments,
    RewardModelOutput,
    Unscored,
    frames_of,
)
from workers.judges import rubrics
from workers.judges.chat import Chat, Reply
from workers.judges.images import DATA_URLS, evenly_spaced
from workers.judges.judge import its_own_deadline
from workers.judges.rational import rubric_of
from workers.judges.template import Template

Pair = tuple[int, int]
"""Two members of a group by their places, the lower first."""

Verdict = Literal["first", "second", "tie"]

WIN, TIE, LOSS = 1.0, 0.5, 0.0

_VERDICT = re.compile(
    r"^[\s#*_>\-`]*(?:final\s+)?verdict[\s*_`]*[:：][\s*_`\[\](\"']*(?:the\s+)?(?P<verdict>first|second|tie)\b(?P<rest>.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_SEVERAL = re.compile(r"^\W*(?:or|/|\|)\W*(?:the\s+)?(?:first|second|tie)", re.IGNORECASE)
"""What behind a verdict says that it is only the form of one: `first / second / tie`."""


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


class PairwiseJudge(GroupwiseRewardModel):
    """The share of its comparisons that a member wins, a tie counting half, in [0, 1].

    Each pair is shown in both orders, which cancels a judge's liking for one place: a member wins the pair if it is
    ahead over both, and it is a tie if each order speaks for another. A pair that misses an answer abstains and counts
    for neither; a member none of whose pairs was answered has no reward. With `opponents: k` each member meets `k`
    others (one meets k + 1 if that does not come out even) that are drawn from the group's digest.
    """

    catalog_name = "pairwise_judge"
    required_fields = ("prompt",)
    optional_fields = ("image", "video")
    thread_safe = True

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        entry = catalog.CATALOG[self.catalog_name]
        self.options = {**{name: o.default for name, o in entry.options.items()}, **config.extra_kwargs}
        is_named = config.image_format in ("png", "jpeg", "webp")
        self._image_format = config.image_format if is_named else entry.image_format
        self._template = Template.parse(rubric_of(self.options, rubrics.PAIR), 2, needs_prompt=True)
        self._chat = Chat(self.options, config.timeout_s)

    def admit(self) -> None:
        """Raise `BusyError` if the fleet's budget is in use."""
        self._chat.admit()

    def compare(self, prompt: str, first: Sequence[Any], second: Sequence[Any]) -> Comparison:
        """Compare two members in both orders.

        Args:
            prompt: The group's.
            first, second: The image or the frames of each, PIL.

        Raises:
            BusyError: The fleet's budget is in use; ask again later.
        """
        one, other = self._urls(first), self._urls(second)
        chats = [self._template.messages(prompt, images) for images in ((one, other), (other, one))]
        replies: list[Reply | Unscored | BusyError] = []
        with its_own_deadline():
            for some in [chats] if self._chat.at_once > 1 else [chats[:1], chats[1:]]:
                replies += self._chat.ask(some, max_tokens=self.options["max_tokens"])
        return comparison_of(*replies)

    def __call__(
        self,
        prompt: Sequence[str],
        image: Sequence[Any] | None = None,
        video: Sequence[Any] | None = None,
        condition_images: Sequence[Any] | None = None,
        condition_videos: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> RewardModelOutput:
        """Win rates `(N,)` of a whole group, one comparison after another; the digest is that of its images."""
        frames = [evenly_spaced(f, self.options["frames"]) for f in frames_of(len(prompt), image, video)]
        digest = hashlib.sha256(b"".join(f.tobytes() for member in frames for f in member)).hexdigest()
        pairs = draw_pairs(len(prompt), self.options["opponents"], digest)
        found = {(i, j): self.compare(prompt[i], frames[i], frames[j]) for i, j in pairs}
        info = [{"num_compared": sum(i in pair for pair in found)} for i in range(len(prompt))]
        return RewardModelOutput(rewards=win_rates(len(prompt), found), extra_info={"judge": info})

    def _urls(self, frames: Sequence[Any]) -> list[str]:
        return [DATA_URLS.of(f, self._image_format) for f in evenly_spaced(frames, self.options["frames"])]


def draw_pairs(num_members: int, opponents: int | Literal["all"], digest: str) -> list[Pair]:
    """Who is compared with whom, each pair once: all, or `opponents` others for each, drawn from `digest`.

    Members sit in a circle in an order that only the digest decides, and each meets those next to it. So a repeated
    task compares the same pairs, everyone has as many comparisons, and no part of the group is cut off from the rest.
    """
    places = range(num_members)
    if opponents == "all" or opponents >= num_members - 1:
        return [(i, j) for i in places for j in places if i < j]
    circle = sorted(places, key=lambda i: hashlib.sha256(f"{digest} {i}".encode()).digest())
    steps = [(at, at + step) for step in range(1, opponents // 2 + 1) for at in places]
    if opponents % 2:  # one more each: across the circle
        half = num_members // 2
        steps += [(at, at + half) for at in range(num_members - half)]
    seats = [(circle[a], circle[b % num_members]) for a, b in steps]
    return sorted({(min(i, j), max(i, j)) for i, j in seats})


def comparison_of(as_given: Reply | Unscored | BusyError, swapped: Reply | Unscored | BusyError) -> Comparison:
    """What two members' replies in both orders come to. Raises the `BusyError` if one is."""
    points: list[float] = []
    words: dict[str, Any] = {}
    for order, reply, values in (("as_given", as_given, (WIN, LOSS)), ("swapped", swapped, (LOSS, WIN))):
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
        Unscored: `unparsable`; there is none, or two that differ.
    """
    found = {m["verdict"].lower() for m in _VERDICT.finditer(text) if not _SEVERAL.match(m["rest"])}
    for verdict in ("first", "second", "tie"):
        if found == {verdict}:
            return verdict  # type: ignore[return-value]
    what = "two verdicts that differ" if found else "no verdict"
    raise Unscored("unparsable", f"the judge's reply has {what}; it needs one line 'Verdict: first', second or tie")


def win_rates(num_members: int, found: Mapping[Pair, Comparison]) -> list[float | Unscored]:
    """For each member the share of its answered comparisons that it won, a tie half; a reason if none was answered."""
    return [_win_rate(member, found) for member in range(num_members)]


def _win_rate(member: int, found: Mapping[Pair, Comparison]) -> float | Unscored:
    own = [(pair[0] == member, c) for pair, c in found.items() if member in pair]
    points = [c.points if is_first else 1.0 - c.points for is_first, c in own if c.points is not None]
    if points:
        return math.fsum(points) / len(points)
    reasons = Counter((c.reason.kind, c.reason.message) for _, c in own if c.reason is not None)
    if not reasons:
        return Unscored("abstained", "it was compared with nobody: its group has no other member that can be judged")
    (kind, message), _ = reasons.most_common(1)[0]
    return Unscored(kind, f"none of its {len(own)} comparisons was answered; most often: {message}")
