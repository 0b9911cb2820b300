"""What a message may make a worker do: no more than a config may, and nothing that is not bounded."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tasks import media
from tasks.errors import ModelLoadError, WireError
from tasks.messages import MediaRef, RewardCall, SampleRequest, ScoreRequest, pack, unpack
from tasks.settings import load_settings
from tests.workers.requests import Requests, call_of, make, run
from workers import PointwiseRewardModel, RewardModelOutput
from workers.loading.building import build
from workers.loading.cache import CacheKey
from workers.models.checkpoints import find_file
from workers.models.jpeg import JpegCompressibility
from workers.scoring.handling import handle_task
from workers.scoring.outputs import MAX_INFO_BYTES, outcomes_of


def call_with(model: str, **options) -> RewardCall:
    """What a message asks for that no trainer has checked."""
    call = call_of(reward_model="jpeg_compressibility")
    return call.model_copy(update={"model": model, "options": options})


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("jpeg_compressibility", {"x": 1}, "has no option 'x'"),
        ("OCR", {"several_texts": 5}, "option several_texts"),
        ("vllm_evaluate", {"top_logprobs": 10**6}, "option top_logprobs: .*less than or equal to 20"),
        ("vllm_evaluate", {"api_base_url": "file:///etc/passwd"}, "needs http://"),
        ("vllm_evaluate", {"api_base_url": "http://evil\\@api.openai.com/v1"}, "read in different ways"),
        ("vllm_evaluate", {"api_base_url": ["http://judge/v1"] * 1000}, "option api_base_url"),
        ("vllm_evaluate", {"api_key": "sk-1"}, "an API key does not belong into a config"),
        ("vllm_evaluate", {"api_key_env": "AWS_SECRET_ACCESS_KEY"}, "api_key_env must be OPENAI_API_KEY or"),
        ("vllm_evaluate", {"api_key_env": "PATH"}, "api_key_env must be OPENAI_API_KEY or"),
        ("rational_rewards_t2i", {"rubric_file": "/etc/passwd"}, "a worker reads none that a message names"),
        ("pairwise_judge", {"rubric_file": "rubric.txt"}, "a worker reads none that a message names"),
        ("RemotePointwiseRewardModel", {}, "needs server_url"),
        ("RemotePointwiseRewardModel", {"server_url": "ftp://host"}, "needs http://"),
        ("RemotePointwiseRewardModel", {"server_url": "http://h", "retry_attempts": -5}, "option retry_attempts"),
    ],
)
def test_options_in_a_message_are_checked_as_in_a_config(model, options, words):
    with pytest.raises(ModelLoadError, match=words):
        build(call_with(model, **options), load_settings())


def test_a_message_without_options_has_the_defaults():
    assert isinstance(build(call_with("jpeg_compressibility"), load_settings()), JpegCompressibility)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package of the user's whose every module leaves a mark when its code runs."""
    folder = tmp_path / "mypackage"
    folder.mkdir()
    mark = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n"
    reward = "from workers import PointwiseRewardModel\nclass Mine(PointwiseRewardModel):\n    pass\n"
    for name, code in {
        "__init__": "",
        "__main__": reward,
        "rewards": reward,
        "train": "import os\nclass Trainer:\n    pass\n",
        "made": "from workers import PointwiseRewardModel\nMine = type('Mine', (PointwiseRewardModel,), {})\n",
    }.items():
        (folder / f"{name}.py").write_text(mark + code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "path",
    ["__main__.Mine", "train.Trainer", "train.os", "rewards.Other", "made.Mine", "absent.Mine", "rewards.Mine.x"],
)
def test_a_module_is_looked_up_before_it_is_imported(package, path):
    with pytest.raises(ModelLoadError):
        build(call_with(f"mypackage.{path}"), load_settings(modules="mypackage"))
    assert [file.name for file in package.glob("*.ran") if file.name != "__init__.ran"] == []


def test_a_reward_model_of_a_submodule_is_imported(package):
    settings = load_settings(modules="mypackage")
    assert type(build(call_with("mypackage.rewards.Mine"), settings)).__name__ == "Mine"
    named = load_settings(modules="mypackage, mypackage.made")
    assert type(build(call_with("mypackage.made.Mine"), named)).__name__ == "Mine"


def test_a_fingerprint_of_one_reward_is_no_key_to_the_model_of_another():
    one = call_of(reward_model="jpeg_compressibility")
    other = one.model_copy(update={"model": "jpeg_incompressibility"})
    assert one.instance == other.instance
    assert CacheKey.of(one) != CacheKey.of(other)
    assert CacheKey.of(one) == CacheKey.of(one.model_copy(update={"name": "x", "batch_size": 3, "dtype": "float16"}))


