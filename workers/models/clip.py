"""CLIP: how well an image matches its prompt."""

from __future__ import annotations

from tasks.errors import ModelLoadError
from workers.base import Accelerator, RewardArguments
from workers.models.clip_pixels import backend_for
from workers.models.clip_rewards import TextImageReward
from workers.models.clip_towers import OpenClipTowers, TransformersTowers


class CLIP(TextImageReward):
    """`cos(text, image)`, in [-1, 1]; 0.15 to 0.35 with OpenAI's weights.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021). The weights are any
    transformers CLIP's (`backend: transformers`) or any open_clip model's (`backend: open_clip`). Text is padded and
    cut at the model's context length, 77. A video's reward is that of its first frame, as in Flow-Factory, or the mean
    over its frames (`frames: mean`). Version 2.
    """

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        options = config.extra_kwargs
        self.first_frame_only = options["frames"] == "first"
        is_open_clip = options["backend"] == "open_clip"
        self.tower = self._open_clip() if is_open_clip else self._transformers()

    def _transformers(self) -> TransformersTowers:
        options = self.config.extra_kwargs
        if options["pretrained"]:
            raise ModelLoadError(
                f"pretrained={options['pretrained']!r} is an option of backend: open_clip"
            )
        return TransformersTowers(
            options["model_name_or_path"],
            options["processor_name_or_path"],
            options["revision"],
            self.device,
            self.dtype,
            backend_for(options["preprocessing"], self.dtype),
        )

    def _open_clip(self) -> OpenClipTowers:
        options = self.config.extra_kwargs
        for name in ("revision", "processor_name_or_path"):
            if options[name]:
                raise ModelLoadError(
                    f"{name}={options[name]!r} is an option of backend: transformers; pin an open_clip model by "
                    "model_name_or_path: local-dir:<directory>"
                )
        return OpenClipTowers(
            options["model_name_or_path"],
            options["pretrained"],
            self.device,
            self.dtype,
            backend_for(options["preprocessing"], self.dtype),
        )
