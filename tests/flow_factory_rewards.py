"""Reward models written as for Flow-Factory; only the lines that import its names are ours."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

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


COMMON = ("prompt", "image")


class Either(PointwiseRewardModel):
    """Red of an image, or of the first frame of a video: it declares both, a sample has one of them."""

    required_fields = (*COMMON, "video")

    def __call__(self, prompt, image=None, video=None):
        shown = image if image is not None else [frames[0] for frames in video]
        return RewardModelOutput(rewards=[torch.tensor(float(one.getpixel((0, 0))[0])) for one in shown])


class EitherOfGroup(GroupwiseRewardModel):
    """The same, less the least of the group."""

    required_fields = ["prompt", "image", "video"]

    def __call__(self, prompt, image=None, video=None, **kwargs):
        shown = image if image is not None else [frames[0] for frames in video]
        reds = torch.tensor([float(one.getpixel((0, 0))[0]) for one in shown])
        return reds - reds.min()


class Edit(PointwiseRewardModel):
    """How much redder than the source; of text-to-image, which has no source, the red itself."""

    required_fields = ("prompt", "image", "condition_images")

    def __call__(self, prompt, image, condition_images=None, **kwargs):
        sources = condition_images or [None] * len(image)
        return RewardModelOutput(
            [red_of(i) - (red_of(s[0]) if s else 0.0) for i, s in zip(image, sources, strict=True)]
        )


def red_of(image: Image.Image) -> float:
    return float(image.getpixel((0, 0))[0])


class RowText(PointwiseRewardModel):
    """Parses the row of the data set as docs/moving.md says to; does not declare what its arguments name."""

    required_fields = ("prompt", "image")

    def __call__(self, prompt, image=None, metadata=None):
        rows = [json.loads(row) if isinstance(row, str) else row for row in metadata]
        return RewardModelOutput(rewards=[float(len(row["include"])) for row in rows])


class Pitch(PointwiseRewardModel):
    """Seconds of audio, as CLAP of theirs is called: the rate is an argument and not declared."""

    required_fields = ("prompt", "audio")
    use_tensor_inputs = True

    @torch.no_grad()
    def __call__(self, prompt, audio, audio_sample_rate=None, **kwargs):
        assert isinstance(audio_sample_rate, list)
        seconds = [one.shape[-1] / rate for one, rate in zip(audio, audio_sample_rate, strict=True)]
        return RewardModelOutput(
            rewards=torch.tensor(seconds, device=self.device), extra_info={"rate": audio_sample_rate}
        )


@dataclass
class TheirOutput:
    """Their own output class, as a package keeps it whose classes are not edited."""

    rewards: Any
    extra_info: Any = None


class TheirBase(ABC):
    """Their base class: it sets what ours has as properties, and calls no base of its own."""

    required_fields: tuple[str, ...] = ("image", "prompt")
    use_tensor_inputs: bool = False

    def __init__(self, config: RewardArguments, accelerator: Accelerator):
        self.accelerator = accelerator
        self.config = config
        self.device = accelerator.device if config.device == torch.device("cuda") else config.device
        self.dtype = config.dtype
        self.model: torch.nn.Module | None = None

    @abstractmethod
    def __call__(self, *args, **kwargs): ...

    def to(self, device):
        self.device = device
        return self


class TheirRed(TheirBase):
    """A class of a package of theirs that is left as it is."""

    required_fields = ("prompt", "image", "metadata")

    def __init__(self, *, accelerator: Accelerator, config: RewardArguments):
        super().__init__(config, accelerator)
        self.to(torch.device("cpu"))

    def __call__(self, prompt, image, metadata):
        rewards = [torch.tensor(red_of(one)) for one in image]
        return TheirOutput(rewards=rewards, extra_info={"seed": [row["seed"] for row in metadata]})


class OursOfTheirs(TheirRed, PointwiseRewardModel):
    """All that is needed to have it here."""
