"""How well an image compresses: the two toy rewards of DDPO, which need no prompt.

Black et al., "Training Diffusion Models with Reinforcement Learning" (2023): the size of the image as JPEG at quality
95, in kilobytes of 1000 bytes. The negative size rewards compressibility. A 1024x1024 photograph has around 300.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from tasks.media import JPEG_QUALITY, too_long_for
from workers.base import Inputs, PointwiseRewardModel, RewardModelOutput, Unscored


class JpegIncompressibility(PointwiseRewardModel):
    """Kilobytes (1000 bytes) of the image as JPEG, quality 95, Pillow's default subsampling; the mean over a video.

    Version 1.
    """

    required_fields = ()
    optional_fields = ("image", "video")
    sign = 1.0

    def score_inputs(self, inputs: Inputs) -> RewardModelOutput:
        """Rewards `(N,)`, float64; unit kilobytes."""
        return RewardModelOutput([self._reward(frames) for frames in inputs.frames()])

    def _reward(self, frames: Sequence[Image.Image]) -> float | Unscored:
        """The mean over a sample's frames, which are all of one size."""
        why = too_long_for("jpeg", frames[0].height, frames[0].width)
        if why is not None:
            return Unscored("invalid", why)
        return self.sign * float(np.mean([kilobytes(frame) for frame in frames]))


class JpegCompressibility(JpegIncompressibility):
    """Minus the kilobytes, so that an image which compresses well has a high reward. Version 1."""

    sign = -1.0


def kilobytes(image: Image.Image) -> float:
    """Size of the JPEG file at quality 95, in units of 1000 bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return len(buffer.getvalue()) / 1000
