"""HPSv2: human preference between images for a prompt, without the package of that name."""

from __future__ import annotations

from pathlib import Path

from tasks.errors import ModelLoadError
from workers.base import Accelerator, RewardArguments
from workers.models import clip_pixels
from workers.models.checkpoints import find_file
from workers.models.clip_rewards import TextImageReward
from workers.models.clip_towers import OpenClipTowers

HPS_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
"""By version of the score, the file of `xswu/HPSv2` on the hub."""


class HPSv2(TextImageReward):
    """`cos(text, image)`, in [-1, 1]; 0.2 to 0.35 for generated images.

    Wu et al., "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
    Synthesis" (2023): open_clip's ViT-H-14 with the weights of `xswu/HPSv2`, v2.0 or v2.1. The image is preprocessed as
    in the package `hpsv2` 1.2 on torchvision 0.17 or later: the whole image, its longer edge 224, on black, resized as
    a float tensor. A video's reward is the mean over its frames. Version 1.
    """

    architecture = "ViT-H-14"

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        options = config.extra_kwargs
        file = HPS_FILES[options["hps_version"]]
        checkpoint = find_file(
            "checkpoint_path", options["checkpoint_path"], file, options["revision"]
        )
        _check_version(checkpoint, options["hps_version"])
        self.tower = OpenClipTowers(
            self.architecture,
            checkpoint,
            self.device,
            self.dtype,
            file_option="checkpoint_path",
        )
        self.tower.preprocessing = clip_pixels.as_hps(self.tower.preprocessing)


def _check_version(checkpoint: str, version: str) -> None:
    """Refuse a file whose name is that of the other version's file."""
    for other, file in HPS_FILES.items():
        if other != version and Path(checkpoint).name == file:
            raise ModelLoadError(
                f"checkpoint_path: {checkpoint!r} is by its name HPS {other}, and hps_version says {version}; write "
                f"hps_version: {other}, or name {HPS_FILES[version]}"
            )
