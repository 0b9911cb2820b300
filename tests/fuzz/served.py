"""The reward server that `bodies` asks, in a process of its own: `python -m tests.fuzz.served PORT`."""

from __future__ import annotations

import sys
from typing import Any

from workers.server import RewardServer


class Served(RewardServer):
    """Letters of the prompt, plus a 256th of the red of the image's first pixel. Its bounds are small."""

    max_pixels = 256 * 256
    max_body_bytes = 1 << 20
    max_waiting = 4
    max_receive_s = 2

    def compute_reward(
        self,
        prompt: list[str],
        image: list[Any] | None = None,
        video: list[Any] | None = None,
        condition_images: list[Any] | None = None,
        metadata: list[Any] | None = None,
        fps: list[Any] | None = None,
    ) -> list[float]:
        """One reward for each prompt."""
        reds = [red(one) for one in image] if image is not None else [0] * len(prompt)
        return [len(text) + value / 256 for text, value in zip(prompt, reds, strict=True)]


def red(image: Any) -> int:
    """The red of the first pixel; 0 without an image."""
    return int(image.getpixel((0, 0))[0]) if image is not None else 0


if __name__ == "__main__":
    Served(port=int(sys.argv[1])).run()
