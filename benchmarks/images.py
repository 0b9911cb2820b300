"""The images that are sent: photographs with grain, each of its own content."""

from __future__ import annotations

from importlib import resources
from itertools import cycle, islice

import numpy as np
from PIL import Image

from tasks.media import PixelsHWC

GRAIN = 1.0
"""Standard deviation of the noise, grey levels of 255. With it the PNG of an image has the 1.4 MB that is usual for a
generated image of 1024x1024; without it the enlarged photographs are too smooth, with pure noise PNG gives up early."""


def draw(num_images: int, size: int) -> list[PixelsHWC]:
    """Distinct images, uint8 `(size, size, 3)`."""
    rng = np.random.default_rng(0)
    photos = _photos(size)
    grain = np.rint(rng.normal(0.0, GRAIN, (size, size, 3))).astype(np.int16)
    return [
        np.clip(photo + np.roll(grain, rng.integers(size, size=2), axis=(0, 1)), 0, 255).astype(np.uint8)
        for photo in islice(cycle(photos), num_images)
    ]


def _photos(size: int) -> list[PixelsHWC]:
    folder = resources.files("trainer_client.cli").joinpath("photos")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".jpg")), key=lambda f: f.name)
    photos = []
    for file in files:
        with file.open("rb") as data, Image.open(data) as photo:
            photos.append(np.asarray(photo.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)))
    return photos
