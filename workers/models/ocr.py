"""How well an image shows the text that its prompt asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]  # noqa: F401  (RapidOCR looks for it only when it reads)
from PIL import Image, ImageDraw, ImageFont
from rapidfuzz.distance import Levenshtein
from rapidocr import RapidOCR

from workers.base import (
    Accelerator,
    PointwiseRewardModel,
    RewardArguments,
    RewardModelOutput,
    Unscored,
    frames_of,
)

QUOTED = re.compile(
    r"\"([^\"]*)\"|“([^”]*)”|„([^“”]*)[“”]"
    r"|(?<!\w)'((?:[^']|(?<=\w)'(?=\w))*)'(?!\w)|‘((?:[^’]|(?<=\w)’(?=\w))*)’(?!\w)"
)
"""The first pair of quotation marks, straight or curly; an apostrophe inside a word is part of it."""


class OCR(PointwiseRewardModel):
    """Text rendering as in Flow-GRPO: `1 - min(d, n) / n`, in [0, 1].

    `d` is the Levenshtein distance between the text asked for and the text that RapidOCR reads (its lines in reading
    order), `n` the length of the text asked for, both lower case without white space; 1 where the text read contains
    the text asked for. The target is `metadata["text"]`, else what the prompt has between its first quotation marks;
    without one the sample is `invalid`. A video's reward is the mean over its frames. Version 1.
    """

    required_fields = ("prompt",)
    optional_fields = ("image", "video", "metadata")

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self._engine = RapidOCR(params={"Global.log_level": "error"})
        self._read(_sign())  # it loads its models when it first sees text

    def __call__(
        self,
        prompt: Sequence[str],
        image: Sequence[Any] | None = None,
        video: Sequence[Any] | None = None,
        condition_images: Sequence[Any] | None = None,
        condition_videos: Sequence[Any] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> RewardModelOutput:
        """Rewards `(N,)` in [0, 1]; `extra_info` has the target and the texts read."""
        rewards: list[float | Unscored] = []
        texts: list[list[str]] = []
        frames = frames_of(len(prompt), image, video)
        targets = [target_text(p, m) for p, m in zip(prompt, metadata or [{}] * len(prompt), strict=True)]
        for target, sample_frames in zip(targets, frames, strict=True):
            if target is None:
                rewards.append(
                    Unscored("invalid", 'no text to look for: quote it in the prompt, or set metadata["text"]')
                )
                texts.append([])
                continue
            read = [self._read(frame) for frame in sample_frames]
            texts.append(read)
            rewards.append(float(np.mean([similarity(target, text) for text in read])))
        return RewardModelOutput(rewards, {"target": targets, "read": texts})

    def _read(self, image: Image.Image) -> str:
        pixels_BGR = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])
        lines: Sequence[str] | None = self._engine(pixels_BGR).txts
        return " ".join(lines or ())


def target_text(prompt: str, metadata: Mapping[str, Any]) -> str | None:
    """The text asked for, or None."""
    text = metadata.get("text")
    if text is None:
        quoted = QUOTED.search(prompt)
        text = next((g for g in quoted.groups() if g), None) if quoted else None
    return str(text) if text is not None and _plain(str(text)) else None


def similarity(target: str, read: str) -> float:
    """`1 - min(d, n) / n` over lower-case texts without white space; 1 where `read` contains `target`."""
    target, read = _plain(target), _plain(read)
    if target in read:
        return 1.0
    return 1.0 - min(Levenshtein.distance(target, read), len(target)) / len(target)


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


def _sign() -> Image.Image:
    image = Image.new("RGB", (200, 80), "white")
    ImageDraw.Draw(image).text((20, 20), "READY", fill="black", font=ImageFont.load_default(36))
    return image
