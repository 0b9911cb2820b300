"""Reward classes of the user's, by dotted path, through real workers."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest
import torch

from tasks.errors import InvalidSampleError
from tests.servers import ROOT
from trainer_client import RewardClient, Sample
from workers import Accelerator, PointwiseRewardModel, RewardArguments, RewardModelOutput

MODULE = "tests.flow_factory_rewards"


class SetsItsOwn(PointwiseRewardModel):
    """Chooses its device and dtype by its configuration, as classes of Flow-Factory do in their constructors."""

    required_fields = ("prompt",)

    def __init__(self, config: RewardArguments, accelerator: Accelerator):
        super().__init__(config, accelerator)
        self.device = accelerator.device if config.device == torch.device("cuda") else config.device
        self.dtype = torch.float64
        self.weight = getattr(config, "weight", 7.0)

    def __call__(self, prompt, **kwargs):
        rewards = torch.full((len(prompt),), self.weight, device=self.device, dtype=self.dtype)
        said = {"device": str(self.device), "dtype": str(rewards.dtype), "asked": str(self.config.dtype)}
        return RewardModelOutput(rewards, said)


@pytest.fixture
def client_of(settings, workers):
    """Starts a worker that may import the classes, and gives a client for one reward of them."""
    made = []

    def make(queue="gpu", module=MODULE, **reward):
        workers(queue, env={"REWARDQ_MODULES": module})
        config = {"rewards": {"name": "own", **reward, "reward_model": f"{module}.{reward['reward_model']}"}}
        made.append(RewardClient.from_dict(config, "own", settings=settings))
        return made[-1]

    yield make
    for client in made:
        client.close()


def flat(red: int) -> np.ndarray:
    return np.full((6, 4, 3), (red, 9, 9), np.uint8)


def test_a_pointwise_class_written_for_flow_factory_runs(client_of):
    client = client_of(reward_model="Redness", batch_size=2, dtype="fp16", extra_kwargs={"factor": 2.0})
    client.submit([Sample(prompt="p" * n, image=flat(red)) for n, red in ((1, 0), (2, 51), (3, 255))])
    batch = client.collect(timeout_s=90)
    np.testing.assert_allclose(batch.rewards["own"], np.float32([0.0, 2 * 51 / 255, 2.0]), rtol=1e-6)
    assert [i["prompt_length"] for i in batch.info["own"]] == [1, 2, 3]


def test_a_groupwise_class_written_for_flow_factory_runs(client_of):
    client = client_of(reward_model="RednessRank", batch_size=3)
    reds = [40, 10, 30, 20]
    client.submit([Sample(prompt="p", image=flat(red), group=0) for red in reds], group_size=4)
    assert client.collect(timeout_s=90).rewards["own"].tolist() == [0.75, 0.0, 0.5, 0.25]


def test_a_tensor_class_gets_channels_first_in_unit_range_and_lists_where_sizes_differ(client_of):
    client = client_of(reward_model="TensorShapes")
    image = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    video = torch.zeros(5, 3, 10, 12)
    small, large = flat(1), np.zeros((7, 7, 3), np.uint8)
    alike = Sample("p", image, video, condition_images=[small, small], condition_videos=[video, video])
    mixed = Sample("p", image, [small] * 2, condition_images=[small, large], condition_videos=[video, [small]])
    client.submit([alike, mixed])
    batch = client.collect(timeout_s=90)
    np.testing.assert_allclose(batch.rewards["own"], np.float32([image.mean() / 255] * 2), rtol=1e-6)
    stacked, listed = batch.info["own"]
    assert {k: stacked[k] for k in ("image", "video", "condition_images", "condition_videos")} == {
        "image": [3, 8, 6],
        "video": [5, 3, 10, 12],
        "condition_images": [2, 3, 6, 4],
        "condition_videos": [2, 5, 3, 10, 12],
    }
    assert listed["video"] == [2, 3, 6, 4]
    assert listed["condition_images"] == [[3, 6, 4], [3, 7, 7]]
    assert listed["condition_videos"] == [[5, 3, 10, 12], [1, 3, 6, 4]]


def test_a_class_names_its_queue_and_gets_audio_and_metadata_and_nothing_else(client_of):
    client = client_of("loud", reward_model="Loud")
    wave = np.sin(np.linspace(0, 50, 1000, dtype=np.float32)) * 0.5
    client.submit(
        [Sample(audio=wave, image=flat(3), metadata={"gain": 2.0}), Sample(audio=wave, metadata={"gain": 4.0})]
    )
    batch = client.collect(timeout_s=90)
    loudest = float(np.abs(wave).max())
    np.testing.assert_allclose(batch.rewards["own"], np.float32([2 * loudest, 4 * loudest]), rtol=1e-6)
    assert batch.info["own"][0]["origin"]["worker"].startswith("loud.")


def test_a_class_may_set_its_device_and_dtype_and_asks_for_what_the_trainer_alone_knows_with_a_default(client_of):
    client = client_of(module=__name__, reward_model="SetsItsOwn", weight=3.0, dtype="fp16")
    client.submit([Sample(prompt="p")])
    batch = client.collect(timeout_s=90)
    assert batch.rewards["own"].tolist() == [7.0]
    (info,) = batch.info["own"]
    assert (info["device"], info["dtype"], info["asked"]) == ("cpu", "torch.float64", "torch.float16")


def test_what_the_configuration_has_on_the_worker_and_what_only_the_trainer_has():
    config = RewardArguments(device_name="cpu", extra_kwargs={"weight": 2.0})
    assert config.device == torch.device("cpu")
    assert config.weight == 2.0
    for name in ("weight", "async_reward", "num_workers"):
        with pytest.raises(AttributeError, match=f"{name} is the trainer's and reaches no worker"):
            getattr(RewardArguments(), name)
    with pytest.raises(AttributeError, match=r"no option 'wieght'; given: \['scale'\]"):
        RewardArguments(extra_kwargs={"scale": 1}).wieght  # noqa: B018


def test_a_field_that_a_sample_lacks_is_none_as_in_flow_factory(workers, settings):
    workers("gpu", env={"REWARDQ_MODULES": MODULE})
    video = np.stack([flat(70)] * 3)
    rewards = [
        {"name": "either", "reward_model": f"{MODULE}.Either"},
        {"name": "narrow", "reward_model": f"{MODULE}.Either", "required_fields": ["prompt", "video", "image"], "x": 1},
        {"name": "group", "reward_model": f"{MODULE}.EitherOfGroup"},
    ]
    with RewardClient.from_dict({"rewards": rewards}, "own", settings=settings) as client:
        for media in ({"image": flat(7)}, {"video": video}):
            client.submit([Sample(prompt="p", group="g", **media) for _ in range(2)], group_size=2)
            batch = client.collect(timeout_s=90)
            red = 7.0 if "image" in media else 70.0
            assert {name: values.tolist() for name, values in batch.rewards.items()} == {
                "either": [red, red],
                "narrow": [red, red],
                "group": [0.0, 0.0],
            }
        client.submit([Sample(prompt="p", group="h", image=flat(9)), Sample(prompt="p", group="h", video=video)])
        mixed = client.collect(timeout_s=90, on_failure="nan")
        assert mixed.rewards["either"].tolist() == [9.0, 70.0], "samples of both kinds in one batch"
        with pytest.raises(
            InvalidSampleError, match=r"needs image or video, found none; if it scores what .*\[prompt\]"
        ):
            client.submit([Sample(prompt="p", group="i")])


def test_classes_of_theirs_and_of_forks_run_after_a_change_of_import_lines(workers, settings):
    workers("gpu", env={"REWARDQ_MODULES": MODULE})
    rewards = [
        {"name": name, "reward_model": f"{MODULE}.{name}"} for name in ("Edit", "RowText", "Pitch", "OursOfTheirs")
    ]
    wave = np.zeros(12_000, np.float32)
    sample = {"prompt": "p", "image": flat(50), "audio": wave, "sample_rate": 24_000.0}
    samples = [
        Sample(**sample, condition_images=[flat(20)], metadata={"include": ["duck"], "seed": 3}),
        Sample(**sample, metadata={"include": ["duck", "dog"], "seed": 4}),
    ]
    with RewardClient.from_dict({"rewards": rewards}, "own", settings=settings) as client:
        client.submit(samples)
        batch = client.collect(timeout_s=90, on_failure="nan")
    assert not batch.failures, batch.describe_failures()
    assert {name: values.tolist() for name, values in batch.rewards.items()} == {
        "Edit": [30.0, 50.0],
        "RowText": [1.0, 2.0],
        "Pitch": [0.5, 0.5],
        "OursOfTheirs": [50.0, 50.0],
    }
    assert [info["rate"] for info in batch.info["Pitch"]] == [24_000, 24_000]
    assert [info["seed"] for info in batch.info["OursOfTheirs"]] == [3, 4]


SAYS_IT_OTHERWISE = """
from workers import GroupwiseRewardModel, PointwiseRewardModel, RewardModelOutput

