"""A CLIP's two towers, of transformers or of open_clip: they embed texts and images into one space."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import open_clip
import torch
import transformers
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

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
        """Embeddings `(N, D)` of preprocessed images `(N, 3, H, W)` of the tower's dtype, on its device."""


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
        processor: Directory or hub id of tokenizer and image processor, the value of the option
            `processor_name_or_path`; if it is empty, the model's own are used.
        revision: Revision of `name` on the hub, and of `processor` if both are the same repository.
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
        # A fast tokenizer raises "Already borrowed" if two threads call it at once.
        self._tokenizer_lock = threading.Lock()

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
        with self._tokenizer_lock:
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
        device = self._model.device
        features = self._model.get_text_features(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
        )
        return pooled(features)

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
        source = _source_of_weights(name, pretrained, file_option)
        with (
            loading(*source) as heard,
            without_initialising(),
            open_clip_checks.NothingResized(*source),
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
            # check_name() has checked the activation, for which the warning is no proof
            heard[:] = [said for said in heard if "QuickGELU mismatch" not in said.text]

        take_special_tokens_as_text(self._tokenizer)
        self._tokenizer_lock = threading.Lock()
        self._device = device
        self._model.eval()

        tokens = self.tokenise(transformers_checks.probe())
        open_clip_checks.check_tokenizer(
            *source, self._model, tokens, end_of_text(self._tokenizer)
        )

    def tokenise(self, texts: Sequence[str]) -> Any:
        """Tokens `(P, L)`, after open_clip's own cleaning."""
        with self._tokenizer_lock:
            return self._tokenizer(list(texts))

    def embed_texts(self, tokens: Any) -> torch.Tensor:
        """Embeddings `(P, D)`."""
        embeddings: torch.Tensor = self._model.encode_text(tokens.to(self._device))
        return embeddings

    def embed_images(self, inputs: torch.Tensor) -> torch.Tensor:
        """Embeddings `(N, D)`."""
        embeddings: torch.Tensor = self._model.encode_image(inputs)
        return embeddings


def load_transformers(name: str, revision: str) -> Any:
    """A `CLIPModel` in float32 on the CPU, for inference.

    Raises:
        ModelLoadError: There is no model of that name, its checkpoint lacks weights (which would be random) or has
            weights that the model lacks, or the model is not what its config.json describes.
    """
    option = "model_name_or_path"
    path = local_or_hub(option, name)
    with loading(option, name, revision) as heard:
        config = transformers_checks.check_config(option, path, revision)
        model, found = CLIPModel.from_pretrained(
            path,
            revision=revision or "main",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else transformers raises and names no weight
            **{_dtype_argument(): torch.float32},
        )
        transformers_checks.check_weights(option, name, found)
        transformers_checks.note_what_is_said_twice(config, model.config)
        # the report lists weights, which check_weights() has checked
        heard[:] = [said for said in heard if "LOAD REPORT" not in said.text]
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


def pooled(output: Any) -> torch.Tensor:
    """The embeddings in what transformers returns: a tensor before version 5, an object since."""
    embeddings: torch.Tensor = getattr(output, "pooler_output", output)
    return embeddings


def end_of_text(tokenizer: Any) -> int | None:
    """The token that an open_clip tokenizer ends texts with, None if the tokenizer does not say."""
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return int(tokenizer.eot_token_id)
    found = getattr(getattr(tokenizer, "tokenizer", None), "eos_token_id", None)
    return found if isinstance(found, int) else None


def take_special_tokens_as_text(tokenizer: Any) -> None:
    """Let an open_clip tokenizer read `<end_of_text>` in a prompt as the characters that it is."""
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        # The cache maps special tokens to themselves; without it they are merged from characters as words are.
        tokenizer.cache.clear()
    else:
        tokenizer.tokenizer.split_special_tokens = True


# --- private -------------------------------------------------------------------------------------


def _source_of_weights(name: str, pretrained: str, file_option: str) -> tuple[str, str]:
    """The option that says where open_clip takes weights from, and its value: a path, a repository or a tag."""
    if name in open_clip.list_models() and Path(pretrained).is_file():
        return file_option, pretrained
    _, colon, source = name.partition(":")
    if colon:
        return "model_name_or_path", source
    return "model_name_or_path", f"{name} {pretrained}".strip()


def _dtype_argument() -> str:
    """The argument of `from_pretrained` for the dtype: transformers warns of the older name since 4.56."""
    major, minor, *_ = transformers.__version__.split(".")
    is_since_4_56 = (int(major), int(minor)) >= (4, 56)
    return "dtype" if is_since_4_56 else "torch_dtype"
