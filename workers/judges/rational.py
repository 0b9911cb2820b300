"""Judges that score several aspects of an image by a rubric, with reasons: for generated images and for edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tasks.catalog.judges import EDIT_ASPECTS, T2I_ASPECTS
from tasks.errors import ModelLoadError
from workers.base import Accelerator, RewardArguments, Unscored
from workers.judges import rubrics
from workers.judges.aspects import Judgement, mean_reward, read_judgement
from workers.judges.judge import Judge
from workers.judges.reply import Reply
from workers.judges.template import Template


class RationalJudge(Judge):
    """`(mean - 1) / 3` over the scores in [1, 4] of the aspects asked for, in [0, 1].

    A score of N/A is left out. A reply is `unparsable` if it lacks an aspect, contradicts itself, was cut, has no score
    at all, or has a score on another scale. `info["judge"]` keeps the aspects' scores, the text and the refined
    request. Override `aggregate_aspect_scores` in a subclass to aggregate otherwise.
    """

    own_options = ("aspects", "aspect_weights")
    all_aspects: ClassVar[tuple[str, ...]]
    rubric: ClassVar[str]
    num_images: ClassVar[int] = 1

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        given = self.options["aspects"]
        self.aspects: tuple[str, ...] = (
            (given,) if isinstance(given, str) else tuple(dict.fromkeys(given))
        )
        for aspect in (*self.aspects, *self.options["aspect_weights"]):
            if aspect not in self.all_aspects:
                raise ModelLoadError(
                    f"the rubric has no aspect {aspect!r}; it has {', '.join(self.all_aspects)}"
                )
        self._template = Template.parse(
            rubric_of(self.options, self.rubric), self.num_images, needs_prompt=True
        )

    def aggregate_aspect_scores(self, scores: Mapping[str, float]) -> float:
        """The reward of a sample; the one function to override.

        Args:
            scores: By aspect, in [1, 4]: the aspects asked for, without those that do not apply. At least one.

        Raises:
            Unscored: There is nothing to aggregate.
        """
        reward = mean_reward(scores, self.options["aspect_weights"])
        if reward is None:
            raise Unscored(
                "unparsable",
                f"aspect_weights are 0 for all that the judge scored: {', '.join(scores)}",
            )
        return reward

    @property
    def params(self) -> dict[str, Any]:
        """How long the reply may be."""
        return {"max_tokens": self.options["max_tokens"]}

    def messages(
        self, prompt: str, frames: Sequence[Any], condition_images: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """The rubric about the image or frames."""
        return self._template.messages(prompt, [self.urls(frames)])

    def read(self, reply: Reply) -> tuple[float, dict[str, Any]]:
        """The reward, with the aspects' scores, the text and the refined request."""
        needed = f"readable score for {', '.join(self.aspects)}"
        judgement = read_judgement(reply.complete_text(needed))
        info = {
            "aspects": dict(judgement.scores),
            "text": reply.text,
            "refined_request": judgement.refined_request,
        }
        try:
            return self.aggregate_aspect_scores(self._usable(judgement)), info
        except Unscored as reason:
            raise Unscored(
                reason.kind, reason.message, {"judge": info, **reason.info}
            ) from None

    def _usable(self, judgement: Judgement) -> dict[str, float]:
        """The scores that count. Raises `Unscored` if an aspect has no clear score, or no score can be used."""
        may_lack = self.options["missing_aspects"] == "skip"
        why_not = (
            _why_unclear(judgement, self.aspects)
            or _why_beyond(judgement, self.aspects)
            or _why_missing(judgement, self.aspects, may_lack)
        )
        if why_not:
            raise Unscored("unparsable", why_not)

        usable = {}
        for aspect, score in judgement.scores.items():
            if aspect in self.aspects and not isinstance(score, str):
                usable[aspect] = score
        if not usable:
            raise Unscored(
                "unparsable", f"the judge gave N/A for all of {', '.join(self.aspects)}"
            )
        return usable


class RationalT2I(RationalJudge):
    """For generated images. The judge sees the first frame of a video unless `frames` says otherwise. Version 2."""

    catalog_name = "rational_rewards_t2i"
    all_aspects = T2I_ASPECTS
    rubric = rubrics.T2I


class RationalEdit(RationalJudge):
    """For edited images: the source is the first condition image, and is shown first. Version 2."""

    catalog_name = "rational_rewards_edit"
    required_fields = ("prompt", "condition_images")
    all_aspects = EDIT_ASPECTS
    rubric = rubrics.EDIT
    num_images = 2

    def messages(
        self, prompt: str, frames: Sequence[Any], condition_images: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """The rubric about the source and the image after the edit."""
        return self._template.messages(
            prompt, [self.urls(condition_images[:1]), self.urls(frames)]
        )


def rubric_of(options: Mapping[str, Any], ours: str) -> str:
    """The rubric that came with the request, else ours. The trainer has read `rubric_file`: a worker reads no file."""
    return options["rubric"] or ours


# --- private -------------------------------------------------------------------------------------


def _why_unclear(judgement: Judgement, aspects: Sequence[str]) -> str:
    """Which aspects have two scores that differ; empty if none has."""
    unclear = [aspect for aspect in aspects if aspect in judgement.unclear]
    if not unclear:
        return ""
    return f"the judge gave two different scores for {', '.join(unclear)}"


def _why_beyond(judgement: Judgement, aspects: Sequence[str]) -> str:
    """Which aspects have a score on another scale; empty if none has."""
    beyond = []
    for aspect in aspects:
        if aspect in judgement.beyond:
            beyond.append(f"{judgement.beyond[aspect]:g} for {aspect}")
    if not beyond:
        return ""
    return f"the judge gave {', '.join(beyond)}; the rubric's scale is 1 to 4"


def _why_missing(judgement: Judgement, aspects: Sequence[str], may_lack: bool) -> str:
    """Which aspects have no score; empty if all have a score, or if the config allows that some have none."""
    missing = [aspect for aspect in aspects if aspect not in judgement.scores]
    lacks_all = len(missing) == len(aspects)
    if not missing or (may_lack and not lacks_all):
        return ""
    return f"the judge's reply has no readable score for {', '.join(missing)}"
