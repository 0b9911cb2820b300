"""A reward that needs webcolors below 24: it reads a table that later versions do not have."""

from __future__ import annotations

from importlib.metadata import version

from PIL import ImageStat
from webcolors import CSS3_NAMES_TO_HEX, hex_to_rgb

from workers import PointwiseRewardModel, RewardModelOutput, Unscored


class Closeness(PointwiseRewardModel):
    """1 - mean absolute difference / 255 between an image's mean colour and the colour its prompt names, in [0, 1]."""

    required_fields = ("prompt", "image")

    def __call__(self, prompt, image=None, **kwargs):
        rewards = [
            self._score(text, one) for text, one in zip(prompt, image, strict=True)
        ]
        return RewardModelOutput(rewards, {"webcolors": version("webcolors")})

    def _score(self, text, image):
        named = [word for word in text.split() if word in CSS3_NAMES_TO_HEX]
        if not named:
            return Unscored("invalid", f"no colour is named in {text!r}")
        wanted = hex_to_rgb(CSS3_NAMES_TO_HEX[named[0]])
        return (
            1
            - sum(
                abs(a - b)
                for a, b in zip(ImageStat.Stat(image).mean, wanted, strict=True)
            )
            / 3
            / 255
        )
