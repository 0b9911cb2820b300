from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from tasks.errors import InvalidSampleError
from tasks.rewards import RewardConfig
from tasks.samples import Sample
from trainer_client.steps.sample_checks import check

MAX_PIXELS = 100 * 100
PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
FLOATS = np.linspace(0, 1, 60, dtype=np.float32).reshape(3, 4, 5)


def rewards(*models: str):
    return RewardConfig.from_dict({"rewards": [{"reward_model": m} for m in models]}).rewards


ANY = rewards("my_rewards.Mine")


def problem_of(sample, specs=ANY) -> str:
    with pytest.raises(InvalidSampleError) as caught:
        check(sample, specs, "sample 3", MAX_PIXELS)
    assert str(caught.value).startswith("sample 3: ")
    return str(caught.value)


@pytest.mark.parametrize(
    "sample",
    [
        Sample(prompt="a cat", image=Image.new("RGB", (5, 4))),
        Sample(prompt="a cat", image=PIXELS),
        Sample(prompt="a cat", image=FLOATS),
        Sample(prompt="a cat", image=FLOATS.astype(np.float64)),
        Sample(prompt="a cat", image=PIXELS[::-1, ::2]),
        Sample(prompt="", video=[PIXELS, Image.new("L", (5, 4)), FLOATS]),
        Sample(prompt="", video=(PIXELS,)),
        Sample(prompt="", video=PIXELS[None]),
        Sample(prompt="", video=FLOATS[None].astype(np.float16)),
        Sample(prompt="", audio=np.zeros(7, np.float32)),
        Sample(prompt="", audio=np.zeros((2, 7), np.float64)),
        Sample(prompt="", image=PIXELS, condition_images=[PIXELS, np.zeros((9, 9, 3), np.uint8)]),
        Sample(prompt="", image=PIXELS, condition_images=[], condition_videos=()),
        Sample(prompt="", image=PIXELS, condition_videos=[[PIXELS, PIXELS], PIXELS[None]]),
        Sample(prompt="", image=PIXELS, group=("a", 1)),
        Sample(prompt="", metadata={"text": "héllo", "n": [1, 2.5, None, True, {"deep": "x"}]}),
        Sample(prompt="quel été “à Paris”; \0 and 猫", image=PIXELS),
    ],
)
def test_what_a_trainer_has_is_accepted(sample):
    check(sample, ANY, "sample 3", MAX_PIXELS)


@pytest.mark.parametrize(
    ("image", "needle"),
    [
        (np.zeros((4, 5), np.uint8), "found uint8 (4, 5)"),
        (np.zeros((4, 5, 4), np.uint8), "found uint8 (4, 5, 4)"),
        (np.zeros((4, 5, 1), np.uint8), "found uint8 (4, 5, 1)"),
        (np.zeros((3, 4, 5), np.uint8), "found uint8 (3, 4, 5)"),
        (np.zeros((4, 5, 3), np.float32), "found float (4, 5, 3)"),
        (np.zeros((1, 3, 4, 5), np.float32), "found float (1, 3, 4, 5)"),
        (np.zeros((1, 4, 5, 3), np.uint8), "found uint8 (1, 4, 5, 3)"),
        (np.zeros((), np.uint8), "found uint8 ()"),
        (np.zeros((5,), np.float32), "found float (5,)"),
        (np.zeros((4, 5, 3), np.int64), "found numpy int64 (4, 5, 3)"),
        (np.zeros((4, 5, 3), bool), "found numpy bool (4, 5, 3)"),
        (np.zeros((4, 5, 3), np.uint16), "found numpy uint16 (4, 5, 3)"),
        (np.zeros((3, 4, 5), np.complex64), "found numpy complex64 (3, 4, 5)"),
        (np.zeros((0, 5, 3), np.uint8), "an empty image, 0x5"),
        (np.zeros((3, 4, 0), np.float32), "an empty image, 4x0"),
        (np.zeros((101, 100, 3), np.uint8), "REWARDQ_MAX_PIXELS=10000"),
        (np.zeros((3, 101, 100), np.float32), "101x100 has 10100 pixels"),
        (Image.new("RGB", (100, 101)), "101x100 has 10100 pixels"),
        (Image.new("CMYK", (5, 4)), "mode 'CMYK'"),
        (Image.new("I;16", (5, 4)), "mode 'I;16'"),
        (Image.new("F", (5, 4)), "mode 'F'"),
        (Image.new("LA", (5, 4)), "mode 'LA'"),
        ("cat.png", "found a str"),
        (b"\x89PNG", "found a bytes"),
        ([PIXELS], "found a list of 1"),
        ([[0, 0, 0]], "found a list of 1"),
        (5, "found a int"),
    ],
)
def test_an_image_of_another_kind_is_refused(image, needle):
    message = problem_of(Sample(prompt="a cat", image=image))
    assert message.startswith("sample 3: image")
    assert needle in message


