from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image

from tasks.errors import ConfigError, ModelLoadError
from tasks.rewards import RewardConfig, RewardSpec
from tasks.settings import Settings
from tests.workers.checkpoints import (
    ARCHITECTURE,
    END_OF_TEXT,
    START_OF_TEXT,
    Reference,
    pictures,
    save_clip,
    save_head,
)
from workers.loading.building import build
from workers.models.clip_pixels import Preprocessing

PROMPTS = ["a red cat", "two dogs on a beach", "a red cat", "Ein Haus, groß & blau!", "fog", "a red cat", "", "fog"]
IMAGES = pictures(8)
EXACT = {"rtol": 0, "atol": 1e-5}


def spec_of(model: str, dtype: str = "float32", **entry: Any) -> RewardSpec:
    (spec,) = RewardConfig.from_dict({"rewards": {"reward_model": model, "dtype": dtype, **entry}}).rewards
    return spec


def load(model: str, **entry: Any) -> Any:
    """A built-in as a worker for the CPU builds it."""
    return build(spec_of(model, **{k: str(v) if isinstance(v, Path) else v for k, v in entry.items()}).call, CPU)


CPU = Settings(device="cpu")


def rewards(model: Any, prompts: Sequence[str], **media: Any) -> np.ndarray:
    found = model(list(prompts), **media).rewards
    assert found.dtype == torch.float32
    assert found.shape == (len(prompts),)
    return found.numpy()


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_tensor():
    """Small tensors are slower on several cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pick_score(clip_folder):
    return load("PickScore", model_name_or_path=clip_folder, processor_name_or_path=clip_folder)


@pytest.fixture(scope="module")
def clip(clip_folder):
    return load("CLIP", model_name_or_path=clip_folder)


@pytest.fixture(scope="module")
def reference(clip_folder):
    return Reference(clip_folder)


@pytest.fixture(scope="module")
def tiny_architecture(checkpoints):
    """The name of an open_clip architecture that is small."""
    file = checkpoints / "tiny-for-tests.json"
    file.write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(file)
    return file.stem


# --- the same numbers by other ways --------------------------------------------------------------------


@torch.no_grad()
def cosines(
    direct: Any,
    tokenizer: Any,
    see: Callable[[Image.Image], torch.Tensor],
    prompts: Sequence[str],
    images: Sequence[Image.Image],
) -> np.ndarray:
    """Those of an open_clip model by its own functions."""
    seen = direct.eval().encode_image(torch.stack([see(i) for i in images]), normalize=True)
    texts = direct.encode_text(tokenizer(list(prompts)), normalize=True)
    return (seen * texts).sum(-1).numpy()


def seen_by_hps(image: Image.Image) -> torch.Tensor:
    """The image in a black square of 224, its longer edge resized as a float tensor."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F  # noqa: N812

    pixels = F.to_tensor(image)
    scale = 224 / max(image.size)
    height, width = round(image.height * scale), round(image.width * scale)
    resized = F.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
    left, top = (224 - width) // 2, (224 - height) // 2
    square = F.pad(resized, [left, top, 224 - width - left, 224 - height - top])
    return F.normalize(square, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def ratings(clip_folder: Path, head_file: Path, images: Sequence[Image.Image]) -> list[float]:
    """Aesthetic ratings by transformers, and by NumPy in float64 from the embedding on."""
    reference = Reference(clip_folder)
    weights = {name: w.double().numpy() for name, w in torch.load(head_file).items()}
    found = []
    for image in images:
        pixels = reference.processor(images=[image], return_tensors="pt").pixel_values
        with torch.no_grad():
            hidden = reference.model.vision_model(pixel_values=pixels).pooler_output
            embedding = reference.model.visual_projection(hidden)[0].double().numpy()
        x = embedding / np.linalg.norm(embedding)
        for at in (0, 2, 4, 6, 7):
            x = weights[f"layers.{at}.weight"] @ x + weights[f"layers.{at}.bias"]
        found.append(x.item())
    return found


# --- the numbers -------------------------------------------------------------------------------------


def test_pickscore_is_transformers_logit_over_26(pick_score, reference):
    expected = [reference.logit(p, i) / 26 for p, i in zip(PROMPTS, IMAGES, strict=True)]
    assert np.ptp(expected) > 0.1, "inputs must matter"
    np.testing.assert_allclose(rewards(pick_score, PROMPTS, image=IMAGES), expected, **EXACT)


def test_clip_is_transformers_cosine(clip, reference):
    expected = [reference.cosine(p, i) for p, i in zip(PROMPTS, IMAGES, strict=True)]
    assert np.ptp(expected) > 0.02, "inputs must matter"
    np.testing.assert_allclose(rewards(clip, PROMPTS, image=IMAGES), expected, **EXACT)


@pytest.mark.parametrize("by", ["architecture and file", "local-dir"])
def test_clip_is_open_clips_cosine(open_clip_folder, tiny_architecture, by):
    weights = str(open_clip_folder / "open_clip_pytorch_model.bin")
    named = (
        {"model_name_or_path": tiny_architecture, "pretrained": weights}
        if by == "architecture and file"
        else {"model_name_or_path": f"local-dir:{open_clip_folder}"}
    )
    direct, _, preprocess = open_clip.create_model_and_transforms(tiny_architecture, pretrained=weights)
    expected = cosines(direct, open_clip.get_tokenizer(tiny_architecture), preprocess, PROMPTS, IMAGES)
    assert np.ptp(expected) > 0.02, "inputs must matter"
    found = rewards(load("CLIP", backend="open_clip", **named), PROMPTS, image=IMAGES)
    np.testing.assert_allclose(found, expected, **EXACT)


@pytest.fixture
def hps_folder(tiny_architecture, tmp_path, monkeypatch):
    """A folder with both checkpoints as they are published, but of a small architecture."""
    from workers.models.hps import HPSv2

    monkeypatch.setattr(HPSv2, "architecture", tiny_architecture)
    return save_hps(tmp_path)


def save_hps(folder: Path) -> Path:
    for seed, file in enumerate(("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")):
        torch.manual_seed(30 + seed)
        torch.save({"epoch": 1, "state_dict": open_clip.CLIP(**ARCHITECTURE).state_dict()}, folder / file)
    return folder


def hps_by_hand(folder: Path, file: str, prompts: Sequence[str], images: Sequence[Image.Image]) -> np.ndarray:
    direct = open_clip.CLIP(**ARCHITECTURE)
    direct.load_state_dict(torch.load(folder / file)["state_dict"])
    return cosines(direct, open_clip.get_tokenizer("ViT-H-14"), seen_by_hps, prompts, images)


@pytest.mark.parametrize(("version", "file"), [("v2.0", "HPS_v2_compressed.pt"), ("v2.1", "HPS_v2.1_compressed.pt")])
def test_hps_is_the_cosine_of_its_checkpoint_on_images_seen_whole(hps_folder, version, file):
    expected = hps_by_hand(hps_folder, file, PROMPTS, IMAGES)
    assert np.ptp(expected) > 0.02, "inputs must matter"
    found = rewards(load("HPSv2", hps_version=version, checkpoint_path=hps_folder), PROMPTS, image=IMAGES)
    np.testing.assert_allclose(found, expected, **EXACT)


def test_aesthetic_is_five_affine_layers_on_the_normalised_embedding(large_clip_folder, head_file):
    expected = ratings(large_clip_folder, head_file, IMAGES)
    assert np.ptp(expected) > 0.01, "inputs must matter"
    model = load("aesthetic", model_name_or_path=large_clip_folder, checkpoint_path=head_file)
    np.testing.assert_allclose(rewards(model, [""] * len(IMAGES), image=IMAGES), expected, **EXACT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_honoured_and_close(clip_folder, large_clip_folder, head_file, dtype):
    pick = {"model_name_or_path": clip_folder, "processor_name_or_path": clip_folder}
    rating = {"model_name_or_path": large_clip_folder, "checkpoint_path": head_file}
    for name, options, scale in (("PickScore", pick, 100 / 26), ("aesthetic", rating, 4.0)):
        half, exact = load(name, dtype=dtype, **options), load(name, **options)
        tower = half.tower._model
        assert {p.dtype for p in tower.parameters()} == {getattr(torch, dtype)}
        found, expected = rewards(half, PROMPTS, image=IMAGES), rewards(exact, PROMPTS, image=IMAGES)
        assert not np.array_equal(found, expected)
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.01 * scale)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_open_clip_in_half_precision_is_close(open_clip_folder, hps_folder, dtype):
    clip = {"backend": "open_clip", "model_name_or_path": f"local-dir:{open_clip_folder}"}
    for name, options in (("CLIP", clip), ("HPSv2", {"checkpoint_path": hps_folder})):
        half, exact = load(name, dtype=dtype, **options), load(name, **options)
        assert {p.dtype for p in half.tower._model.parameters()} == {getattr(torch, dtype)}
        found, expected = rewards(half, PROMPTS, image=IMAGES), rewards(exact, PROMPTS, image=IMAGES)
        assert not np.array_equal(found, expected)
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.01)


