"""What an image takes by its shape: bounded for every built-in, whatever its proportions."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks.errors import InvalidSampleError
from tasks.rewards import RewardConfig
from tasks.samples import Sample
from tests.servers import ROOT
from tests.workers.requests import Requests, make, plain, run
from tests.workers.test_ocr import drawn
from trainer_client.steps.sample_checks import check

GB = 10**9

THIN = [[1000, 24], [1024, 64], [300, 1], [8, 3000], [1, 300], [16_000_000, 1], [1, 16_000_000]]
"""Heights and widths of images whose pixels are few and whose proportions are extreme."""


def score(model: str, shapes: list[list[int]], **entry: Any) -> tuple[list[Any], list[float]]:
    """What a process of its own gives images of these shapes; its peak memory in GB before and after."""
    job = json.dumps({"model": model, "entry": entry, "shapes": shapes})
    command = [sys.executable, "-m", "tests.workers.peak_memory", job]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["rewards"], [peak / GB for peak in found["peak_bytes"]]


@pytest.mark.timeout(300)
def test_no_shape_takes_ocr_beyond_its_bound():
    shapes = [[1000, 24], [300, 1], [8, 3000], [16_000_000, 1]]
    rewards, (_, peak) = score("OCR", shapes)
    assert rewards == [0.0] * len(shapes)
    assert peak < 1.5


@pytest.mark.timeout(300)
@pytest.mark.parametrize("preprocessing", ["pil", "uint8", "tensor"])
def test_no_shape_takes_a_clip_beyond_its_bound(clip_folder, preprocessing):
    shapes = [[2560, 10], [10, 2560], [257, 1], [1, 100_000], [16_000_000, 1]]
    rewards, (before, after) = score("CLIP", shapes, model_name_or_path=str(clip_folder), preprocessing=preprocessing)
    assert all(isinstance(reward, float) for reward in rewards[:2])
    assert [reward[0] for reward in rewards[2:]] == ["invalid"] * 3
    assert "257x1 (height x width) is more than 256 times as long as wide" in rewards[2][1]
    assert after - before < 1.0


@pytest.mark.parametrize(("edge", "most"), [(224, 256), (336, 148), (448, 83)])
def test_a_clip_of_a_larger_square_takes_less_extreme_shapes(edge, most):
    from workers.models.clip_pixels import Preprocessing

    square = (edge, edge)
    preprocessing = Preprocessing("shortest", square, square, (0.5,) * 3, (0.5,) * 3)
    assert preprocessing.most_proportion() == most
    height, width = preprocessing.resized_size(10 * most, 10)
    assert height * width <= 2**24


def test_an_image_of_no_shape_to_be_scored_fails_alone(clip_folder):
    from tests.workers.test_clip_models import load

    model = load("CLIP", model_name_or_path=clip_folder)
    fox, strip = Image.new("RGB", (64, 48), (200, 90, 20)), Image.new("RGB", (600, 2))
    (alone,) = model(["a fox"], image=[fox]).rewards.tolist()
    beside = model(["a fox", "a fox", "a fox"], image=[fox, strip, None], video=[None, None, [fox, fox]]).rewards
    assert [beside[0], beside[2]] == pytest.approx([alone, alone], abs=1e-6)
    assert beside[1].kind == "invalid"


@pytest.mark.parametrize("shape", [*THIN, [9, 1], [17, 2], [2000, 249], [99, 12_000], [1, 1], [67_000_000, 1]])
def test_what_ocr_reads_is_no_larger_than_a_usual_image(shape):
    from workers.models.ocr_reader import bounded

    height, width = shape
    seen = bounded(Image.new("RGB", (width, height), "white"))
    is_extreme = height > 8 * width or width > 100 * height
    assert (seen.size == (width, height)) == (not is_extreme)
    if is_extreme:
        assert max(seen.size) <= 2000
        assert 1 / 8 <= seen.width / seen.height <= 8
        assert seen.getbbox() is not None, "the strip is in it"


@pytest.mark.parametrize(("height", "width"), [(64, 64), (2000, 250), (250, 2000), (30, 3000), (2001, 1999)])
def test_a_usual_image_is_read_as_it_is(height, width):
    from workers.models.ocr_reader import bounded

    image = Image.new("RGB", (width, height))
    assert bounded(image) is image


def test_text_on_a_tall_image_is_read(requests):
    from workers.models.ocr import OCR

    words = ("OPEN", "FOX", "BAR", "MATE", "SALE", "ZOO")
    tall = np.concatenate([np.pad(drawn(word)[:, :150], ((50, 50), (0, 0), (0, 0)), mode="edge") for word in words])
    assert len(tall) == 8 * tall.shape[1]
    tall = np.pad(tall, ((1, 0), (0, 0), (0, 0)), mode="edge")  # now it is padded
    (outcome,) = run(make(OCR), [requests.sample(metadata={"text": "".join(words)}, image=tall)], requests.payloads)
    assert plain([outcome]) == [1.0]


@pytest.fixture
def requests() -> Requests:
    return Requests()


def test_a_long_line_is_recognised_alone_and_the_lines_keep_their_places():
    from rapidocr import RapidOCR
    from rapidocr.ch_ppocr_rec import TextRecInput

    from workers.models.ocr_reader import _OneLongLineAtATime

    engine = RapidOCR(params={"Global.log_level": "error"})
    engine(drawn("READY"))
    usual, word = drawn("FOX", size=30)[10:64, :120], drawn("OWL", size=30)[10:64, :120]
    long = np.pad(word, ((0, 0), (0, 5000), (0, 0)), mode="edge")
    lines = [long, usual, long[:, :-7]]
    alone = [engine.text_rec(TextRecInput(img=[line])).txts[0] for line in lines]
    output = _OneLongLineAtATime(engine.text_rec)(TextRecInput(img=lines))
    assert list(output.txts) == alone
    assert alone[1] == "FOX"
    assert alone[0] != "FOX"
    assert len(output.scores) == len(output.word_results) == 3


LONG = {"jpeg": (65_500, 65_501), "webp": (16_383, 16_384)}


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
@pytest.mark.parametrize("tall", [True, False])
def test_an_image_that_cannot_be_a_file_of_its_format_is_a_reason_in_words(image_format, tall):
    from workers import Unscored
    from workers.judges.images import data_url

    possible, too_long = (Image.new("RGB", (1, edge) if tall else (edge, 1)) for edge in LONG[image_format])
    assert data_url(possible, image_format).startswith(f"data:image/{image_format}")
    assert data_url(too_long, "png").startswith("data:image/png")
    with pytest.raises(Unscored) as caught:
        data_url(too_long, image_format)
    assert caught.value.kind == "invalid"
    assert f"edges are at most {LONG[image_format][0]} pixels" in caught.value.message


@pytest.mark.parametrize("model", ["jpeg_compressibility", "jpeg_incompressibility"])
def test_an_image_that_cannot_be_a_jpeg_has_no_size_as_one(model):
    from tests.workers.test_clip_models import load

    strip, usual = Image.new("RGB", (65_501, 2)), Image.new("RGB", (64, 64))
    reason, kilobytes = load(model)(["", ""], image=[strip, usual]).rewards
    assert reason.kind == "invalid"
    assert "2x65501 (height x width) cannot be a JPEG" in reason.message
    assert 0 < abs(kilobytes) < 2


@pytest.mark.parametrize(
    ("entry", "field", "long"),
    [
        ({"reward_model": "jpeg_compressibility", "image_format": "jpeg"}, "image", 65_501),
        ({"reward_model": "jpeg_compressibility", "image_format": "jpeg"}, "video", 65_501),
        ({"reward_model": "vllm_evaluate", "image_format": "webp"}, "image", 16_384),
        ({"reward_model": "rational_rewards_edit", "image_format": "jpeg"}, "condition_images", 65_501),
    ],
)
def test_a_trainer_is_told_at_submit_what_cannot_travel_in_the_format_of_a_reward(entry, field, long):
    judge = {} if "jpeg" in entry["reward_model"] else {"api_base_url": "http://j/v1", "vlm_model": "m"}
    rewards = RewardConfig.from_dict({"rewards": {**entry, **judge}}).rewards
    usual, strip = np.zeros((8, 8, 3), np.uint8), np.zeros((1, long, 3), np.uint8)
    given = {"image": usual, "condition_images": [usual]} if "edit" in entry["reward_model"] else {}
    values = {"image": strip, "video": strip[None], "condition_images": [usual, strip]}
    with pytest.raises(
        InvalidSampleError, match=f"sample 3: {field}: .*1x{long} .*image_format: {entry['image_format']}"
    ):
        check(Sample(prompt="p", **{**given, field: values[field]}), rewards, "sample 3", 10**8)
    fine = {"image": usual, "video": usual[None], "condition_images": [usual]}
    check(Sample(prompt="p", **{**given, field: fine[field]}), rewards, "sample 3", 10**8)
    raw = RewardConfig.from_dict({"rewards": {"reward_model": "CLIP"}}).rewards
    check(Sample(prompt="p", image=strip), raw, "sample 3", 10**8)
