"""Whether a model of open_clip is the one that its name says: activation, preprocessing, embeddings, tokenizer.

open_clip warns of some mismatches, is silent about others, and takes defaults for what a config does not say. A
mismatch gives plausible and wrong rewards, so each is checked here.
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
"""open_clip ends the name of an architecture with this if the activation is that of OpenAI's models."""

CONFIG_FILE = "open_clip_config.json"

_SEEN_BY = ("mean", "std", "interpolation", "resize_mode")

_WEIGHTS = (".safetensors", ".bin", ".pth")

_USUAL_STEMS = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
"""Names, but for their endings, of the files that open_clip prefers as a folder's weights."""


def plain_name(name: str) -> str:
    """The architecture as in open_clip's tables, `ViT-B-32` for `ViT-B/32`: open_clip finds tokenizers by this name."""
    return name if ":" in name else name.replace("/", "-")


def check_name(name: str, pretrained: str, file_option: str) -> None:
    """Check before anything is loaded that a model's name and weights fit, and that open_clip reads all of its config.

    Args:
        name: A built-in architecture, `local-dir:` or `hf-hub:`.
        pretrained: For an architecture, the tag or file of its weights.
        file_option: The option that names this file; if it is not `pretrained`, the reward knows its weights.

    Raises:
        ModelLoadError: Says which activation, preprocessing or file would be wrong, and what to write.
    """
    schema, _, source = name.partition(":")
    if not source:
        _check_architecture(name, pretrained, file_option)
        return

    if pretrained:
        raise ModelLoadError(
            f"pretrained: {pretrained!r} would be ignored, since {name!r} has weights of its own; leave it out, or "
            "name an architecture as model_name_or_path"
        )
    if schema == "local-dir":
        config_file = Path(source) / CONFIG_FILE
        if not config_file.is_file():
            return  # open_clip refuses it
        _check_files(config_file.parent)
    else:
        config_file = Path(download_pretrained_from_hf(source, filename=CONFIG_FILE))
    config = json.loads(config_file.read_text(encoding="utf-8"))
    check_preprocessing(source, config.get("preprocess_cfg") or {})


def check_preprocessing(source: str, said: Mapping[str, Any]) -> None:
    """Check that open_clip reads all keys of `preprocess_cfg` in an `open_clip_config.json`.

    Args:
        source: The directory or repository that the file is in.
        said: The content of `preprocess_cfg`.

    Raises:
        ModelLoadError: open_clip would silently ignore a key.
    """
    known = asdict(PreprocessCfg())
    for key in said:
        if key not in known:
            raise ModelLoadError(
                f"model_name_or_path: {CONFIG_FILE} of {source!r} says {key!r} in preprocess_cfg, which open_clip does "
                f"not know and would leave out{nearest(key, known)}; known are {', '.join(known)}"
            )

    unsaid = [key for key in ("mean", "std") if said.get(key) is None]
    if unsaid:
        note(
            f"{CONFIG_FILE} does not say the {' and '.join(unsaid)} of its images; OpenAI's are taken"
        )


