"""A reward server that scores how close an image is to the colour that its prompt names. Replace it by your model.

It needs `pip install fastapi uvicorn pillow msgpack`, and rewardq or a copy of rewardq's `workers/server.py` beside it,
named `reward_server.py`.
"""

from __future__ import annotations

import argparse

from PIL import Image, ImageChops, ImageColor, ImageStat

try:
    from workers.server import RewardServer
except ImportError:  # rewardq is not installed here
    from reward_server import RewardServer


class Colour(RewardServer):
    """1 - mean absolute difference / 255 between the image and the named colour, in [0, 1]."""

    def __init__(self, **where):
        super().__init__(**where)
        self.colours = (
            ImageColor.colormap
        )  # load your model here: the server answers once this is done

    def compute_reward(self, prompt, image):
        """Rewards of a batch (or of a whole group). Declare video, condition_images or metadata to get them too."""
        return [self._score(text, one) for text, one in zip(prompt, image)]

    def _score(self, text, image):
        named = [word for word in text.lower().split() if word in self.colours]
        if not named:
            return ValueError(
                f"no colour is named in {text!r}"
            )  # a reason, not a reward; the others keep theirs
        flat = Image.new("RGB", image.size, self.colours[named[0]])
        return (
            1 - sum(ImageStat.Stat(ImageChops.difference(image, flat)).mean) / 3 / 255
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for requests from other hosts"
    )
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    Colour(host=arguments.host, port=arguments.port).run()
