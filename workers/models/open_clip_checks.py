"""Whether a model of open_clip is the one that its name says: activation, preprocessing, embeddings, tokenizer.

open_clip warns of some of it, tells some to nobody, and takes defaults for what is not said; here it is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import PreprocessCfg
from torch.overrides import TorchFunctionMode

from tasks.errors import ModelLoadError, nearest
from workers.loading.load_warnings import note

QUICK = "-quickgelu"
"""What open_clip ends the name of an architecture with whose activation is OpenAI's."""

CONFIG_FILE = "open_clip_config.json"

_SEEN_BY = ("mean", "std", "interpolation", "resize_mode")

_USUAL_FILES = tuple(
    f"{stem}{suffix}"
    for stem in ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
    for suffix in (".safetensors", ".bin", ".pth")
)
"""Files that open_clip takes for a folder's weights first."""


def plain_name(name: str) -> str:
    """The architecture as open_clip's tables have it, `ViT-B-32` for `ViT-B/32`: it reads tokenizers by that only."""
    return name if ":" in name else name.replace("/", "-")


def check_name(name: str, pretrained: str, file_option: str) -> None:
    """Whether a model's name, its weights and what open_clip would make of them fit, before anything is loaded.

    Args:
        name: A built-in architecture, `local-dir:` or `hf-hub:`.
        pretrained: For an architecture, the tag or file of its weights.
        file_option: The option that names this file; where it is not `pretrained`, the reward knows its weights.

    Raises:
        ModelLoadError: Says which activation, preprocessing or file would be wrong, and what to write.
    """
    schema, _, place = name.partition(":")
    if not place:
        _check_architecture(name, pretrained, file_option)
        return
    if pretrained:
        raise ModelLoadError(
            f"pretrained: {pretrained!r} would be ignored, since {name!r} has weights of its own; leave it out, or "
            f"name "
            "an architecture as model_name_or_path"
        )
    if schema == "local-dir":
        config = Path(place) / CONFIG_FILE
        if not config.is_file():
            return  # open_clip refuses it
        _check_files(config.parent)
    else:
        config = Path(download_pretrained_from_hf(place, filename=CONFIG_FILE))
    check_preprocessing(
        place,
        json.loads(config.read_text(encoding="utf-8")).get("preprocess_cfg") or {},
    )


def check_preprocessing(place: str, said: Mapping[str, Any]) -> None:
    """Whether open_clip takes all that an `open_clip_config.json` says of preprocessing.

    Raises:
        ModelLoadError: It says something that open_clip would leave out without a word.
    """
    known = asdict(PreprocessCfg())
    for key in said:
        if key not in known:
            raise ModelLoadError(
                f"model_name_or_path: {CONFIG_FILE} of {place!r} says {key!r} in preprocess_cfg, which open_clip does "
                f"not "
                f"know and would leave out{nearest(key, known)}; known are {', '.join(known)}"
            )
    unsaid = [key for key in ("mean", "std") if said.get(key) is None]
    if unsaid:
        note(
            f"{CONFIG_FILE} does not say the {' and '.join(unsaid)} of its images; OpenAI's are taken"
        )


