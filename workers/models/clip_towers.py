"""A CLIP's two towers, of transformers or open_clip, and what the rewards made of their embeddings share."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import open_clip
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from workers.base import Inputs, PointwiseRewardModel, RewardModelOutput, Unscored
from workers.models import clip_pixels, open_clip_checks, transformers_checks
from workers.models.checkpoints import loading, local_or_hub, without_initialising
from workers.models.clip_pixels import Backend, Preprocessing

OPEN_CLIP_PRECISIONS = {
    torch.float32: "fp32",
    torch.bfloat16: "pure_bf16",
    torch.float16: "pure_fp16",
}


class ImageTower(Protocol):
    """Embeds images."""

    preprocessing: Preprocessing

    def embed_images(self, inputs: torch.Tensor) -> torch.Tensor:
        """Embeddings `(N, D)` of `(N, 3, H, W)`, which are normalised and of the tower's dtype."""


class Towers(ImageTower, Protocol):
    """Embeds texts and images into one space."""

    def tokenise(self, texts: Sequence[str]) -> Any:
        """Tokens of `P` texts, padded and cut at the context length; a special token's name in a text is text."""

    def embed_texts(self, tokens: Any) -> torch.Tensor:
        """Embeddings `(P, D)`."""


class TransformersTowers:
    """A `CLIPModel` of transformers 4.50 or later, 5 too, with the tokenizer and image processor of `processor`.

    Args:
        name: Directory or hub id of the model, the value of the option `model_name_or_path`.
        processor: The same of tokenizer and image processor, the option `processor_name_or_path`; empty: its own.
        revision: Of `name` on the hub; of `processor` too where it is the same repository.
    """

    def __init__(
        self,
        name: str,
        processor: str,
        revision: str,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend,
    ) -> None:
        option = "processor_name_or_path" if processor else "model_name_or_path"
        processor = processor or name
        of_processor = revision if processor == name else ""
        self.preprocessing = load_preprocessing(
            option, processor, of_processor, backend
        )
        self._tokenizer = load_tokenizer(option, processor, of_processor)
        self._one_tokenises = (
            threading.Lock()
        )  # a fast tokenizer borrowed by two threads raises
        model = load_transformers(name, revision)
        self.logit_scale = float(model.logit_scale.detach().exp())
        self._context_length: int = model.config.text_config.max_position_embeddings
        self._model = model.to(device, dtype)
        tokens = self.tokenise(transformers_checks.probe())
        config = model.config
        transformers_checks.check_tokenizer(
            option, processor, self._tokenizer, tokens, config.text_config
        )
        transformers_checks.check_sizes(
            option, processor, self.preprocessing, config.vision_config
        )

    def tokenise(self, texts: Sequence[str]) -> Any:
        """Tokens, padded to the context length so that a reward does not depend on its neighbours' prompts."""
        with self._one_tokenises:
            return self._tokenizer(
                list(texts),
                padding="max_length",
                truncation=True,
                max_length=self._context_length,
                split_special_tokens=True,
                return_tensors="pt",
            )

    def embed_texts(self, tokens: Any) -> torch.Tensor:
        """Embeddings `(P, D)`, pooled at the first end-of-text token (also under the legacy `eos_token_id: 2`)."""
        inputs = {
            name: tokens[name].to(self._model.device)
            for name in ("input_ids", "attention_mask")
        }
        return pooled(self._model.get_text_features(**inputs))

    def embed_images(self, inputs: torch.Tensor) -> torch.Tensor:
        """Embeddings `(N, D)`."""
        return pooled(self._model.get_image_features(pixel_values=inputs))


class OpenClipTowers:
    """A model of open_clip.

    Args:
        name: A built-in architecture, `local-dir:` or `hf-hub:`; the value of the option `model_name_or_path`.
        pretrained: For an architecture, the tag or file of its weights.
        file_option: The option that names this file.
    """

    def __init__(
        self,
        name: str,
        pretrained: str,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend = "pil",
        file_option: str = "pretrained",
    ) -> None:
        name = open_clip_checks.plain_name(name)
        whence = _whence(name, pretrained, file_option)
        with (
            loading(*whence) as heard,
            without_initialising(),
            open_clip_checks.NothingResized(*whence),
        ):
            open_clip_checks.check_name(name, pretrained, file_option)
            self._model = open_clip.create_model(
                name,
                pretrained=pretrained or None,
                precision=OPEN_CLIP_PRECISIONS[dtype],
                device=device,
                require_pretrained=True,
            )
            config = open_clip.get_model_preprocess_cfg(self._model)
            self.preprocessing = clip_pixels.of_open_clip(config, backend)
            self._tokenizer = open_clip.get_tokenizer(name)
            heard[:] = [
                one for one in heard if "QuickGELU mismatch" not in one.text
            ]  # check_name has looked at it
        take_special_tokens_as_text(self._tokenizer)
        self._one_tokenises = threading.Lock()
        self._device = device
        self._model.eval()
        tokens = self.tokenise(transformers_checks.probe())
        open_clip_checks.check_tokenizer(
            *whence, self._model, tokens, end_of_text(self._tokenizer)
        )

    def tokenise(self, texts: Sequence[str]) -> Any:
        """Tokens `(P, L)`, after open_clip's own cleaning."""
        with self._one_tokenises:
            return self._tokenizer(list(texts))

    def embed_texts(self, tokens: Any) -> torch.Tensor:
        """Embeddings `(P, D)`."""
        embeddings: torch.Tensor = self._model.encode_text(tokens.to(self._device))
        return embeddings

    def embed_images(self, inputs: torch.Tensor) -> torch.Tensor:
        """Embeddings `(N, D)`."""
        embeddings: torch.Tensor = self._model.encode_image(inputs)
        return embeddings


