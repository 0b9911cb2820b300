from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from tests.workers.requests import Requests, make, plain, run
from workers.models.jpeg import JpegCompressibility, JpegIncompressibility

RNG = np.random.default_rng(2)
NOISE = RNG.integers(0, 256, (96, 128, 3), np.uint8)
SMOOTH = np.linspace(0, 255, 96 * 128 * 3).reshape(96, 128, 3).astype(np.uint8)
FLAT = np.full((96, 128, 3), 127, np.uint8)


@pytest.fixture
def kilobytes_on_disk(tmp_path):
    """The size of a real file, in units of 1000 bytes."""

    def measure(pixels: np.ndarray) -> float:
        Image.fromarray(pixels).save(tmp_path / "image.jpg", quality=95)
        return os.stat(tmp_path / "image.jpg").st_size / 1000

    return measure


@pytest.mark.parametrize(("cls", "sign"), [(JpegIncompressibility, 1), (JpegCompressibility, -1)])
def test_the_reward_is_the_size_of_the_file_in_kilobytes(kilobytes_on_disk, cls, sign):
    requests = Requests()
    images = [NOISE, SMOOTH, FLAT]
    outcomes = run(make(cls), [requests.sample(image=image) for image in images], requests.payloads)
    assert plain(outcomes) == pytest.approx([sign * kilobytes_on_disk(image) for image in images], abs=1e-12)


def test_a_picture_that_is_easier_to_compress_is_rewarded_more():
    requests = Requests()
    samples = [requests.sample(image=image) for image in (NOISE, SMOOTH, FLAT)]
    rewards = plain(run(make(JpegCompressibility), samples, requests.payloads))
    assert rewards == sorted(rewards)


def test_a_videos_reward_is_the_mean_over_its_frames(kilobytes_on_disk):
    requests = Requests()
    sample = requests.sample(prompt="", video=np.stack([NOISE, SMOOTH, FLAT]))
    (outcome,) = run(make(JpegIncompressibility), [sample], requests.payloads)
    assert outcome.reward == pytest.approx(np.mean([kilobytes_on_disk(f) for f in (NOISE, SMOOTH, FLAT)]))


def test_images_and_videos_may_stand_in_one_chunk(kilobytes_on_disk):
    requests = Requests()
    samples = [requests.sample(image=NOISE), requests.sample(video=np.stack([FLAT, FLAT]))]
    outcomes = run(make(JpegIncompressibility), samples, requests.payloads)
    assert plain(outcomes) == pytest.approx([kilobytes_on_disk(NOISE), kilobytes_on_disk(FLAT)])
