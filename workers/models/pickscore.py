"""PickScore: which of two images for a prompt people would choose."""

from __future__ import annotations

from workers.base import Accelerator, RewardArguments
from workers.models.clip_pixels import backend_for
from workers.models.clip_rewards import TextImageReward
from workers.models.clip_towers import TransformersTowers

PICKSCORE_SCALE = 26.0
"""Divides PickScore, which is a logit of 15 to 26, so that it is about 1, as in Flow-GRPO and Flow-Factory."""


class PickScore(TextImageReward):
    """`exp(logit_scale) * cos(text, image) / 26`, about 0.6 to 1 with the published weights.

    Kirstain et al., "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation" (2023):
    `yuvalkirstain/PickScore_v1`, a CLIP ViT-H/14, with the processor of `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`. Text
    is padded and cut at 77 tokens. `logit_scale` stays float32 whatever the dtype. A video's reward is the mean over
    its frames. Version 2.
    """

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        options = config.extra_kwargs
        self.tower = TransformersTowers(
            options["model_name_or_path"],
            options["processor_name_or_path"],
            options["revision"],
            self.device,
            self.dtype,
            backend_for(options["preprocessing"], self.dtype),
        )
        self.scale = self.tower.logit_scale / PICKSCORE_SCALE
