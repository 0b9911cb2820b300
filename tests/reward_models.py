"""Reward models for tests of the pipeline; a worker imports them as `tests.reward_models.<class>`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from workers import GroupwiseRewardModel, PointwiseRewardModel, RewardModelOutput, Unscored


def image_of(number: int, height: int = 8, width: int = 8) -> Any:
    """A uint8 image `(H, W, 3)` that carries `number` (below 2**24) in its first pixel; `PixelCode` reads it."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    pixels[0, 0] = (number >> 16, number >> 8 & 255, number & 255)
    return pixels


def number_in(image: Any) -> int:
    """The number that an image of `image_of` carries."""
    red, green, blue = (int(v) for v in np.asarray(image)[0, 0])
    return red << 16 | green << 8 | blue


class PixelCode(PointwiseRewardModel):
    """The number in the image, plus `options["add"]`."""

    required_fields = ("image",)
    optional_fields = ("metadata",)

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        add = self.config.extra_kwargs.get("add", 0)
        numbers = [number_in(one) for one in image]
        return RewardModelOutput([float(n + add) for n in numbers], {"number": numbers})


class Slow(PixelCode):
    """`PixelCode` after `options["seconds"]` of sleep; several threads at once."""

    thread_safe = True

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        time.sleep(self.config.extra_kwargs.get("seconds", 1.0))
        return super().__call__(prompt, image)


class SlowToLoad(PixelCode):
    """`PixelCode` that takes `options["seconds"]` to load."""

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__(config, accelerator)
        time.sleep(config.extra_kwargs.get("seconds", 1.0))


class Large(SlowToLoad):
    """`SlowToLoad` with 200 MB of weights."""

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__(config, accelerator)
        self.weights = np.ones(200 << 20, np.uint8)


class FailsToLoad(PixelCode):
    """Cannot be made."""

    def __init__(self, config: Any, accelerator: Any) -> None:
        raise FileNotFoundError("no weights in /nowhere")


class Null(PointwiseRewardModel):
    """Half a point for everyone."""

    required_fields = ("image",)

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        return RewardModelOutput([0.5] * len(prompt))


class TextLength(PointwiseRewardModel):
    """The number of characters of the prompt; needs no image."""

    required_fields = ("prompt",)

    def __call__(self, prompt: Sequence[str], **kwargs: Any) -> RewardModelOutput:
        return RewardModelOutput([float(len(p)) for p in prompt])


class NaNModel(PointwiseRewardModel):
    """NaN for everyone."""

    required_fields = ("image",)

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        return RewardModelOutput(np.full(len(prompt), np.nan))


class WrongCount(PointwiseRewardModel):
    """One reward too many."""

    required_fields = ("image",)

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        return RewardModelOutput([1.0] * (len(prompt) + 1))


class RaisesOn(PixelCode):
    """`PixelCode` that raises when a sample's metadata has `raise`, or abstains where it has `abstain`."""

    def __call__(
        self, prompt: Sequence[str], image: Any = None, metadata: Any = None, **kwargs: Any
    ) -> RewardModelOutput:
        if any(m.get("raise") for m in metadata):
            raise ValueError("this sample is bad")
        numbers = super().__call__(prompt, image).rewards
        return RewardModelOutput(
            [
                Unscored("abstained", "no opinion") if m.get("abstain") else n
                for m, n in zip(metadata, numbers, strict=True)
            ]
        )


class FailsTimes(PixelCode):
    """`PixelCode` that raises while a file in `options["folder"]` counts fewer calls than `options["times"]`."""

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        options = self.config.extra_kwargs
        calls = os.path.join(options["folder"], "calls")
        with open(calls, "ab+") as file:
            file.write(b".")
            num_calls = file.tell()
        if num_calls <= options["times"]:
            raise RuntimeError(f"call {num_calls} fails")
        return super().__call__(prompt, image)


class ExitsOn(PixelCode):
    """`PixelCode` that takes its whole process down when a sample's metadata has `exit`."""

    def __call__(
        self, prompt: Sequence[str], image: Any = None, metadata: Any = None, **kwargs: Any
    ) -> RewardModelOutput:
        if any(m.get("exit") for m in metadata):
            os._exit(1)
        return super().__call__(prompt, image)


class SystemExits(PixelCode):
    """Calls `sys.exit` for every sample, as a library that was written as a script does."""

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        raise SystemExit("bye")


class TensorMean(PointwiseRewardModel):
    """The mean of all values of the image as a tensor in [0, 1]."""

    required_fields = ("image",)
    use_tensor_inputs = True

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        import torch

        return RewardModelOutput(torch.stack([one.mean() for one in image]))


class Counts(PixelCode):
    """`PixelCode` that appends a line to `options["file"]` for each sample it is asked for, as proof of the work."""

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        output = super().__call__(prompt, image)
        with open(self.config.extra_kwargs["file"], "a") as file:
            file.writelines(f"{int(n)}\n" for n in output.rewards)
        return output


class FailsWhile(PixelCode):
    """`PixelCode` that raises while the file `options["file"]` is there."""

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        if os.path.exists(self.config.extra_kwargs["file"]):
            raise RuntimeError("out of order")
        return super().__call__(prompt, image)


class Film(PointwiseRewardModel):
    """The sum over a video's frames of their number, from 1, times the first byte of the frame."""

    required_fields = ("video",)

    def __call__(self, prompt, video=None, **kwargs):
        rewards = [sum(t * frame.getpixel((0, 0))[0] for t, frame in enumerate(frames, 1)) for frames in video]
        return RewardModelOutput(np.array(rewards, np.float32))


class OrderInGroup(GroupwiseRewardModel):
    """How many members of the group carry a lower number; appends the group's size to `options["file"]`."""

    required_fields = ("image",)
    optional_fields = ("metadata",)

    def __call__(self, prompt: Sequence[str], image: Any = None, metadata: Any = None, **kwargs: Any) -> Any:
        if any(m.get("raise") for m in metadata):
            raise ValueError("this group is bad")
        if "file" in self.config.extra_kwargs:
            with open(self.config.extra_kwargs["file"], "a") as file:
                file.write(f"{len(prompt)}\n")
        numbers = [number_in(one) for one in image]
        return RewardModelOutput([float(sum(other < n for other in numbers)) for n in numbers])


class MetadataNumber(PointwiseRewardModel):
    """Rewards with the number in the metadata."""

    required_fields = ("prompt", "metadata")

    def __call__(self, prompt, metadata=None, **kwargs):
        return RewardModelOutput([float(one["n"]) for one in metadata])
