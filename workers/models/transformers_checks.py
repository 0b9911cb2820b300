"""Whether a CLIP of transformers is the one that its files describe: weights, configuration, tokenizer, processor.

transformers warns of some mismatches, in words that change between versions, and is silent about others. A mismatch
gives plausible and wrong rewards, so the model itself is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPImageProcessor

from tasks.errors import ModelLoadError
from workers.loading.load_warnings import note
from workers.models.clip_pixels import Preprocessing

KINDS_OF_PROCESSOR = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
)
"""Names of CLIP's image processor in versions of transformers; other processors have other defaults."""

_NUMBERS_DEPEND_ON = (
    *("hidden_act", "num_attention_heads", "layer_norm_eps", "num_hidden_layers"),
    *("max_position_embeddings", "image_size", "patch_size"),
)

_PREPROCESSED_BY = ("image_mean", "image_std", "size", "resample")

_PROBE = "a photo of a cat"


def check_config(option: str, path: str, revision: str) -> Mapping[str, Any]:
    """The content of a CLIP's config.json.

    Raises:
        ModelLoadError: It is the config of another kind of model, or there is an adapter, which would be left out.
    """
    if Path(path, "adapter_config.json").is_file():
        raise ModelLoadError(
            f"{option}: {path!r} holds an adapter (adapter_config.json) beside or instead of a model; merge it into "
            "the model (peft: `merge_and_unload()`) and save that"
        )
    found, _ = CLIPConfig.get_config_dict(path, revision=revision or "main")
    config: Mapping[str, Any] = found
    kind = config.get("model_type")
    if kind is None:
        note("config.json does not say its model_type")
    elif kind != "clip":
        raise ModelLoadError(
            f"{option}: {path!r} is a model of type {kind!r}, and this reward needs one of type 'clip'; transformers "
            f"would load it as a CLIP with a warning only. Name a CLIP, or score by a class of your own"
        )
    if config.get("quantization_config"):
        note("config.json has a quantization_config: its weights are rounded")
    return config


def check_weights(option: str, name: str, found: Mapping[str, Any]) -> None:
    """Check that a checkpoint has all weights of a CLIPModel and no others.

    Args:
        option: The option that names the checkpoint.
        name: The option's value.
        found: The loading info of transformers.

    Raises:
        ModelLoadError: Weights are missing or of another shape, and would be random; or the checkpoint has layers or
            heads that the model does not have.
    """
    advice = (
        "Are the weights those of the model that its config.json describes, "
        "without an adapter or a head of its own?"
    )
    what = f"{option}: {name!r} is no CLIPModel"
    lacking = sorted(found["missing_keys"])
    if lacking:
        raise ModelLoadError(
            f"{what}: its checkpoint lacks {len(lacking)} of the weights, {lacking[0]} first. {advice}"
        )
    of_other_shape = sorted(found["mismatched_keys"], key=str)
    if of_other_shape:
        key, *shapes = of_other_shape[0]
        sizes = " and ".join(str(tuple(shape)) for shape in shapes)
        raise ModelLoadError(
            f"{what}: {len(of_other_shape)} weights have another shape in its checkpoint than in the model, "
            f"{key} first ({sizes}). {advice}"
        )
    # old checkpoints contain the buffer position_ids, which is no weight
    left = sorted(
        key for key in found["unexpected_keys"] if not key.endswith("position_ids")
    )
    if left:
        raise ModelLoadError(
            f"{what}: its checkpoint has {len(left)} weights that the model does not have, {left[0]} first. {advice}"
        )


def note_what_is_said_twice(said: Mapping[str, Any], built: Any) -> None:
    """Note each setting for which a config.json gives two values, and which value counts.

    An old config.json has `text_config_dict` beside `text_config`. transformers silently takes the former, with its
    defaults for what is missing there, such as the activation. We do the same, so that the reward is that of everybody
    who uses transformers.

    Args:
        said: The content of config.json.
        built: The configuration with which the model was built.
    """
    for tower in ("text_config", "vision_config"):
        given = said.get(tower) or {}
        for key in _NUMBERS_DEPEND_ON:
            used = getattr(getattr(built, tower), key, None)
            if given.get(key) is not None and given[key] != used:
                note(
                    f"config.json says {key} {given[key]!r} in {tower}, {tower}_dict counts: it is {used!r}"
                )


