"""What the rewards made of a CLIP's embeddings share: frames, batches, the mean over a video, cosine similarity."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from workers.base import Inputs, PointwiseRewardModel, RewardModelOutput, Unscored
from workers.models.clip_towers import ImageTower, Towers


class FrameReward(PointwiseRewardModel):
    """Scores single frames by a CLIP's embeddings; the reward of a video is the mean over its frames.

    Decoding and preprocessing run beside another thread's forward. The tower takes as many frames at a time as there
    are samples: halving a batch that did not fit into the device's memory then halves the frames of videos too.
    Embeddings are normalised, and rewards computed, in float32.
    """

    optional_fields = ("image", "video")
    thread_safe = True
    first_frame_only = False
    tower: ImageTower

    def score_inputs(self, inputs: Inputs) -> RewardModelOutput:
        """Rewards `(N,)`, float32; a list of floats and reasons if an image is too long to be scored."""
        prompt, frames = inputs.prompt, inputs.frames()
        if self.first_frame_only:
            frames = [sample_frames[:1] for sample_frames in frames]

        reasons = [self._too_long(sample_frames) for sample_frames in frames]
        if not any(reasons):
            return RewardModelOutput(self._rewards(prompt, frames))
        return RewardModelOutput(self._rewards_of_fitting(prompt, frames, reasons))

    def _rewards_of_fitting(
        self,
        prompt: Sequence[str],
        frames: Sequence[Sequence[Image.Image]],
        reasons: Sequence[Unscored | None],
    ) -> list[float | Unscored]:
        """The rewards of the samples without a reason, and in their positions the reasons of the others."""
        rewards: list[Any] = list(reasons)
        fitting = [i for i, reason in enumerate(reasons) if reason is None]
        if not fitting:
            return rewards

        scored = self._rewards(
            [prompt[i] for i in fitting], [frames[i] for i in fitting]
        )
        for i, reward in zip(fitting, scored.tolist(), strict=True):
            rewards[i] = reward
        return rewards

    def _rewards(
        self, prompt: Sequence[str], frames: Sequence[Sequence[Image.Image]]
    ) -> torch.Tensor:
        """`(N,)`, float32."""
        counts = [len(sample_frames) for sample_frames in frames]
        tokens = self.tokens_of(prompt)
        all_frames = list(itertools.chain(*frames))
        with torch.inference_mode():
            pixels = self.tower.preprocessing.pixels(all_frames, self.device)
            with self.forward():
                parts = [self._embed(part) for part in pixels.split(len(prompt))]
                scores = self.scores(torch.cat(parts), tokens, counts).cpu()
        return torch.stack([part.mean() for part in scores.split(counts)])

    def _too_long(self, frames: Sequence[Image.Image]) -> Unscored | None:
        """Why an image of this shape is not scored; the frames of a video are all of one size."""
        width, height = frames[0].size
        most = self.tower.preprocessing.most_proportion()
        if max(width, height) <= most * min(width, height):
            return None
        return Unscored(
            "invalid",
            f"an image of {height}x{width} (height x width) is more than {most} times as long as wide, and "
            f"{type(self).__name__} would see next to nothing of it; cut or pad it",
        )

    def warm_up(self) -> None:
        """Score a grey image, which loads the device's kernels."""
        self(["a photo"], image=[Image.new("RGB", (512, 512), (128, 128, 128))])

    def tokens_of(self, prompts: Sequence[str]) -> Any:
        """What `scores` needs of the prompts; computed while another thread may be in its forward."""

    def scores(
        self, embedded: torch.Tensor, tokens: Any, counts: Sequence[int]
    ) -> torch.Tensor:
        """Scores `(F,)`, float32, of frames.

        Args:
            embedded: Normalised embeddings of the frames, `(F, D)`.
            tokens: What `tokens_of` made of the prompts.
            counts: How many frames each sample has, in order.
        """
        raise NotImplementedError

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        inputs = self.tower.preprocessing.normalised(
            pixels.to(self.device, non_blocking=True)
        )
        return normalised(self.tower.embed_images(inputs.to(self.dtype)))


class TextImageReward(FrameReward):
    """`scale * cos(text, frame)`. Each distinct prompt of a call is encoded once."""

    required_fields = ("prompt",)
    tower: Towers
    scale = 1.0

    def tokens_of(self, prompts: Sequence[str]) -> Any:
        """Tokens of the distinct prompts, and for each sample the index of its prompt among them."""
        index_of = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
        index = [index_of[prompt] for prompt in prompts]
        return self.tower.tokenise(list(index_of)), index

    def scores(
        self, embedded: torch.Tensor, tokens: Any, counts: Sequence[int]
    ) -> torch.Tensor:
        """`(F,)`."""
        distinct, index = tokens
        index_F = torch.tensor(index).repeat_interleave(torch.tensor(counts))
        texts_PD = normalised(self.tower.embed_texts(distinct))
        texts_FD = texts_PD[index_F.to(embedded.device)]
        return self.scale * (texts_FD * embedded).sum(dim=-1)


def normalised(embeddings: torch.Tensor) -> torch.Tensor:
    """Float32 embeddings of length 1."""
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)