COMMON = ["prompt"]
COMMON.append("metadata")


class Counts(PointwiseRewardModel):
    required_fields = tuple(COMMON)

    def __call__(self, prompt, metadata=None, **kwargs):
        return RewardModelOutput([float(m.get("n", -1)) for m in metadata])


class CountsOfGroup(Counts, GroupwiseRewardModel):
    pass
"""


def test_a_class_whose_fields_cannot_be_read_gets_them_and_one_that_a_config_cuts_short_is_told_so(
    workers, settings, tmp_path, monkeypatch
):
    (tmp_path / "otherwise.py").write_text(SAYS_IT_OTHERWISE)
    monkeypatch.syspath_prepend(tmp_path)  # the trainer's own: it can read the source
    workers("gpu", env={"REWARDQ_MODULES": "otherwise", "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])})
    rewards = [
        {"name": "alone", "reward_model": "otherwise.Counts"},
        {"name": "group", "reward_model": "otherwise.CountsOfGroup"},
        {"name": "cut", "reward_model": "otherwise.Counts", "required_fields": ["prompt"], "version": "2"},
        {"name": "cut group", "reward_model": "otherwise.CountsOfGroup", "required_fields": ["prompt"], "version": "2"},
    ]
    samples = [Sample(prompt="five ducks", group="g", metadata={"n": n}) for n in (5, 6)]
    with RewardClient.from_dict({"rewards": rewards}, "own", settings=settings) as client:
        client.submit(samples, group_size=2)
        batch = client.collect(timeout_s=90, on_failure="nan")
    assert (batch.rewards["alone"].tolist(), batch.rewards["group"].tolist()) == ([5.0, 6.0], [5.0, 6.0])
    assert sorted({f.reward for f in batch.failures}) == ["cut", "cut group"]
    assert len(batch.failures) == 4
    for failure in batch.failures:
        assert "takes metadata, which the sample has and the trainer did not send" in failure.message
        assert "say `required_fields: [prompt, metadata]` in the config" in failure.message


BROKEN = {
    "imports_what_is_not_there": "import no_such_library_anywhere\n",
    "raises": "raise RuntimeError('half a module')\n",
    "lacks_it": "Other = 1\n",
    "is_none": "class Mine:\n    pass\n",
}
"""Modules of a user's whose `Mine` cannot be used."""