def check_tokenizer(
    option: str, name: str, tokenizer: Any, tokens: Any, text_config: Any
) -> None:
    """Check that a tokenizer is the one with which a model's text tower was trained, as far as a probe tells.

    Args:
        option: The option that names the tokenizer.
        name: The option's value.
        tokenizer: Of transformers.
        tokens: What the tokenizer makes of `probe()`, padded.
        text_config: The configuration of the text tower.

    Raises:
        ModelLoadError: The tokenizer has more tokens than the model, ends texts with another token than the model reads
            them at, or splits words that its own vocabulary has as one token.
    """
    cure = "name, as processor_name_or_path, the model that this one was trained from"
    if len(tokenizer) > text_config.vocab_size:
        raise ModelLoadError(
            f"{option}: the tokenizer of {name!r} has {len(tokenizer)} tokens, the model {text_config.vocab_size}; "
            f"{cure}"
        )

    ids = tokens["input_ids"][0]
    last = int(tokens["attention_mask"][0].sum()) - 1
    if _read_at(ids, text_config.eos_token_id) != last:
        raise ModelLoadError(
            f"{option}: the tokenizer of {name!r} ends a text with token {int(ids[last])}, and the model reads a text "
            f"at its first token {text_config.eos_token_id}; {cure}"
        )

    vocabulary = tokenizer.get_vocab()
    for word in _PROBE.split():
        whole = vocabulary.get(f"{word}</w>")
        if whole is not None and whole not in ids.tolist():
            raise ModelLoadError(
                f"{option}: the tokenizer of {name!r} does not read {word!r} as the token {word + '</w>'!r} of its own "
                f"vocabulary; are its files whole and of one tokenizer (vocab.json, merges.txt, tokenizer.json)? Or "
                f"{cure}"
            )


def probe() -> list[str]:
    """The texts whose tokens `check_tokenizer` takes."""
    return [_PROBE]


def check_image_processor(
    option: str, path: str, revision: str, processor: CLIPImageProcessor
) -> None:
    """Check that an image processor is a CLIP's, and does nothing that `clip_pixels` leaves out.

    Raises:
        ModelLoadError: It is of another kind, whose defaults are others, or it scales otherwise.
    """
    said, _ = CLIPImageProcessor.get_image_processor_dict(
        path, revision=revision or "main"
    )
    _check_kind(option, path, said)
    unsaid = [key for key in _PREPROCESSED_BY if said.get(key) is None]
    if unsaid:
        note(
            f"the image processor's file does not say {', '.join(unsaid)}; CLIP's own are taken"
        )

    factor = float(getattr(processor, "rescale_factor", 1 / 255))
    scales_otherwise = abs(255 * factor - 1) > 1e-6
    if scales_otherwise or getattr(processor, "do_pad", None):
        raise ModelLoadError(
            f"{option}: the image processor of {path!r} scales by {factor:g} instead of 1/255, or pads, which is "
            "unknown here; name another as processor_name_or_path, or score by a class of your own"
        )


def _check_kind(option: str, path: str, said: Mapping[str, Any]) -> None:
    """Refuse an image processor whose file names another kind than CLIP's."""
    kind = said.get("image_processor_type") or said.get("feature_extractor_type")
    if kind is None:
        note("the image processor's file does not say its kind; CLIP's is taken")
    elif kind not in KINDS_OF_PROCESSOR:
        raise ModelLoadError(
            f"{option}: the image processor of {path!r} is a {kind}, and this reward sees images as a "
            f"CLIPImageProcessor does, whose defaults are others; name, as processor_name_or_path, a model with that "
            f"one"
        )


def check_sizes(
    option: str, name: str, preprocessing: Preprocessing, vision_config: Any
) -> None:
    """Check that preprocessed images have the size that the model sees.

    Raises:
        ModelLoadError: They have another size.
    """
    needed = (vision_config.image_size,) * 2
    if preprocessing.size != needed:
        raise ModelLoadError(
            f"{option}: the image processor of {name!r} makes images of {preprocessing.size}, the model sees {needed}; "
            "name, as processor_name_or_path, the model that this one was trained from"
        )


# --- private -------------------------------------------------------------------------------------


def _read_at(ids: torch.Tensor, eos_token_id: int) -> int:
    """The index at which transformers' CLIP reads a text: under the legacy `eos_token_id: 2` that of the largest id."""
    if eos_token_id == 2:
        return int(ids.argmax())
    return int((ids == eos_token_id).int().argmax())