def test_pickscores_scale_is_not_rounded_to_half_precision(clip_folder):
    model = load("PickScore", dtype="bfloat16", model_name_or_path=clip_folder, processor_name_or_path=clip_folder)
    assert model.scale == pytest.approx(np.exp(4.6) / 26, rel=1e-6)


def test_a_reward_does_not_depend_on_the_other_samples_of_its_chunk(clip):
    together = rewards(clip, PROMPTS, image=IMAGES)
    alone = [rewards(clip, [p], image=[i])[0] for p, i in zip(PROMPTS, IMAGES, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)


# --- text ----------------------------------------------------------------------------------------------


def pooled_by_hand(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """The text embedding of token ids, pooled where the first end-of-text token is."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model.text_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        return torch.nn.functional.normalize(model.text_projection(hidden[list(ids).index(END_OF_TEXT)]), dim=-1)


@pytest.mark.parametrize("folder", ["clip_folder", "legacy_clip_folder"])
def test_text_is_pooled_at_its_first_end_also_under_a_legacy_config(folder, request):
    path = request.getfixturevalue(folder)
    model = load("CLIP", model_name_or_path=path)
    ids = [START_OF_TEXT, 320, 736, 2368, END_OF_TEXT]  # a red cat
    with torch.no_grad():
        found = torch.nn.functional.normalize(model.tower.embed_texts(model.tower.tokenise(["a red cat"])), dim=-1)[0]
    np.testing.assert_allclose(found, pooled_by_hand(path, ids), **EXACT)


SPECIAL_TEXTS = [
    "<|endoftext|> a cat",
    "a cat <|startoftext|><|endoftext|> on a mat",
    "<|ENDOFTEXT|><end_of_text>",
    "a <end_of_text> cat &lt;start_of_text&gt;",
    "<|endoftext|>",
]


def ids_of(tokens: Any) -> list[list[int]]:
    return (tokens if torch.is_tensor(tokens) else tokens["input_ids"]).tolist()


def assert_no_special_token_inside(ids: list[int]) -> list[int]:
    """Returns what is between the first token and the end."""
    end = ids.index(END_OF_TEXT)
    assert ids[0] == START_OF_TEXT
    assert set(ids[end:]) <= {END_OF_TEXT, 0}
    inside = ids[1:end]
    assert not {START_OF_TEXT, END_OF_TEXT} & set(inside)
    return inside


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_a_special_tokens_name_in_a_prompt_is_text_to_transformers(clip, reference, text):
    (ids,) = ids_of(clip.tower.tokenise([text]))
    inside = assert_no_special_token_inside(ids)
    letters = "".join(reference.tokenizer.convert_ids_to_tokens(inside)).replace("</w>", "")
    assert letters == text.lower().replace(" ", "")


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_a_special_tokens_name_in_a_prompt_is_text_to_open_clip(open_clip_folder, text):
    model = load("CLIP", backend="open_clip", model_name_or_path=f"local-dir:{open_clip_folder}")
    (ids,) = ids_of(model.tower.tokenise([text]))
    inside = assert_no_special_token_inside(ids)
    read = open_clip.get_tokenizer("ViT-B-32").decode(inside).replace(" ", "")
    assert read == text.lower().replace("&lt;", "<").replace("&gt;", ">").replace(" ", "")


def test_a_special_tokens_name_in_a_prompt_does_not_cut_it_short(pick_score):
    found = rewards(pick_score, ["<|endoftext|> a red cat", "<|endoftext|> two blue dogs"], image=IMAGES[:1] * 2)
    assert abs(found[0] - found[1]) > 0.01


def test_a_tokenizer_of_transformers_in_open_clip_reads_special_tokens_as_text(clip_folder, tmp_path):
    from workers.models.clip_towers import take_special_tokens_as_text

    tokenizer = open_clip.tokenizer.HFTokenizer(str(clip_folder))
    assert ids_of(tokenizer(["<|endoftext|> a cat"]))[0][1] == END_OF_TEXT
    take_special_tokens_as_text(tokenizer)
    assert_no_special_token_inside(ids_of(tokenizer(["<|endoftext|> a cat"]))[0])


@pytest.mark.parametrize("backend", ["transformers", "open_clip"])
def test_a_long_prompt_is_cut_at_77_tokens(backend, clip_folder, open_clip_folder):
    name = clip_folder if backend == "transformers" else f"local-dir:{open_clip_folder}"
    model = load("CLIP", backend=backend, model_name_or_path=name)
    long = "cat " * 75
    (ids,) = ids_of(model.tower.tokenise([long + "dog " * 200]))
    assert ids == [START_OF_TEXT] + [2368] * 75 + [END_OF_TEXT]
    found = rewards(model, [long, long + "and much more of it", long[:-4] + "dog"], image=IMAGES[:1] * 3)
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert abs(found[0] - found[2]) > 1e-4


@pytest.mark.parametrize("backend", ["transformers", "open_clip"])
def test_each_distinct_prompt_of_a_chunk_is_encoded_once(backend, clip_folder, open_clip_folder, monkeypatch):
    name = clip_folder if backend == "transformers" else f"local-dir:{open_clip_folder}"
    model = load("CLIP", backend=backend, model_name_or_path=name)
    encode, encoded = model.tower.embed_texts, []

    def counting(tokens):
        encoded.append(len(ids_of(tokens)))
        return encode(tokens)

    monkeypatch.setattr(model.tower, "embed_texts", counting)
    rewards(model, ["a group's prompt"] * 8, image=IMAGES)
    rewards(model, PROMPTS, image=IMAGES)
    assert encoded == [1, 5]


# --- images and videos ---------------------------------------------------------------------------------


def test_preprocessing_is_that_of_transformers_pil_processor(clip, reference):
    seen = clip.tower.preprocessing
    for image in IMAGES:
        expected = reference.processor(images=[image], return_tensors="np").pixel_values[0]
        np.testing.assert_allclose(seen.normalised(seen.pixels([image], "cpu"))[0], expected, rtol=0, atol=1e-6)


def test_preprocessing_is_open_clips(open_clip_folder, tiny_architecture):
    seen = load("CLIP", backend="open_clip", model_name_or_path=f"local-dir:{open_clip_folder}").tower.preprocessing
    _, _, preprocess = open_clip.create_model_and_transforms(tiny_architecture)
    for image in IMAGES:
        found = seen.normalised(seen.pixels([image], "cpu"))[0]
        np.testing.assert_allclose(found, preprocess(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"size": 224, "resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
        {"size": 224, "resize_mode": "longest"},
        {"size": (224, 160), "resize_mode": "squash"},
        {"size": 336},
    ],
    ids=["squashed", "whole", "not square", "larger"],
)
def test_other_preprocessing_of_open_clip_models_is_theirs(config):
    from dataclasses import asdict

    from workers.models.clip_pixels import of_open_clip

    full = open_clip.transform.PreprocessCfg(**config)
    seen = of_open_clip(asdict(full), "pil")
    preprocess = open_clip.transform.image_transform_v2(full, is_train=False)
    for image in IMAGES:
        found = seen.normalised(seen.pixels([image], "cpu"))[0]
        np.testing.assert_allclose(found, preprocess(image), rtol=0, atol=1e-6)


def test_preprocessing_unknown_here_is_refused():
    from dataclasses import asdict

    from workers.models.clip_pixels import of_open_clip, of_transformers

    with pytest.raises(ValueError, match="not square"):
        of_open_clip(asdict(open_clip.transform.PreprocessCfg(size=(224, 160))), "pil")
    with pytest.raises(ValueError, match="filter 1"):
        of_transformers(transformers.CLIPImageProcessor(resample=1), "pil")
    with pytest.raises(ValueError, match="does not rescale and normalise"):
        of_transformers(transformers.CLIPImageProcessor(do_normalize=False), "pil")
    with pytest.raises(ValueError, match="neither crops"):
        of_transformers(transformers.CLIPImageProcessor(do_center_crop=False), "pil")


def test_the_tensor_backend_is_close_and_another_computation(clip_folder, clip):
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F  # noqa: N812

    other = load("CLIP", model_name_or_path=clip_folder, preprocessing="tensor")
    by_tensor = other.tower.preprocessing.pixels(IMAGES, torch.device("cpu"))
    for image, found in zip(IMAGES, by_tensor, strict=True):
        levels = F.pil_to_tensor(image).float()
        resized = F.resize(levels, [224], InterpolationMode.BICUBIC, antialias=True).clamp(0, 255).round()
        top, left = (resized.shape[1] - 224) // 2, (resized.shape[2] - 224) // 2
        assert torch.equal(found, resized[:, top : top + 224, left : left + 224])
    by_pil = clip.tower.preprocessing.pixels(IMAGES, torch.device("cpu"))
    assert by_pil.dtype == torch.uint8
    assert (by_tensor - by_pil.float()).abs().mean() < 0.3
    found, expected = rewards(other, PROMPTS, image=IMAGES), rewards(clip, PROMPTS, image=IMAGES)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert spec_of("CLIP").fingerprint != spec_of("CLIP", preprocessing="tensor").fingerprint
    assert spec_of("CLIP").fingerprint == spec_of("CLIP", preprocessing="auto").fingerprint


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("fit", ["shortest", "longest", "squash", None])
def test_eight_bits_are_nearly_pillow_s(fit, interpolation):
    by_pil = Preprocessing(fit, (224, 224), (224, 224), (0.5,) * 3, (0.5,) * 3, interpolation)
    by_uint8 = dataclasses.replace(by_pil, backend="uint8")
    rng = np.random.default_rng(0)
    shapes = [(1024, 1024), (768, 512), (100, 640), (224, 224), (37, 60), (1, 9), (3, 2)]
    pictures = [Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]
    # Edges between black and white, where a filter overshoots.
    pictures.append(
        Image.fromarray(np.kron(rng.integers(0, 2, (64, 64, 1)), np.ones((16, 16, 3))).astype(np.uint8) * 255)
    )
    expected = by_pil.pixels(pictures, "cpu")
    found = by_uint8.pixels(pictures, "cpu")
    assert found.dtype == expected.dtype == torch.uint8
    assert found.shape == expected.shape
    apart = (found.int() - expected.int()).abs()
    assert apart[:2].max() <= 1, "of images that are made smaller"
    assert apart.max() <= 2
    assert (apart > 0).float().mean() < 0.02


def test_who_resizes_is_pillow_unless_the_dtype_errs_by_more(clip_folder):
    resizes = {}
    for dtype in ("float32", "bfloat16", "float16"):
        resizes[dtype] = load("CLIP", model_name_or_path=clip_folder, dtype=dtype).tower.preprocessing.backend
    assert resizes == {"float32": "pil", "bfloat16": "uint8", "float16": "uint8"}
    said = load("CLIP", model_name_or_path=clip_folder, dtype="bfloat16", preprocessing="pil")
    assert said.tower.preprocessing.backend == "pil"


def test_an_image_that_is_not_rgb_is_scored_as_rgb(clip):
    grey = IMAGES[0].convert("L")
    assert rewards(clip, ["a"], image=[grey]) == rewards(clip, ["a"], image=[grey.convert("RGB")])


VIDEOS = [pictures(3, seed=7)[:1] * 2, [i.resize((300, 200)) for i in pictures(5, seed=8)], pictures(1, seed=9)]
VIDEO_PROMPTS = ["a red cat", "fog", "a red cat"]


def test_a_videos_pickscore_is_the_mean_over_its_frames(pick_score, reference):
    expected = [
        np.mean([reference.logit(p, f) / 26 for f in frames]) for p, frames in zip(VIDEO_PROMPTS, VIDEOS, strict=True)
    ]
    np.testing.assert_allclose(rewards(pick_score, VIDEO_PROMPTS, video=VIDEOS), expected, **EXACT)


@pytest.mark.parametrize("frames", ["first", "mean"])
def test_a_videos_clip_is_of_its_first_frame_or_the_mean(clip_folder, reference, frames):
    model = load("CLIP", model_name_or_path=clip_folder, **({"frames": "mean"} if frames == "mean" else {}))
    looked_at = [v[:1] if frames == "first" else v for v in VIDEOS]
    expected = [np.mean([reference.cosine(p, f) for f in v]) for p, v in zip(VIDEO_PROMPTS, looked_at, strict=True)]
    np.testing.assert_allclose(rewards(model, VIDEO_PROMPTS, video=VIDEOS), expected, **EXACT)


def test_a_videos_hps_is_the_mean_over_its_frames(hps_folder):
    file = "HPS_v2.1_compressed.pt"
    expected = [
        hps_by_hand(hps_folder, file, [p] * len(v), v).mean() for p, v in zip(VIDEO_PROMPTS, VIDEOS, strict=True)
    ]
    found = rewards(load("HPSv2", checkpoint_path=hps_folder), VIDEO_PROMPTS, video=VIDEOS)
    np.testing.assert_allclose(found, expected, **EXACT)


def test_a_videos_aesthetic_rating_is_the_mean_over_its_frames(large_clip_folder, head_file):
    expected = [np.mean(ratings(large_clip_folder, head_file, frames)) for frames in VIDEOS]
    model = load("aesthetic", model_name_or_path=large_clip_folder, checkpoint_path=head_file)
    np.testing.assert_allclose(rewards(model, VIDEO_PROMPTS, video=VIDEOS), expected, **EXACT)


def test_images_and_videos_may_share_a_chunk(pick_score):
    mixed = rewards(pick_score, VIDEO_PROMPTS, image=[None, IMAGES[1], None], video=[VIDEOS[0], None, VIDEOS[2]])
    videos = rewards(pick_score, VIDEO_PROMPTS, video=VIDEOS)
    (image,) = rewards(pick_score, VIDEO_PROMPTS[1:2], image=IMAGES[1:2])
    np.testing.assert_allclose(mixed, [videos[0], image, videos[2]], **EXACT)


def test_frames_reach_the_device_as_many_at_a_time_as_there_are_samples(pick_score, monkeypatch):
    embed, sizes = pick_score.tower.embed_images, []

    def counting(inputs):
        sizes.append(len(inputs))
        return embed(inputs)

    monkeypatch.setattr(pick_score.tower, "embed_images", counting)
    rewards(pick_score, PROMPTS, image=IMAGES)
    rewards(pick_score, VIDEO_PROMPTS, video=VIDEOS)
    rewards(pick_score, VIDEO_PROMPTS[1:2], video=VIDEOS[1:2])
    assert sizes == [8, 3, 3, 2, 1, 1, 1, 1, 1]


# --- threads -------------------------------------------------------------------------------------------


def test_one_thread_preprocesses_while_another_holds_the_forward(clip, monkeypatch):
    preprocessed = threading.Event()
    pixels = type(clip.tower.preprocessing).pixels
    embed = clip.tower.embed_images

    def embed_once_the_other_has_preprocessed(inputs):
        assert preprocessed.wait(30), "the other thread waits for this forward before it preprocesses"
        return embed(inputs)

    def pixels_and_say_so(self, images, device):
        found = pixels(self, images, device)
        if threading.current_thread() is other:
            preprocessed.set()
        return found

    monkeypatch.setattr(type(clip.tower.preprocessing), "pixels", pixels_and_say_so)
    monkeypatch.setattr(clip.tower, "embed_images", embed_once_the_other_has_preprocessed)
    in_forward = threading.Event()
    forward = clip.forward
    found: dict[str, np.ndarray] = {}

    def score(name: str, image: Image.Image) -> None:
        found[name] = rewards(clip, ["a red cat"], image=[image])

    one = threading.Thread(target=score, args=("one", IMAGES[0]))
    other = threading.Thread(target=lambda: (in_forward.wait(30), score("other", IMAGES[1])))

    def forward_and_say_so():
        in_forward.set()
        return forward()

    monkeypatch.setattr(clip, "forward", forward_and_say_so)
    one.start()
    other.start()
    one.join(60)
    other.join(60)
    monkeypatch.undo()
    for name, image in (("one", IMAGES[0]), ("other", IMAGES[1])):
        np.testing.assert_allclose(found[name], rewards(clip, ["a red cat"], image=[image]), **EXACT)


def test_forwards_of_one_model_never_overlap_and_threads_get_their_own_rewards(clip, monkeypatch):
    embed, inside = clip.tower.embed_images, []

    def alone(inputs):
        inside.append(1)
        assert len(inside) == 1
        try:
            return embed(inputs)
        finally:
            inside.pop()

    monkeypatch.setattr(clip.tower, "embed_images", alone)
    expected = rewards(clip, PROMPTS, image=IMAGES)
    found: list[Any] = [None] * 4

    def score(i: int) -> None:
        found[i] = [rewards(clip, PROMPTS, image=IMAGES) for _ in range(3)]

    threads = [threading.Thread(target=score, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for of_thread in found:
        np.testing.assert_allclose(of_thread, [expected] * 3, rtol=0, atol=1e-6)


def test_a_model_warms_up_with_an_image_of_its_own(pick_score):
    pick_score.warm_up()


# --- what cannot be loaded -----------------------------------------------------------------------------


def test_options_of_the_other_backend_are_refused(clip_folder):
    with pytest.raises(ModelLoadError, match="pretrained='openai' is an option of backend: open_clip"):
        load("CLIP", model_name_or_path=clip_folder, pretrained="openai")
    with pytest.raises(ModelLoadError, match="revision='main' is an option of backend: transformers"):
        load("CLIP", backend="open_clip", model_name_or_path="ViT-B-32", revision="main")


def test_an_open_clip_model_without_weights_is_refused_rather_than_random(tiny_architecture):
    with pytest.raises(ModelLoadError, match="tiny-for-tests"):
        load("CLIP", backend="open_clip", model_name_or_path=tiny_architecture)


def test_a_checkpoint_that_lacks_weights_is_refused_rather_than_random(tmp_path, clip_folder):
    from safetensors.torch import load_file, save_file

    folder = save_clip(tmp_path / "clip", seed=6)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"is no CLIPModel: its checkpoint lacks 1 of the weights, visual_proj"):
        load("CLIP", model_name_or_path=folder)


def test_a_head_of_another_shape_is_refused(tmp_path, large_clip_folder):
    file = save_head(tmp_path / "head.pth", seed=1)
    weights = torch.load(file)
    torch.save({**weights, "layers.4.weight": torch.zeros(32, 128)}, file)
    with pytest.raises(ModelLoadError, match=r"layers\.4 needs a weight \(64, 128\) and a bias, found \(32, 128\)"):
        load("aesthetic", model_name_or_path=large_clip_folder, checkpoint_path=file)


def test_options_are_checked_on_the_trainer():
    with pytest.raises(ConfigError, match="'first' or 'mean'"):
        spec_of("CLIP", frames="last")
    with pytest.raises(ConfigError, match="hps_version"):
        spec_of("HPSv2", hps_version="v3")
    with pytest.raises(ConfigError, match="did you mean 'model_name_or_path'"):
        spec_of("PickScore", model_name="x")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("flow_factory.rewards.pick_score.PickScoreRewardModel", "PickScore"),
        ("flow_factory.rewards.clip.CLIPRewardModel", "CLIP"),
        ("flow_factory.rewards.hpsv2_reward.HPSv2RewardModel", "HPSv2"),
        ("flow_factory.rewards.ocr.OCRRewardModel", "OCR"),
    ],
)
def test_dotted_paths_of_flow_factory_are_the_built_ins(path, name):
    assert spec_of(path).reward_model == name


# --- true size -----------------------------------------------------------------------------------------


@pytest.fixture
def large_folder(tmp_path):
    """A folder whose gigabytes do not outlive the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def all_cores(one_thread_a_tensor):
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("all_cores")
def test_pickscore_at_its_true_size_is_transformers_logit_over_26(large_folder):
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    huge = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    gelu = {"hidden_act": "gelu"}
    folder = save_clip(
        large_folder / "vit-h-14",
        seed=10,
        eos_token_id=2,
        projection_dim=1024,
        text={**large, **gelu},
        vision={**huge, **gelu, "patch_size": 14},
    )
    prompts, images = PROMPTS[:4], IMAGES[:4]
    reference = Reference(folder)
    assert sum(p.numel() for p in reference.model.parameters()) == 986_109_441
    expected = [reference.logit(p, i) / 26 for p, i in zip(prompts, images, strict=True)]
    del reference
    model = load("PickScore", model_name_or_path=folder, processor_name_or_path=folder)
    found = rewards(model, prompts, image=images)
    assert np.ptp(expected) > 0.01, "inputs must matter"
    np.testing.assert_allclose(found, expected, **EXACT)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("all_cores")
def test_hps_at_its_true_size_loads_a_checkpoint_as_published(large_folder):
    direct = open_clip.create_model("ViT-H-14").eval()
    torch.save({"state_dict": direct.state_dict()}, large_folder / "HPS_v2.1_compressed.pt")
    square = IMAGES[0]  # already 224 x 224: nothing to resize
    _, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32")
    with torch.no_grad():
        image = direct.encode_image(preprocess(square)[None], normalize=True)
        texts = direct.encode_text(open_clip.get_tokenizer("ViT-H-14")(PROMPTS[:2]), normalize=True)
        expected = (texts @ image[0]).numpy()
    del direct
    found = rewards(load("HPSv2", checkpoint_path=large_folder), PROMPTS[:2], image=[square] * 2)
    np.testing.assert_allclose(found, expected, **EXACT)
