"""A reward that needs webcolors 24.8 or later: it calls a function that earlier versions do not have."""

from __future__ import annotations

from importlib.metadata import version

from PIL import ImageStat
from webcolors import name_to_rgb, names

from workers import PointwiseRewardModel, RewardModelOutput, Unscored


class Nearness(PointwiseRewardModel):
    """1 / rank of the prompt's colour among all CSS colours, ordered by their distance to the image's mean colour."""

    required_fields = ("prompt", "image")

    def __call__(self, prompt, image=None, **kwargs):
        rewards = [
            self._score(text, one) for text, one in zip(prompt, image, strict=True)
        ]
        return RewardModelOutput(rewards, {"webcolors": version("webcolors")})

    def _score(self, text, image):
        named = [word for word in text.split() if word in names()]
        if not named:
            return Unscored("invalid", f"no colour is named in {text!r}")
        mean = ImageStat.Stat(image).mean
        distances = {
            n: sum((a - b) ** 2 for a, b in zip(mean, name_to_rgb(n), strict=True))
            for n in names()
        }
        return 1 / (
            1 + sum(distance < distances[named[0]] for distance in distances.values())
        )
