from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tasks import media
from tasks.errors import InvalidSampleError
from tasks.rewards import RewardConfig
from tasks.samples import Sample, beside, identity_of, sample_key
from trainer_client.steps.sample_checks import check

MAX_PIXELS = 100 * 100
PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def rewards(*models: str):
    return RewardConfig.from_dict({"rewards": [{"reward_model": m} for m in models]}).rewards


ANY = rewards("my_rewards.Mine")


def test_a_rate_counts_for_a_reward_that_it_travels_to_and_one_that_stays_behind_is_told_apart():
    def identity(reward: dict, **fields) -> dict:
        (spec,) = RewardConfig.from_dict({"rewards": {"reward_model": "nowhere.Mine", **reward}}).rewards
        return identity_of(Sample(prompt="p", **fields), spec)

    of_video = {"required_fields": ["prompt", "video"]}
    assert identity(of_video, fps=24) == identity(of_video, fps=np.float32(24)) == {"fps": 24}
    assert identity(of_video, fps=24, sample_rate=16000) == {"fps": 24, "withheld": ["sample_rate"]}
    assert identity({"required_fields": ["image"]}, fps=24) == {"withheld": ["fps"]}
    assert identity({"reward_model": "jpeg_compressibility"}, fps=24) == {}
    assert identity({}, fps=29.97, sample_rate=16000.0) == {"fps": 29.97, "sample_rate": 16000}
    unsent = {"image": PIXELS, "video": [PIXELS], "metadata": {"a": 1}}
    assert identity({"required_fields": ["image"]}, **unsent) == {"withheld": ["video", "metadata"]}
    keys = {sample_key("p", {}, {}, (), more) for more in ({}, {"fps": 24}, {"sample_rate": 24}, {"fps": 25})}
    assert len(keys) == 4
    assert sample_key("p", {}, {}, (), {}) == sample_key("p", {}, {})


def test_what_travels_beside_the_media_says_what_stays_behind():
    (spec,) = RewardConfig.from_dict({"rewards": {"reward_model": "a.B", "required_fields": ["prompt"]}}).rewards
    sample = Sample(prompt="p", image=PIXELS, condition_images=[], metadata={"a": 1}, fps=24)
    assert beside(sample, spec).as_fields() == {
        "metadata": {},
        "fps": None,
        "sample_rate": None,
        "withheld": ("image", "metadata", "fps"),
    }
    assert beside(sample, rewards("jpeg_compressibility")[0]).withheld == (), "a built-in's fields are known"
    everything = beside(sample, ANY[0])
    assert (everything.metadata, everything.fps, everything.withheld) == ({"a": 1}, 24, ())


def key_of(prompt="a cat", image=PIXELS, metadata=None, slot=()) -> str:
    pixels = media.encode_image(media.hold(image), "image")
    digests = {"image": (pixels.shape, media.digest(pixels))}
    return sample_key(prompt, digests, metadata or {}, slot)


def test_equal_content_has_one_key_whatever_holds_it():
    import torch

    same = [
        PIXELS,
        PIXELS.copy(),
        np.asfortranarray(PIXELS),
        Image.fromarray(PIXELS),
        torch.from_numpy(PIXELS.copy()),
        (PIXELS / 255.0).transpose(2, 0, 1),
        torch.from_numpy((PIXELS / 255.0).transpose(2, 0, 1)).float(),
    ]
    assert {key_of(image=image) for image in same} == {key_of()}


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "a cat "},
        {"prompt": "A cat"},
        {"image": PIXELS.reshape(5, 4, 3)},
        {"image": PIXELS.reshape(2, 10, 3)},
        {"image": PIXELS ^ np.uint8([[[1, 0, 0]]])},
        {"metadata": {"text": "x"}},
        {"metadata": {"text": None}},
        {"slot": ("train", 0, 0, 0)},
    ],
)
def test_other_content_has_another_key(other):
    assert key_of(**other) != key_of()


def test_a_shape_counts_where_the_bytes_are_the_same():
    digest = hashlib.sha256(PIXELS.tobytes()).hexdigest()
    keys = {sample_key("p", {"image": (s, digest)}, {}) for s in [(4, 5, 3), (5, 4, 3), (20, 1, 3)]}
    assert len(keys) == 3


def test_the_field_and_the_order_of_media_count():
    one, two = ((4, 5, 3), "aa"), ((4, 5, 3), "bb")
    digests = [
        {"image": one},
        {"condition_images": [one]},
        {"condition_images": [one, two]},
        {"condition_images": [two, one]},
        {"image": one, "condition_images": [two]},
        {"image": two, "condition_images": [one]},
    ]
    assert len({sample_key("p", d, {}) for d in digests}) == len(digests)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": True}),
        ({"a": 1}, {"a": "1"}),
        ({"a": 1}, {"b": 1}),
        ({"a": {"x": 1}}, {"a": [["x", 1]]}),
        ({"a": {"x": 1}}, {"a": ["map", [["x", 1]]]}),
        ({"a": []}, {"a": {}}),
        ({"a": ["x", "y"]}, {"a": ["y", "x"]}),
        ({"ab": "c"}, {"a": "bc"}),
    ],
)
def test_metadata_of_other_content_or_structure_have_another_key(one, other):
    assert key_of(metadata=one) != key_of(metadata=other)


def test_the_order_of_metadata_does_not_count():
    one = {"a": 1, "b": {"x": 1, "y": [1]}}
    assert key_of(metadata=one) == key_of(metadata={"b": {"y": (1,), "x": 1}, "a": 1})


def test_each_slot_of_a_sampling_judge_has_its_own_key():
    slots = [("train", 0, 0, 0), ("train", 0, 0, 1), ("train", 0, 1, 0), ("train", 1, 0, 0), ("eval", 0, 0, 0)]
    assert len({key_of(slot=slot) for slot in slots}) == len(slots)
    assert key_of(slot=slots[0]) == key_of(slot=slots[0])


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(), st.dictionaries(st.text(), plain, max_size=3))
def test_whatever_passes_the_checks_has_a_key(prompt, metadata):
    sample = Sample(prompt=prompt, metadata=metadata)
    try:
        check(sample, ANY, "sample 3", MAX_PIXELS)
    except InvalidSampleError:
        return
    assert len(sample_key(prompt, {}, metadata)) == 32


def test_a_sample_is_shown_without_the_values_of_its_media():
    shown = repr(Sample("a fox " * 100, image=np.zeros((64, 64, 3), np.uint8), condition_images=[], group=7))
    assert len(shown) < 200
    assert shown.endswith("...', image, condition_images, group=7)")
