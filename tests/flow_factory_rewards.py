"""Reward models written as for Flow-Factory; only the lines that import its names are ours."""

from __future__ import annotations

import torch
from PIL import Image

from workers import Accelerator, GroupwiseRewardModel, PointwiseRewardModel, RewardArguments, RewardModelOutput


class Redness(PointwiseRewardModel):
    """Mean of the red channel in [0, 1], times an option of the YAML."""

    required_fields = ("prompt", "image")
    use_tensor_inputs = False

    def __init__(self, config: RewardArguments, accelerator: Accelerator):
        super().__init__(config, accelerator)
        self.factor = config.extra_kwargs.get("factor", 1.0)
        self.bias = torch.zeros(1, device=self.device, dtype=torch.float32)
        assert self.accelerator.is_main_process
        assert self.dtype == torch.float16

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        image: list[Image.Image] | None = None,
        video: list[list[Image.Image]] | None = None,
        condition_images: list[list[Image.Image]] | None = None,
        condition_videos: list[list[list[Image.Image]]] | None = None,
    ) -> RewardModelOutput:
        assert len(prompt) <= self.config.batch_size
        reds = [sum(one.getchannel(0).tobytes()) / (one.width * one.height * 255) for one in image]
        rewards = torch.tensor(reds, device=self.device) * self.factor + self.bias
        return RewardModelOutput(rewards=rewards, extra_info={"prompt_length": [len(p) for p in prompt]})


class RednessRank(GroupwiseRewardModel):
    """Rank by redness within the group, over batches of its own."""

    required_fields = ("prompt", "image")

    def __init__(self, config: RewardArguments, accelerator: Accelerator):
        super().__init__(config, accelerator)

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        image: list[Image.Image] | None = None,
        video: list[list[Image.Image]] | None = None,
        condition_images: list[list[Image.Image]] | None = None,
        condition_videos: list[list[list[Image.Image]]] | None = None,
    ) -> RewardModelOutput:
        scores = []
        for start in range(0, len(prompt), self.config.batch_size):
            batch = image[start : start + self.config.batch_size]
            scores.append(torch.tensor([float(one.getpixel((0, 0))[0]) for one in batch]))
        ranks = torch.cat(scores).argsort().argsort()
        return RewardModelOutput(rewards=ranks.float() / len(prompt))


class TensorShapes(PointwiseRewardModel):
    """On tensors; the info has the shape of every field and the reward is the image's mean."""

    required_fields = ("prompt", "image", "video", "condition_images", "condition_videos")
    use_tensor_inputs = True

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        image: list[torch.Tensor] | None = None,
        video: list[torch.Tensor] | None = None,
        condition_images: list[torch.Tensor | list[torch.Tensor]] | None = None,
        condition_videos: list[torch.Tensor | list[torch.Tensor]] | None = None,
    ) -> RewardModelOutput:
        def shapes(value):
            return [list(one.shape) for one in value] if isinstance(value, list) else list(value.shape)

        info = {
            "image": [shapes(one) for one in image],
            "video": [shapes(one) for one in video],
            "condition_images": [shapes(one) for one in condition_images],
            "condition_videos": [shapes(one) for one in condition_videos],
        }
        return RewardModelOutput(rewards=torch.stack([one.mean() for one in image]), extra_info=info)


class Loud(PointwiseRewardModel):
    """Needs what only audio and metadata have; its class attribute names the queue."""

    required_fields = ("audio", "metadata")
    queue = "loud"

    def __call__(self, prompt, audio=None, metadata=None, **kwargs) -> RewardModelOutput:
        assert "image" not in kwargs
        return RewardModelOutput([float(abs(a).max()) * m["gain"] for a, m in zip(audio, metadata, strict=True)])