class NothingResized(TorchFunctionMode):  # type: ignore[misc]
    """Within, weights that do not fit are not stretched until they do, which open_clip tells nobody.

    Args:
        option: The option that names the checkpoint.
        name: What it says.
    """

    def __init__(self, option: str, name: str) -> None:
        super().__init__()
        self._option, self._name = option, name

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Raises `ModelLoadError` where weights are interpolated."""
        if func is torch.nn.functional.interpolate:
            raise ModelLoadError(
                f"{self._option}: the position embeddings of {self._name!r} are those of another image size or context "
                "length than the architecture's, and open_clip would interpolate them; name the architecture that "
                "these "
                "weights were trained with"
            )
        return func(*args, **(kwargs or {}))


def check_tokenizer(
    option: str, name: str, model: Any, tokens: torch.Tensor, end_of_text: int | None
) -> None:
    """Whether a tokenizer's texts fit the model.

    Args:
        option: The option that names the model.
        name: What it says.
        model: Of open_clip.
        tokens: What its tokenizer makes of some text, `(1, L)`.
        end_of_text: The token that it ends texts with, None if unknown.

    Raises:
        ModelLoadError: A token is beyond the vocabulary, or the text would be read elsewhere than at its end.
    """
    vocab_size = getattr(model, "vocab_size", None)
    largest = int(tokens.max())
    if vocab_size is not None and largest >= vocab_size:
        raise ModelLoadError(
            f"{option}: the tokenizer of {name!r} makes a token {largest}, and the model knows {vocab_size}; is the "
            "hf_tokenizer_name in its text_cfg right?"
        )
    if getattr(model, "text_pool_type", "") == "argmax" and end_of_text not in (
        None,
        largest,
    ):
        raise ModelLoadError(
            f"{option}: the tokenizer of {name!r} ends a text with token {end_of_text}, and the model reads it at its "
            f"largest, {largest}; is the hf_tokenizer_name in its text_cfg right?"
        )


# --- private -------------------------------------------------------------------------------------


def _check_architecture(name: str, pretrained: str, file_option: str) -> None:
    config = open_clip.get_model_config(name)
    if config is None or not pretrained:
        return  # open_clip refuses both
    is_quick = bool(config.get("quick_gelu", False))
    tags = {
        tag: open_clip.get_pretrained_cfg(name, tag)
        for tag in open_clip.list_pretrained_tags_by_model(name)
    }
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if tag:
        _check_activation(
            "model_name_or_path", name, is_quick, f"the weights {pretrained!r}", tag
        )
    elif file_option == "pretrained" and Path(pretrained).is_file():
        _check_file(name, pretrained, is_quick, tags)


def _check_activation(
    option: str, name: str, is_quick: bool, weights: str, tag: Mapping[str, Any]
) -> None:
    needs_quick = bool(tag.get("quick_gelu", False))
    if needs_quick == is_quick:
        return
    other = f"{name}{QUICK}" if needs_quick else name.removesuffix(QUICK)
    words = {True: "QuickGELU", False: "GELU"}
    if (
        other == name
    ):  # of an architecture that has but this activation, roberta-ViT-B-32, its table leaves it out
        note(
            f"{name!r} computes with {words[is_quick]}, which open_clip's table does not say of {weights}"
        )
        return
    advice = (
        f"write model_name_or_path: {other}"
        if other in open_clip.list_models()
        else "use a local-dir: whose open_clip_config.json says `quick_gelu`"
    )
    raise ModelLoadError(
        f"{option}: {name!r} computes with {words[is_quick]}, {weights} were trained with {words[needs_quick]}; the "
        f"rewards would be other ones, and open_clip only warns: {advice}"
    )


def _check_file(
    name: str, file: str, is_quick: bool, tags: Mapping[str, Mapping[str, Any]]
) -> None:
    """A file does not say how its weights were trained; the published ones of that architecture tell what may be."""
    published = [cfg for cfg in tags.values() if _is_from(cfg, file)]
    possible = published or list(tags.values())
    if published:
        _check_activation(
            "pretrained", name, is_quick, f"the weights in {file!r}", published[0]
        )
    usual = asdict(PreprocessCfg())
    fit = [
        cfg
        for cfg in possible
        if all(_same(cfg[key], usual[key]) for key in _SEEN_BY if key in cfg)
    ]
    if possible and not fit:
        seen = {key: possible[0].get(key) for key in _SEEN_BY}
        raise ModelLoadError(
            f"pretrained: from a file, open_clip shows images to {name!r} as OpenAI's CLIP sees them, and all the "
            f"published "
            f"weights of this architecture need others, such as {seen}; write model_name_or_path: "
            f"local-dir:<directory> "
            f"with the file and an {CONFIG_FILE} that says so in preprocess_cfg, or name a tag: {', '.join(tags)}"
        )
    if any(bool(cfg.get("quick_gelu", False)) != is_quick for cfg in possible):
        note(
            f"{Path(file).name} does not say the activation it was trained with: {name} computes with "
            f"{'QuickGELU' if is_quick else 'GELU'}, and some of its published weights need the other"
        )


def _is_from(cfg: Mapping[str, Any], file: str) -> bool:
    """Whether a file is, by its path, a tag's: in the hub's cache, or under the name that it is published by."""
    repository = str(cfg.get("hf_hub") or "").rstrip("/")
    in_cache = f"models--{repository.replace('/', '--')}"
    published_as = Path(str(cfg.get("url") or "")).name
    path = Path(file).absolute()
    return (bool(repository) and in_cache in path.parts) or (
        bool(published_as) and path.name == published_as
    )


def _same(one: Any, other: Any) -> bool:
    return (
        tuple(one) == tuple(other)
        if isinstance(one, list | tuple)
        else bool(one == other)
    )


def _check_files(folder: Path) -> None:
    """open_clip takes the first in the alphabet where none has a usual name."""
    found = sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix in (".safetensors", ".bin", ".pth")
    )
    if len(found) > 1 and not any(name in _USUAL_FILES for name in found):
        raise ModelLoadError(
            f"model_name_or_path: {str(folder)!r} holds several files of weights, {', '.join(found)}; leave one, or "
            f"name "
            "the right one open_clip_model.safetensors"
        )