@pytest.mark.parametrize(
    ("video", "needle"),
    [
        ([], "found an empty list"),
        (PIXELS, "found uint8 (4, 5, 3)"),
        (np.zeros((0, 4, 5, 3), np.uint8), "found no frames"),
        (np.zeros((2, 0, 5, 3), np.uint8), "an empty image"),
        (np.zeros((2, 3, 4, 5), np.uint8), "found uint8 (2, 3, 4, 5)"),
        (np.zeros((2, 4, 5, 3), np.float32), "found float (2, 4, 5, 3)"),
        (np.zeros((2, 101, 100, 3), np.uint8), "REWARDQ_MAX_PIXELS"),
        ([PIXELS, np.zeros((4, 6, 3), np.uint8)], "sizes [(4, 5), (4, 6)]"),
        ([PIXELS, FLOATS[:, :, :4]], "sizes [(4, 4), (4, 5)]"),
        ([PIXELS, "frame.png"], "video[1]"),
        ("clip.mp4", "found a str"),
        (Image.new("RGB", (5, 4)), "found a Image"),
    ],
)
def test_a_video_of_another_kind_is_refused(video, needle):
    message = problem_of(Sample(prompt="a cat", video=video))
    assert message.startswith("sample 3: video")
    assert needle in message


@pytest.mark.parametrize(
    "audio", [np.zeros(4, np.int16), np.zeros((1, 2, 3), np.float32), np.zeros(0, np.float32), [0.0, 0.1], "a.wav"]
)
def test_audio_of_another_kind_is_refused(audio):
    assert problem_of(Sample(audio=audio)).startswith("sample 3: audio: needs a float waveform")


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("condition_images", PIXELS, "condition_images: needs a list, found a ndarray"),
        ("condition_images", [PIXELS, None], "condition_images[1]"),
        ("condition_images", [np.zeros((4, 5), np.uint8)], "condition_images[0]"),
        ("condition_videos", [PIXELS], "condition_videos[0]"),
        ("condition_videos", [[PIXELS, "x"]], "condition_videos[0][1]"),
        ("condition_videos", "clips", "condition_videos: needs a list, found a str"),
    ],
)
def test_a_condition_of_another_kind_is_refused_with_its_place(field, value, place):
    assert problem_of(Sample(prompt="a cat", image=PIXELS, **{field: value})).startswith(f"sample 3: {place}")


@pytest.mark.parametrize("prompt", [None, 5, b"a cat", ["a cat"]])
def test_a_prompt_that_is_no_text_is_refused(prompt):
    assert "prompt must be text" in problem_of(Sample(prompt=prompt, image=PIXELS))


@pytest.mark.parametrize("text", ["\ud800", "a cat \udfff!"])
def test_a_lone_surrogate_is_refused_wherever_it_is(text):
    assert "prompt is no valid Unicode" in problem_of(Sample(prompt=text, image=PIXELS))
    assert "metadata['text'] is no valid Unicode" in problem_of(Sample(metadata={"text": text}))
    assert "of no valid Unicode" in problem_of(Sample(metadata={"texts": [{text: 1}]}))


def deep(depth: int) -> dict:
    nested: dict = {}
    for _ in range(depth):
        nested = {"in": nested}
    return nested