@pytest.mark.parametrize("name", ["/proc/self/environ", "/dev/zero"])
def test_a_checkpoint_is_no_file_of_the_system(name):
    with pytest.raises(ModelLoadError, match="no checkpoint"):
        find_file("checkpoint_path", name, "x")


@pytest.mark.parametrize("file", ["../secret", "a/../../b", "/etc/passwd"])
def test_the_file_of_a_checkpoint_stays_within_it(tmp_path, file):
    with pytest.raises(ModelLoadError, match="leads out of the checkpoint"):
        find_file("checkpoint_path", str(tmp_path), file)


# --- what is declared ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0, 4, 3), (-1, 4, 3), (2**41, 1, 3), (1, 1, 1, 1, 3)])
def test_a_shape_of_no_media_is_no_message(shape):
    with pytest.raises(ValueError, match="shape"):
        MediaRef(name="n", digest="d", shape=shape, format="raw")


@pytest.mark.parametrize(
    ("kind", "shape", "words"),
    [
        ("raw", (8, 9, 3), "needs 216 bytes, found 192"),
        ("raw", (2**20, 2**20, 3), "needs 3298534883328 bytes"),
        ("float32", (1, 100), "needs 400 bytes"),
        ("jpeg", (4, 16, 3), "a JPEG of 8x8 pixels where 4x16 are declared"),
        ("jpeg", (60_000, 60_000, 3), "a JPEG of 8x8 pixels where"),
        ("jpeg", (2, 8, 8, 3), "needs 2 frames, found 1"),
    ],
)
def test_a_shape_that_does_not_fit_the_bytes_fails_its_sample_alone(kind, shape, words):
    requests = Requests()
    pixels = np.zeros((8, 8, 3), np.uint8)
    odd = requests.sample(image=pixels, kind="jpeg" if kind == "jpeg" else "raw")
    ref = odd.media["image"].model_copy(update={"shape": shape, "format": kind})
    odd = odd.model_copy(update={"media": {"image": ref}})
    found = run(make(JpegCompressibility), [odd, requests.sample(image=pixels)], requests.payloads)
    assert found[0].failure.kind == "failed"
    assert words in found[0].failure.message
    assert found[1].reward < 0


def test_a_picture_of_another_format_is_not_decoded(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(OSError, match="cannot identify"):
        media.from_jpeg((tmp_path / "image.png").read_bytes())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "load"),
        ("dtype", "Tensor"),
        ("image_format", "exe"),
        ("timeout_s", float("inf")),
        ("timeout_s", 1e300),
        ("batch_size", 2**62),
        ("name", "x\n[2026-01-01 00:00:00,000: CRITICAL/MainProcess] forged"),
        ("model", "a.B\x1b[31m"),
        ("version", "x" * 5000),
    ],
)
def test_what_a_reward_call_may_say_is_bounded(field, value):
    call = call_of(reward_model="jpeg_compressibility").model_dump()
    with pytest.raises(WireError, match=field):
        unpack(RewardCall, pack(RewardCall.model_construct(**{**call, field: value})))


@pytest.mark.parametrize(("field", "value"), [("attempt", 2**62), ("fps", float("nan")), ("fps", -1.0)])
def test_numbers_of_a_sample_are_bounded(field, value):
    with pytest.raises(ValueError, match=field):
        SampleRequest(address="a", prompt="p", media={}, **{field: value})


@pytest.mark.parametrize(
    "odd",
    [
        {"number": 2**62},
        {"number": -1},
        {"number": "7"},
        {"label": 5},
        {"label": "x" * 10_000},
        {"request_id": ["x"]},
        {"request_id": "x" * 10_000},
        {"store": None},
        {"wire": "2"},
    ],
)
def test_a_task_message_with_an_odd_argument_is_dropped_and_its_content_is_not_logged(odd, caplog):
    task = SimpleNamespace(request=SimpleNamespace(delivery_info={"routing_key": "gpu"}))
    usual = {"label": "l", "request_id": "c.r", "wire": 2, "number": 1, "store": "s"}
    assert handle_task(task, {**usual, **odd}, ScoreRequest, None).startswith("dropped")
    assert "message dropped" in caplog.text
    assert "xxxx" not in caplog.text


# --- what comes back -----------------------------------------------------------------------------


class Talkative(PointwiseRewardModel):
    """Says a great deal."""

    def __call__(self, prompt, **kwargs):
        return RewardModelOutput([1.0], {"words": ["x" * MAX_INFO_BYTES]})


def test_information_that_is_too_large_is_said_to_be_and_the_reward_stays():
    (outcome,) = outcomes_of(make(Talkative).model(["p"]), 1)
    assert outcome.reward == 1.0
    assert "it had words" in outcome.info["too_large"]
    assert len(pack(outcome)) < 1000
