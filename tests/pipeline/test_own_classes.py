"""Reward classes of the user's, by dotted path, through real workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer_client import RewardClient, Sample

MODULE = "tests.flow_factory_rewards"


@pytest.fixture
def client_of(settings, workers):
    """Starts a worker that may import the classes, and gives a client for one reward of them."""
    made = []

    def make(queue="gpu", **reward):
        workers(queue, env={"REWARDQ_MODULES": MODULE})
        config = {"rewards": {"name": "own", **reward, "reward_model": f"{MODULE}.{reward['reward_model']}"}}
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