TOO_FEW = """
from workers import PointwiseRewardModel, RewardModelOutput


class Mine(PointwiseRewardModel):
    def __call__(self, prompt, image=None, **kwargs):
        return RewardModelOutput([1.0] * (len(prompt) - 1))
"""


def test_what_is_wrong_with_a_class_is_the_reason_of_its_samples_and_of_no_other(workers, settings, tmp_path):
    for name, text in {**BROKEN, "too_few": TOO_FEW}.items():
        (tmp_path / f"{name}.py").write_text(text)
    allowed = ",".join((*BROKEN, "too_few", "nowhere", MODULE))
    (worker,) = workers(
        "gpu", env={"REWARDQ_MODULES": allowed, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    )
    own = [
        {"name": name, "reward_model": f"{name}.Mine", "kind": "pointwise", "required_fields": ["image"]}
        for name in (*BROKEN, "too_few", "nowhere")
    ]
    fine = {"name": "fine", "reward_model": f"{MODULE}.Redness", "dtype": "fp16"}
    with RewardClient.from_dict({"rewards": [*own, fine]}, "own", settings=settings, max_failure_rate=1.0) as client:
        client.submit([Sample(prompt="p", image=flat(red)) for red in (0, 255)])
        batch = client.collect(timeout_s=90, on_failure="nan")
    assert batch.rewards["fine"].tolist() == [0.0, 1.0]
    found = {name: [f.message for f in batch.failures if f.reward == name] for name in batch.rewards}
    assert all(len(found[name]) == 2 for name in found if name != "fine")
    for name, words in {
        "imports_what_is_not_there": f"install it in the worker's environment on {socket.gethostname()}, then",
        "raises": "RuntimeError: half a module (raises.py:1 in <module>)",
        "lacks_it": f"{tmp_path / 'lacks_it.py'} has no 'Mine'",
        "is_none": "is_none.Mine is no reward model; subclass workers.PointwiseRewardModel",
        "nowhere": f"No module named 'nowhere'; start the worker on {socket.gethostname()} where its file is",
        "too_few": "the model returned 1 rewards for 2 samples",
    }.items():
        assert words in found[name][0]
    assert worker.log_text.count("raise RuntimeError('half a module')") == 1, "at Celery's own level, once"
    assert "load failed reward=raises.Mine error=RuntimeError\nTraceback (most recent call last)" in worker.log_text
