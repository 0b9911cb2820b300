"""Checkpoints that load with a warning at most, and give other numbers than their name says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.errors import ModelLoadError
from tasks.settings import Settings
from tests.workers.checkpoints import ARCHITECTURE, pictures, save_open_clip
from tests.workers.requests import call_of
from tests.workers.test_checkpoints import cached, empty_cache, offline  # noqa: F401  (fixtures)
from tests.workers.test_clip_models import cosines, save_hps
from workers.loading.cache import LoadedModel, ModelCache
from workers.loading.load_warnings import Said
from workers.models.refusals import refuse_other_numbers

Edit = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def _as_in_a_worker():
    """Python's warnings are shown, not raised: what is refused here is refused by us."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


def load(model: str, **options: Any) -> LoadedModel:
    """A built-in as a new worker for the CPU loads it."""
    entry = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    with ModelCache(Settings(device="cpu")).lend(call_of(reward_model=model, dtype="float32", **entry)) as loaded:
        return loaded


def why_not(model: str, **options: Any) -> str:
    """Why it cannot be loaded."""
    with pytest.raises(ModelLoadError) as caught:
        load(model, **options)
    return str(caught.value)


@pytest.fixture
def damaged(tmp_path) -> Callable[..., Path]:
    """Copies a checkpoint and edits one JSON file, or its weights: `damaged(folder, "config.json", edit)`."""

    def copy(folder: Path, file: str, edit: Edit) -> Path:
        target = Path(shutil.copytree(folder, tmp_path / f"damaged-{len(list(tmp_path.iterdir()))}"))
        path = target / file
        if file.endswith(".safetensors"):
            weights = load_file(path)
            edit(weights)
            save_file(weights, path, metadata={"format": "pt"})
        elif file.endswith(".json"):
            content = json.loads(path.read_text())
            edit(content)
            path.write_text(json.dumps(content))
        else:
            path.write_text(edit(path.read_text()))
        return target

    return copy


def sets(*path: str, **values: Any) -> Edit:
    """An edit that sets keys below a path; None removes one."""

    def edit(content: dict[str, Any]) -> None:
        for step in path:
            content = content[step]
        for name, value in values.items():
            content[name] = value
            if value is None:
                del content[name]

    return edit


# --- transformers --------------------------------------------------------------------------------


def says_twice(content: dict[str, Any]) -> None:
    """As old ones: what `text_config_dict` leaves out, the activation, is transformers' default."""
    text = content["text_config"]
    text["hidden_act"] = "gelu"
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    content["text_config_dict"] = {name: text[name] for name in sizes if name in text}


def keep_few_merges(text: str) -> str:
    return "\n".join(text.splitlines()[:60]) + "\n"


def add(**weights: torch.Tensor) -> Edit:
    return lambda content: content.update({name.replace("__", "."): one for name, one in weights.items()})


CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"