class FrameReward(PointwiseRewardModel):
    """Scores single frames by a CLIP's embeddings; the reward of a video is the mean over its frames.

    Decoding and preprocessing run beside another thread's forward. Frames go through the tower as many at a time as
    there are samples, so that halving a batch that did not fit halves what is on the device, for videos too.
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
        fit = [i for i, reason in enumerate(reasons) if reason is None]
        if len(fit) == len(frames):
            return RewardModelOutput(self._rewards(prompt, frames))

        rewards: list[Any] = list(reasons)
        if fit:
            scored = self._rewards([prompt[i] for i in fit], [frames[i] for i in fit])
            for i, reward in zip(fit, scored.tolist(), strict=True):
                rewards[i] = reward
        return RewardModelOutput(rewards)

    def _rewards(
        self, prompt: Sequence[str], frames: Sequence[Sequence[Image.Image]]
    ) -> torch.Tensor:
        """`(N,)`, float32."""
        counts = [len(f) for f in frames]
        texts = self.tokens_of(prompt)
        with torch.inference_mode():
            pixels = self.tower.preprocessing.pixels(
                list(itertools.chain(*frames)), self.device
            )
            with self.forward():
                embedded = torch.cat(
                    [self._embed(part) for part in pixels.split(len(prompt))]
                )
                scores = self.scores(embedded, texts, counts).cpu()
        return torch.stack([part.mean() for part in scores.split(counts)])

    def _too_long(self, frames: Sequence[Image.Image]) -> Unscored | None:
        """Why an image of this shape is not scored; the frames of a video are of one size."""
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
        """What `scores` needs of the prompts; computed beside another thread's forward."""

    def scores(
        self, embedded: torch.Tensor, tokens: Any, counts: Sequence[int]
    ) -> torch.Tensor:
        """Scores `(F,)`, float32, of frames whose embeddings `(F, D)` are normalised; `counts` of them a sample."""
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
        """Tokens of the distinct prompts, and which of them is each sample's."""
        distinct = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
        return self.tower.tokenise(list(distinct)), [distinct[p] for p in prompts]

    def scores(
        self, embedded: torch.Tensor, tokens: Any, counts: Sequence[int]
    ) -> torch.Tensor:
        """`(F,)`."""
        distinct, index = tokens
        which = (
            torch.tensor(index)
            .repeat_interleave(torch.tensor(counts))
            .to(embedded.device)
        )
        texts = normalised(self.tower.embed_texts(distinct))
        return self.scale * (texts[which] * embedded).sum(dim=-1)


def load_transformers(name: str, revision: str) -> Any:
    """A `CLIPModel` in float32 on the CPU, for inference.

    Raises:
        ModelLoadError: There is none of that name, its checkpoint lacks weights (they would be random) or has others,
            or it is not what its config.json describes.
    """
    option = "model_name_or_path"
    path = local_or_hub(option, name)
    with loading(option, name, revision) as heard:
        said = transformers_checks.check_config(option, path, revision)
        model, found = CLIPModel.from_pretrained(
            path,
            revision=revision or "main",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else transformers raises, and names none of them
            **{_dtype_argument(): torch.float32},
        )
        transformers_checks.check_weights(option, name, found)
        transformers_checks.note_what_is_said_twice(said, model.config)
        heard[:] = [
            one for one in heard if "LOAD REPORT" not in one.text
        ]  # of the weights, which were looked at
    return model.eval()


def load_preprocessing(
    option: str, name: str, revision: str, backend: Backend
) -> Preprocessing:
    """The preprocessing in a directory or hub repository that `option` names. Raises `ModelLoadError`."""
    path = local_or_hub(option, name)
    with loading(option, name, revision):
        processor = CLIPImageProcessor.from_pretrained(
            path, revision=revision or "main"
        )
        transformers_checks.check_image_processor(option, path, revision, processor)
        return clip_pixels.of_transformers(processor, backend)


def load_tokenizer(option: str, name: str, revision: str) -> Any:
    """The tokenizer in a directory or hub repository that `option` names. Raises `ModelLoadError`."""
    path = local_or_hub(option, name)
    with loading(option, name, revision):
        return AutoTokenizer.from_pretrained(path, revision=revision or "main")


def _whence(name: str, pretrained: str, file_option: str) -> tuple[str, str]:
    """The option that says where open_clip takes weights from, and what it says: a path, a repository or a tag."""
    if name in open_clip.list_models() and Path(pretrained).is_file():
        return file_option, pretrained
    _, colon, place = name.partition(":")
    return "model_name_or_path", place if colon else f"{name} {pretrained}".strip()


def _dtype_argument() -> str:
    """What transformers calls the dtype to load as; the older name is a warning since 4.56."""
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def end_of_text(tokenizer: Any) -> int | None:
    """The token that an open_clip tokenizer ends texts with, None if it does not say."""
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return int(tokenizer.eot_token_id)
    found = getattr(getattr(tokenizer, "tokenizer", None), "eos_token_id", None)
    return found if isinstance(found, int) else None


def take_special_tokens_as_text(tokenizer: Any) -> None:
    """Let an open_clip tokenizer read `<end_of_text>` in a prompt as the characters that it is."""
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        tokenizer.cache.clear()  # where it maps special tokens to themselves; words are merged from characters
    else:
        tokenizer.tokenizer.split_special_tokens = True


def normalised(embeddings: torch.Tensor) -> torch.Tensor:
    """Float32 embeddings of length 1."""
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)


def pooled(output: Any) -> torch.Tensor:
    """The embeddings in what transformers returns: a tensor before version 5, an object since."""
    embeddings: torch.Tensor = getattr(output, "pooler_output", output)
    return embeddings