class NothingResized(TorchFunctionMode):  # type: ignore[misc]
    """Within this context, weights of another size raise an error; open_clip would silently interpolate them.

    Args:
        option: The option that names the checkpoint.
        name: The option's value.
    """

    def __init__(self, option: str, name: str) -> None:
        super().__init__()
        self._option, self._name = option, name

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Raises `ModelLoadError` if weights are interpolated."""
        if func is torch.nn.functional.interpolate:
            raise ModelLoadError(
                f"{self._option}: the position embeddings of {self._name!r} are those of another image size or context "
                "length than the architecture's, and open_clip would interpolate them; name the architecture that "
                "these weights were trained with"
            )
        return func(*args, **(kwargs or {}))


def check_tokenizer(
    option: str, name: str, model: Any, tokens: torch.Tensor, end_of_text: int | None
) -> None:
    """Check that a tokenizer's tokens fit the model.

    Args:
        option: The option that names the model.
        name: The option's value.
        model: Of open_clip.
        tokens: What the model's tokenizer makes of some text, `(1, L)`.
        end_of_text: The token with which the tokenizer ends texts, None if unknown.

    Raises:
        ModelLoadError: A token is beyond the vocabulary, or the model would read the text elsewhere than at its end.
    """
    vocab_size = getattr(model, "vocab_size", None)
    largest = int(tokens.max())
    if vocab_size is not None and largest >= vocab_size:
        raise ModelLoadError(
            f"{option}: the tokenizer of {name!r} makes a token {largest}, and the model knows {vocab_size}; is the "
            "hf_tokenizer_name in its text_cfg right?"
        )

    reads_at_largest = getattr(model, "text_pool_type", "") == "argmax"
    if reads_at_largest and end_of_text not in (None, largest):
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
    published = {
        tag: open_clip.get_pretrained_cfg(name, tag)
        for tag in open_clip.list_pretrained_tags_by_model(name)
    }
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if tag:
        weights = f"the weights {pretrained!r}"
        _check_activation("model_name_or_path", name, is_quick, weights, tag)
    elif file_option == "pretrained" and Path(pretrained).is_file():
        _check_file(name, pretrained, is_quick, published)


def _check_activation(
    option: str, name: str, is_quick: bool, weights: str, tag: Mapping[str, Any]
) -> None:
    needs_quick = bool(tag.get("quick_gelu", False))
    if needs_quick == is_quick:
        return

    other = f"{name}{QUICK}" if needs_quick else name.removesuffix(QUICK)
    computes_with, trained_with = _activation(is_quick), _activation(needs_quick)
    if other == name:
        # roberta-ViT-B-32 has only this activation, and the table of its weights leaves the activation out
        note(
            f"{name!r} computes with {computes_with}, which open_clip's table does not say of {weights}"
        )
        return

    advice = (
        f"write model_name_or_path: {other}"
        if other in open_clip.list_models()
        else "use a local-dir: whose open_clip_config.json says `quick_gelu`"
    )
    raise ModelLoadError(
        f"{option}: {name!r} computes with {computes_with}, {weights} were trained with {trained_with}; the "
        f"rewards would be other ones, and open_clip only warns: {advice}"
    )


def _activation(is_quick: bool) -> str:
    return "QuickGELU" if is_quick else "GELU"


def _check_file(
    name: str, file: str, is_quick: bool, published: Mapping[str, Mapping[str, Any]]
) -> None:
    """Check a file against the published weights of its architecture: it does not say how it was trained."""
    possible = [tag for tag in published.values() if _is_from(tag, file)]
    if possible:
        weights = f"the weights in {file!r}"
        _check_activation("pretrained", name, is_quick, weights, possible[0])
    else:
        possible = list(published.values())

    if possible and not any(map(_sees_images_as_usual, possible)):
        seen = {key: possible[0].get(key) for key in _SEEN_BY}
        raise ModelLoadError(
            f"pretrained: from a file, open_clip shows images to {name!r} as OpenAI's CLIP sees them, and all the "
            f"published weights of this architecture need others, such as {seen}; write model_name_or_path: "
            f"local-dir:<directory> with the file and an {CONFIG_FILE} that says so in preprocess_cfg, or name a tag: "
            f"{', '.join(published)}"
        )
    if any(bool(tag.get("quick_gelu", False)) != is_quick for tag in possible):
        note(
            f"{Path(file).name} does not say the activation it was trained with: {name} computes with "
            f"{_activation(is_quick)}, and some of its published weights need the other"
        )


def _sees_images_as_usual(tag: Mapping[str, Any]) -> bool:
    """Whether published weights need the preprocessing that open_clip takes if nothing is said."""
    usual = asdict(PreprocessCfg())
    return all(_same(tag[key], usual[key]) for key in _SEEN_BY if key in tag)


def _is_from(tag: Mapping[str, Any], file: str) -> bool:
    """Whether a file has, by its path, the weights of a tag: in the hub's cache, or under its published name."""
    path = Path(file).absolute()
    repository = str(tag.get("hf_hub") or "").rstrip("/")
    folder_in_cache = f"models--{repository.replace('/', '--')}"
    if repository and folder_in_cache in path.parts:
        return True
    published_as = Path(str(tag.get("url") or "")).name
    return bool(published_as) and path.name == published_as


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple):
        return tuple(one) == tuple(other)
    return bool(one == other)


def _check_files(folder: Path) -> None:
    """Refuse a folder in which open_clip would take the alphabetically first of several files of weights."""
    found = [file for file in sorted(folder.iterdir()) if file.suffix in _WEIGHTS]
    has_usual = any(file.stem in _USUAL_STEMS for file in found)
    if len(found) > 1 and not has_usual:
        names = ", ".join(file.name for file in found)
        raise ModelLoadError(
            f"model_name_or_path: {str(folder)!r} holds several files of weights, {names}; leave one, or "
            "name the right one open_clip_model.safetensors"
        )