@pytest.mark.parametrize(
    ("file", "edit", "words"),
    [
        (
            CONFIG,
            sets("text_config", num_hidden_layers=1),
            "16 weights that the model does not have, text_model.enc",
        ),
        (CONFIG, sets("vision_config", num_hidden_layers=3), "lacks 16 of the weights, vision_model.encoder.layers.2."),
        (CONFIG, sets(model_type="siglip"), "is a model of type 'siglip', and this reward needs one of type 'clip'"),
        (CONFIG, sets("text_config", eos_token_id=7), "and the model reads a text at its first token 7"),
        (CONFIG, sets("text_config", vocab_size=49_000), "49408 tokens, the model 49000"),
        (WEIGHTS, add(classifier__weight=torch.ones(2, 32)), "does not have, classifier.weight first"),
        (
            WEIGHTS,
            add(text_projection__weight=torch.ones(16, 64)),
            "text_projection.weight first ((16, 64) and (32, 64)",
        ),
        (WEIGHTS, lambda weights: weights.pop("logit_scale"), "lacks 1 of the weights, logit_scale first"),
        ("tokenizer_config.json", sets(tokenizer_class="GPT2Tokenizer"), "ends a text with token"),
        ("merges.txt", keep_few_merges, "does not read 'photo' as the token 'photo</w>' of its own vocabulary"),
        (PROCESSOR, sets(image_processor_type="SiglipImageProcessor"), "is a SiglipImageProcessor"),
        (PROCESSOR, sets(rescale_factor=1 / 127.5), "scales by 0.00784314 instead of 1/255"),
        (PROCESSOR, sets(crop_size={"height": 336, "width": 336}), "makes images of (336, 336), the model sees (224, "),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith((".json", ".txt", ".safetensors")) else "",
)
def test_a_clip_that_is_not_what_its_files_describe_is_refused(damaged, clip_folder, file, edit, words):
    if file == CONFIG and "49000" in words:
        folder = damaged(damaged(clip_folder, file, edit), WEIGHTS, lambda weights: weights.update(shorter(weights)))
    else:
        folder = damaged(clip_folder, file, edit)
    said = why_not("CLIP", model_name_or_path=folder)
    assert said.startswith("model_name_or_path: ")
    assert str(folder) in said
    assert words in said


def shorter(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A vocabulary without its last tokens."""
    name = "text_model.embeddings.token_embedding.weight"
    return {name: weights[name][:49_000].contiguous()}


def test_what_a_library_says_once_a_process_is_refused_at_each_load(damaged, clip_folder, open_clip_folder):
    other_kind = damaged(clip_folder, CONFIG, sets(model_type="siglip"))
    stretched = damaged(open_clip_folder, "open_clip_config.json", sets("model_cfg", "vision_cfg", image_size=256))
    for options in ({"model": "CLIP", "model_name_or_path": other_kind}, of_open_clip(f"local-dir:{stretched}")):
        assert why_not(**options) == why_not(**options)


def test_the_option_that_names_the_processor_is_the_one_to_change(damaged, clip_folder):
    other = damaged(clip_folder, "merges.txt", keep_few_merges)
    said = why_not("PickScore", model_name_or_path=clip_folder, processor_name_or_path=other)
    assert said.startswith("processor_name_or_path: ")
    assert str(other) in said


def test_a_clip_with_an_adapter_beside_it_is_refused(tmp_path, clip_folder):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "adapted"))
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json)" in why_not("CLIP", model_name_or_path=folder)


@pytest.mark.parametrize(
    ("file", "edit", "words"),
    [
        (
            CONFIG,
            sets("text_config", pad_token_id=-1),
            "pad_token_id must be `None` or an integer within the vocabulary",
        ),
        (CONFIG, sets(model_type=None), "config.json does not say its model_type"),
        (CONFIG, says_twice, "hidden_act 'gelu' in text_config, text_config_dict counts: it is 'quick_gelu'"),
        (PROCESSOR, sets(image_mean=None, image_std=None), "does not say image_mean, image_std; CLIP's own are taken"),
        (PROCESSOR, sets(image_processor_type=None), "does not say its kind"),
    ],
)
def test_what_is_harmless_or_unknown_is_recorded_at_each_load(damaged, clip_folder, file, edit, words):
    folder = damaged(clip_folder, file, edit)
    for _ in range(2):
        (said,) = load("CLIP", model_name_or_path=folder).load_warnings
        assert words in said


def test_what_a_library_says_in_words_unknown_here_is_recorded(clip_folder, monkeypatch):
    import logging

    import transformers

    from_pretrained = transformers.CLIPModel.from_pretrained

    def talkative(*arguments: Any, **options: Any) -> Any:
        logging.getLogger("transformers.modeling_utils").warning("the moon is full")
        return from_pretrained(*arguments, **options)

    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", talkative)
    assert load("CLIP", model_name_or_path=clip_folder).load_warnings == ("the moon is full",)


def test_buffers_that_clips_of_before_2023_have_are_no_weights_too_many(damaged, clip_folder):
    """`openai/clip-vit-large-patch14` has them."""
    old = {
        "text_model__embeddings__position_ids": torch.arange(77)[None],
        "vision_model__embeddings__position_ids": torch.arange(50)[None],
    }
    folder = damaged(clip_folder, WEIGHTS, add(**old))
    folder = damaged(folder, PROCESSOR, sets(image_processor_type=None, feature_extractor_type="CLIPFeatureExtractor"))
    loaded = load("CLIP", model_name_or_path=folder)
    assert loaded.load_warnings == ()
    images, prompts = pictures(2, seed=3), ["a red cat", "fog"]
    expected = load("CLIP", model_name_or_path=clip_folder).model(prompts, image=images).rewards
    assert torch.equal(loaded.model(prompts, image=images).rewards, expected)


# --- open_clip -----------------------------------------------------------------------------------


def of_open_clip(name: object, **options: Any) -> dict[str, Any]:
    return {"model": "CLIP", "backend": "open_clip", "model_name_or_path": str(name), **options}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            sets("preprocess_cfg", image_mean=[0.5] * 3),
            "says 'image_mean' in preprocess_cfg, which open_clip does not know",
        ),
        (sets("model_cfg", "vision_cfg", image_size=256), "are those of another image size or context length"),
        (sets("model_cfg", "text_cfg", context_length=64), "are those of another image size or context length"),
        (sets("model_cfg", "vision_cfg", layers=3), "cannot be loaded (RuntimeError: Error(s) in loading state_dict"),
    ],
)
def test_an_open_clip_model_that_is_not_what_its_config_describes_is_refused(damaged, open_clip_folder, edit, words):
    folder = damaged(open_clip_folder, "open_clip_config.json", edit)
    said = why_not(**of_open_clip(f"local-dir:{folder}"))
    assert said.startswith("model_name_or_path: ")
    assert words in said


def test_a_mean_that_is_not_said_is_recorded(damaged, open_clip_folder):
    folder = damaged(open_clip_folder, "open_clip_config.json", sets("preprocess_cfg", mean=None))
    (said,) = load(**of_open_clip(f"local-dir:{folder}")).load_warnings
    assert said == "open_clip_config.json does not say the mean of its images; OpenAI's are taken"


def test_weights_that_would_be_ignored_are_refused(open_clip_folder):
    said = why_not(**of_open_clip(f"local-dir:{open_clip_folder}", pretrained="openai"))
    assert "pretrained: 'openai' would be ignored" in said


def test_of_several_files_of_weights_none_is_taken_by_the_alphabet(tmp_path, open_clip_folder):
    folder = Path(shutil.copytree(open_clip_folder, tmp_path / "several"))
    (folder / "open_clip_pytorch_model.bin").rename(folder / "a.bin")
    assert "Multiple checkpoints found" in str(load(**of_open_clip(f"local-dir:{folder}")).load_warnings), "only one"
    shutil.copy(folder / "a.bin", folder / "b.bin")
    assert "several files of weights, a.bin, b.bin" in why_not(**of_open_clip(f"local-dir:{folder}"))


@pytest.mark.parametrize(
    ("architecture", "tag", "needed"),
    [
        ("ViT-B-32", "openai", "ViT-B-32-quickgelu"),
        ("ViT-B/32", "openai", "ViT-B-32-quickgelu"),
        ("ViT-H-14", "DFN5B", "ViT-H-14-quickgelu"),
    ],
)
def test_an_architecture_of_another_activation_than_its_weights_is_refused(offline, architecture, tag, needed):  # noqa: F811
    said = why_not(**of_open_clip(architecture, pretrained=tag))
    assert "computes with GELU" in said
    assert said.endswith(f"write model_name_or_path: {needed}")
    with pytest.raises(ModelLoadError, match="cannot be loaded"):  # it is looked for: the cache is empty
        load(**of_open_clip(needed, pretrained=tag))


PROMPTS, IMAGES = ["a red cat", "fog", "two dogs"], pictures(3, seed=12)


def test_the_activation_is_that_of_the_weights(cached, tmp_path, monkeypatch):  # noqa: F811
    quick = {**ARCHITECTURE, "quick_gelu": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32-quickgelu", quick)  # smaller ones of these names
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", ARCHITECTURE)
    folder = save_open_clip(tmp_path / "published", seed=31)
    cached("timm/vit_base_patch32_clip_224.openai", folder)
    direct, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    by_gelu = cosines(direct, open_clip.get_tokenizer("ViT-B-32"), preprocess, PROMPTS, IMAGES)
    loaded = load(**of_open_clip("ViT-B-32-quickgelu", pretrained="openai"))
    found = loaded.model(PROMPTS, image=IMAGES).rewards.numpy()
    for tower in (direct.visual, direct):
        for block in tower.transformer.resblocks:
            block.mlp.gelu = open_clip.transformer.QuickGELU()
    by_quick_gelu = cosines(direct, open_clip.get_tokenizer("ViT-B-32"), preprocess, PROMPTS, IMAGES)
    assert np.abs(np.subtract(by_gelu, by_quick_gelu)).max() > 1e-3, "the activation must matter"
    np.testing.assert_allclose(found, by_quick_gelu, rtol=0, atol=1e-5)
    assert loaded.load_warnings == ()
    in_cache = next(Path(tmp_path).glob("cache/models--timm*/snapshots/*/open_clip_pytorch_model.bin"))
    said = why_not(**of_open_clip("ViT-B-32", pretrained=str(in_cache)))
    assert "QuickGELU" in said
    assert "ViT-B-32-quickgelu" in said


def test_an_architecture_that_has_but_one_activation_is_not_refused_for_it(cached, tmp_path, monkeypatch):  # noqa: F811
    assert open_clip.get_model_config("roberta-ViT-B-32")["quick_gelu"]
    quick = {**ARCHITECTURE, "quick_gelu": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "roberta-ViT-B-32", quick)  # a smaller one of that name
    folder = save_open_clip(tmp_path / "published", seed=32)
    cached("laion/CLIP-ViT-B-32-roberta-base-laion2B-s12B-b32k", folder)
    (said,) = load(**of_open_clip("roberta-ViT-B-32", pretrained="laion2b_s12b_b32k")).load_warnings
    assert "'roberta-ViT-B-32' computes with QuickGELU" in said


def test_a_file_of_weights_that_does_not_say_its_activation_is_recorded(open_clip_folder, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", ARCHITECTURE)
    file = open_clip_folder / "open_clip_pytorch_model.bin"
    (said,) = load(**of_open_clip("ViT-B-32", pretrained=str(file))).load_warnings
    assert "does not say the activation it was trained with: ViT-B-32 computes with GELU" in said
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32-256", ARCHITECTURE)
    assert load(**of_open_clip("ViT-B-32-256", pretrained=str(file))).load_warnings == (), (
        "all published ones are alike"
    )


def test_a_file_of_weights_that_need_other_preprocessing_is_refused(open_clip_folder):
    file = open_clip_folder / "open_clip_pytorch_model.bin"
    said = why_not(**of_open_clip("ViT-B-16-SigLIP", pretrained=str(file)))
    assert said.startswith("pretrained: ")
    assert "'resize_mode': 'squash'" in said
    assert "local-dir:" in said


# --- the others ----------------------------------------------------------------------------------


def test_an_hps_of_the_other_version_is_refused(tmp_path):
    folder = save_hps(tmp_path)
    said = why_not("HPSv2", checkpoint_path=folder / "HPS_v2_compressed.pt")
    assert "is by its name HPS v2.0, and hps_version says v2.1; write hps_version: v2.0" in said
    said = why_not("HPSv2", checkpoint_path=folder / "HPS_v2.1_compressed.pt", hps_version="v2.0")
    assert "write hps_version: v2.1" in said


def test_an_aesthetic_head_with_a_layer_more_or_on_another_clip_is_refused(
    tmp_path, clip_folder, large_clip_folder, head_file
):
    weights = torch.load(head_file, weights_only=True)
    torch.save({**weights, "layers.9.weight": torch.ones(1, 1)}, tmp_path / "head.pth")
    said = why_not("aesthetic", model_name_or_path=large_clip_folder, checkpoint_path=tmp_path / "head.pth")
    assert "1 weights that the head does not have, layers.9.weight first" in said
    said = why_not("aesthetic", model_name_or_path=clip_folder, checkpoint_path=head_file)
    assert "makes embeddings of 32 numbers, the aesthetic head takes 768" in said


def test_a_good_checkpoint_records_nothing(
    clip_folder, legacy_clip_folder, large_clip_folder, head_file, open_clip_folder, tmp_path, monkeypatch
):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", ARCHITECTURE)
    hps = save_hps(tmp_path)
    both = {"model_name_or_path": legacy_clip_folder, "processor_name_or_path": clip_folder}
    for options in (
        {"model": "CLIP", "model_name_or_path": clip_folder},
        {"model": "PickScore", **both},
        {"model": "aesthetic", "model_name_or_path": large_clip_folder, "checkpoint_path": head_file},
        of_open_clip(f"local-dir:{open_clip_folder}"),
        {"model": "HPSv2", "checkpoint_path": hps},
        {"model": "OCR"},
        {"model": "jpeg_compressibility"},
    ):
        assert load(**options).load_warnings == (), options["model"]


# --- the net beneath -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Some weights of CLIPModel were not initialized from the model checkpoint at x and are newly initialized: a",
        "Some weights of the model checkpoint at x were not used when initializing CLIPModel: ['a']",
        "CLIPModel LOAD REPORT from: x\nKey | Status\nlogit_scale | MISSING",
        "You are using a model of type `siglip` to instantiate a model of type `clip`. This may be expected",
        "You are using a model of type siglip to instantiate a model of type clip. This is not supported for all",
        "The tokenizer class you load from this checkpoint is not the same type as the class this function is called",
        "QuickGELU mismatch between final model config (quick_gelu=False) and pretrained tag 'openai'",
        "No pretrained weights loaded for model 'ViT-B-32'. Model initialized randomly.",
        "Model ViT-B-32 initialized partially.",
        "Local config loaded, but no CLIP weights found in /x",
        "Could not find/download default weights on HF Hub for a/b: 404",
        "Ignoring `pretrained='openai'` because `model_name` has 'local-dir' schema.",
        "Multiple checkpoints found in /x: ['a.bin', 'b.bin']. Using 'a.bin'.",
        "Could not load config from hf-hub:a/b (404).Falling back to using model_id for tokenizer.",
        "Model configuration not found, returning default SimpleTokenizer.",
        "The tokenizer you are loading from 'x' with an incorrect regex pattern: https://a.b",
        "Resizing position embedding grid-size from [7, 7] to [8, 8]",
    ],
)
def test_a_warning_in_the_libraries_words_that_means_other_numbers_is_refused_with_advice(text):
    with pytest.raises(ModelLoadError) as caught:
        refuse_other_numbers("model_name_or_path", "org/clip", [Said("b", "harmless"), Said("transformers", text)])
    assert str(caught.value).startswith("model_name_or_path: 'org/clip' would give other numbers than its name says")
    assert " ".join(text.split())[:60] in str(caught.value)
    assert ";" in str(caught.value), "and what to write"


@pytest.mark.parametrize(
    "said",
    [
        Said("transformers", "`torch_dtype` is deprecated! Use `dtype` instead!"),
        Said("huggingface_hub.utils._http", "Warning: You are sending unauthenticated requests to the HF Hub."),
        Said("root", "Multiple checkpoints found in /x: ['a.bin']. Using 'a.bin'."),
        Said("FutureWarning", "`clean_up_tokenization_spaces` was not set."),
        Said("UserWarning", "/x/ViT-B-32.pt exists, but the SHA256 checksum does not match; re-downloading the file"),
        Said(
            "rewardq",
            "config.json says hidden_act 'gelu' in text_config, which means other weights were newly initialized",
        ),
    ],
)
def test_a_warning_that_changes_no_number_is_no_reason_to_refuse(said):
    refuse_other_numbers("model_name_or_path", "org/clip", [said])
