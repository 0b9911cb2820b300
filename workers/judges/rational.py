"""Judges that score several aspects of an image by a rubric, with reasons: for generated images and for edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
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

    A score of N/A is left out. A reply that lacks an aspect, contradicts itself, is cut, or has no score at all is
    `unparsable`; so is one with a score of another scale. `info["judge"]` keeps the aspects' scores, the text and the
    refined request. Subclass it to aggregate otherwise.
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
        unknown = [
            a
            for a in (*self.aspects, *self.options["aspect_weights"])
            if a not in self.all_aspects
        ]
        if unknown:
            raise ModelLoadError(
                f"the rubric has no aspect {unknown[0]!r}; it has {', '.join(self.all_aspects)}"
            )
        self._template = Template.parse(
            rubric_of(self.options, self.rubric), self.num_images, needs_prompt=True
        )

    def aggregate_aspect_scores(self, scores: Mapping[str, float]) -> float:
        """The reward of a sample; the one function to override.

        Args:
            scores: By aspect, in [1, 4]; those asked for, without those that do not apply. At least one.

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
        judgement = read_judgement(
            reply.complete_text(f"readable score for {', '.join(self.aspects)}")
        )
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
        """The scores that count. Raises `Unscored` if an aspect is missing, or none can be used."""
        unclear = [a for a in self.aspects if a in judgement.unclear]
        if unclear:
            raise Unscored(
                "unparsable",
                f"the judge gave two different scores for {', '.join(unclear)}",
            )
        beyond = [
            f"{judgement.beyond[a]:g} for {a}"
            for a in self.aspects
            if a in judgement.beyond
        ]
        if beyond:
            raise Unscored(
                "unparsable",
                f"the judge gave {', '.join(beyond)}; the rubric's scale is 1 to 4",
            )
        missing = [a for a in self.aspects if a not in judgement.scores]
        if missing and (
            self.options["missing_aspects"] != "skip"
            or len(missing) == len(self.aspects)
        ):
            raise Unscored(
                "unparsable",
                f"the judge's reply has no readable score for {', '.join(missing)}",
            )
        found = {a: s for a, s in judgement.scores.items() if a in self.aspects}
        usable = {a: s for a, s in found.items() if not isinstance(s, str)}
        if not usable:
            raise Unscored(
                "unparsable", f"the judge gave N/A for all of {', '.join(self.aspects)}"
            )
        return usable


class RationalT2I(RationalJudge):
    """For generated images. Of a video the first frame is judged unless `frames` says otherwise. Version 2."""

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
    """The rubric that was given as text or as a file of this worker's, else ours."""
    if options[
        "rubric_file"
    ]:  # the trainer reads it for a built-in; for a subclass of yours it is read here
        return Path(options["rubric_file"]).expanduser().read_text(encoding="utf-8")
    return options["rubric"] or ours