@pytest.mark.parametrize(
    ("metadata", "needle"),
    [
        (None, "metadata must be a mapping, found a NoneType"),
        ([("a", 1)], "metadata must be a mapping, found a list"),
        ({1: "a"}, "metadata has the key 1"),
        ({"a": {2.0: "b"}}, "metadata['a'] has the key 2.0"),
        ({"a": object()}, "metadata['a'] is a object"),
        ({"a": [1, {2}]}, "metadata['a'][1] is a set"),
        ({"a": np.longdouble(3)}, "metadata['a'] is a longdouble"),
        ({"a": np.datetime64("2026-01-01")}, "metadata['a'] is a date"),
        ({"a": np.ma.masked}, "metadata['a'] is a MaskedConstant"),
        ({"a": np.complex64(1)}, "metadata['a'] is a complex"),
        ({"a": PIXELS}, "metadata['a'] is a ndarray"),
        ({"a": b"raw"}, "metadata['a'] is a bytes"),
        ({"a": 2**64}, "metadata['a'] is an integer of more than 64 bits"),
        ({"a": -(2**63) - 1}, "metadata['a'] is an integer of more than 64 bits"),
        (deep(2000), "is nested more than"),
    ],
)
def test_metadata_that_cannot_travel_are_refused_with_their_place(metadata, needle):
    assert needle in problem_of(Sample(prompt="a cat", image=PIXELS, metadata=metadata))


def test_metadata_that_contain_themselves_are_refused():
    metadata: dict = {}
    metadata["me"] = metadata
    assert "is nested more than" in problem_of(Sample(prompt="a cat", image=PIXELS, metadata=metadata))


@pytest.mark.parametrize("field", ["fps", "sample_rate"])
@pytest.mark.parametrize("value", [0, -24, float("nan"), float("inf"), True, "24", [24], 10**400])
def test_a_rate_that_is_no_number_above_0_is_refused(field, value):
    assert f"{field} needs a number above 0" in problem_of(Sample(prompt="p", image=PIXELS, **{field: value}))


@pytest.mark.parametrize("value", [24, 29.97, np.float32(24), np.int64(48000), Fraction(30000, 1001), None])
def test_any_kind_of_number_is_a_rate(value):
    check(Sample(prompt="p", image=PIXELS, fps=value, sample_rate=value), ANY, "sample 3", MAX_PIXELS)


def test_a_class_that_scores_media_is_not_sent_a_sample_without_any():
    reward = {"reward_model": "nowhere.Mine", "required_fields": ["prompt", "image", "condition_images"]}
    specs = RewardConfig.from_dict({"rewards": reward}).rewards
    check(Sample(image=PIXELS), specs, "sample 3", MAX_PIXELS)
    check(Sample(prompt="p", condition_images=[PIXELS]), specs, "sample 3", MAX_PIXELS)
    message = problem_of(Sample(prompt="p", video=[PIXELS], metadata={"a": 1}), specs)
    assert "needs image or condition_images, found none" in message
    assert "let its required_fields say so: [prompt, video, metadata]" in message
    conditions = RewardConfig.from_dict({"rewards": {**reward, "required_fields": ["condition_images"]}}).rewards
    check(Sample(prompt="p"), conditions, "sample 3", MAX_PIXELS)


def test_a_group_that_cannot_be_told_from_others_is_refused():
    assert "group" in problem_of(Sample(prompt="a cat", image=PIXELS, group=[1]))


@pytest.mark.parametrize("sample", [None, {"prompt": "a cat"}, "a cat"])
def test_what_is_no_sample_is_refused(sample):
    assert "needs a Sample" in problem_of(sample)


@pytest.mark.parametrize("prompt", ["", "  \n"])
@pytest.mark.parametrize("model", ["OCR", "vllm_evaluate"])
def test_an_empty_prompt_is_refused_where_a_reward_needs_one(model, prompt):
    message = problem_of(Sample(prompt=prompt, image=PIXELS), rewards(model))
    assert f"reward {model!r}" in message
    assert "needs prompt, found an empty prompt" in message


def test_an_empty_prompt_is_fine_where_no_reward_needs_one():
    check(Sample(image=PIXELS), rewards("jpeg_compressibility"), "sample 3", MAX_PIXELS)


@pytest.mark.parametrize("model", ["OCR", "jpeg_compressibility", "jpeg_incompressibility", "vllm_evaluate"])
def test_a_missing_image_is_refused_and_a_video_serves_as_well(model):
    assert "needs image or video, found none" in problem_of(Sample(prompt="a cat"), rewards(model))
    check(Sample(prompt="a cat", video=[PIXELS]), rewards(model), "sample 3", MAX_PIXELS)


def test_every_reward_is_asked_for_what_it_needs():
    message = problem_of(Sample(image=PIXELS), rewards("jpeg_compressibility", "my_rewards.Mine", "OCR"))
    assert "reward 'OCR'" in message
