"""The images that are sent: photographs with grain, each of its own content."""

from __future__ import annotations

from importlib import resources
from itertools import cycle, islice

import numpy as np
from PIL import Image

from tasks.media import PixelsHWC

LANCZOS = Image.Resampling.LANCZOS

GRAIN = 1.0
"""Standard deviation of the noise, grey levels of 255. With it the PNG of an image has 1.4 MB, as is usual for a
generated image of 1024x1024. Without it the enlarged photographs are too smooth; on pure noise PNG gives up early."""


def draw(num_images: int, size: int) -> list[PixelsHWC]:
    """Distinct images, uint8 `(size, size, 3)`."""
    rng = np.random.default_rng(0)
    photos = _photos(size)
    grain = np.rint(rng.normal(0.0, GRAIN, (size, size, 3))).astype(np.int16)
    images = []
    for photo in islice(cycle(photos), num_images):
        own_grain = np.roll(grain, rng.integers(size, size=2), axis=(0, 1))
        image = np.clip(photo + own_grain, 0, 255).astype(np.uint8)
        images.append(image)
    return images


def _photos(size: int) -> list[PixelsHWC]:
    folder = resources.files("trainer_client.cli").joinpath("photos")
    photos = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".jpg"):
            with file.open("rb") as data, Image.open(data) as photo:
                resized = photo.convert("RGB").resize((size, size), LANCZOS)
                photos.append(np.asarray(resized))
    return photos
