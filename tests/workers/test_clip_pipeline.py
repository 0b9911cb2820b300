from __future__ import annotations

import numpy as np
import open_clip

from tests.workers.checkpoints import Reference, pictures
from tests.workers.test_clip_models import cosines
from trainer_client import RewardClient, Sample

PROMPTS = ["a red cat", "<|endoftext|> fog", "a red cat"]
IMAGES = pictures(3, seed=11)
VIDEO = [frame.resize((240, 160)) for frame in pictures(3, seed=13)]


def test_rewards_through_real_workers_are_those_of_transformers_and_open_clip_on_the_same_pixels(
    workers, settings, clip_folder, open_clip_folder
):
    name = {"model_name_or_path": str(clip_folder), "dtype": "float32"}
    local = f"local-dir:{open_clip_folder}"
    config = {
        "rewards": [
            {"reward_model": "PickScore", "processor_name_or_path": str(clip_folder), **name},
            {"reward_model": "PickScore", "name": "again", "processor_name_or_path": str(clip_folder), **name},
            {"reward_model": "flow_factory.rewards.clip.CLIPRewardModel", "name": "clip", **name},
            {"reward_model": "CLIP", "name": "mean", "frames": "mean", **name},
            {"reward_model": "CLIP", "name": "open", **name, "backend": "open_clip", "model_name_or_path": local},
            {"reward_model": "CLIP", "name": "nowhere", "model_name_or_path": "/no/such/clip"},
        ]
    }
    workers("gpu")
    with RewardClient.from_dict(config, "test", settings=settings) as client:
        client.submit([Sample(prompt=p, image=i) for p, i in zip(PROMPTS, IMAGES, strict=True)])
        client.submit([Sample(prompt="fog", video=VIDEO)])
        batch = client.collect(timeout_s=120, on_failure="nan")
    reference = Reference(clip_folder)
    reference.tokenizer.split_special_tokens = True
    images = [reference.logit(p, i) for p, i in zip(PROMPTS, IMAGES, strict=True)]
    frames = [reference.logit("fog", frame) for frame in VIDEO]
    assert abs(frames[0] - np.mean(frames)) > 0.1, "frames must differ"
    by_mean, by_first = np.array([*images, np.mean(frames)]), np.array([*images, frames[0]])
    np.testing.assert_allclose(batch.rewards["PickScore"], by_mean / 26, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(batch.rewards["again"], batch.rewards["PickScore"])
    np.testing.assert_allclose(batch.rewards["clip"], by_first / np.exp(4.6), rtol=0, atol=1e-5)
    np.testing.assert_allclose(batch.rewards["mean"], by_mean / np.exp(4.6), rtol=0, atol=1e-5)
    direct, _, preprocess = open_clip.create_model_and_transforms(local)
    by_open_clip = cosines(direct, open_clip.get_tokenizer(local), preprocess, [*PROMPTS, "fog"], [*IMAGES, VIDEO[0]])
    assert np.ptp(by_open_clip) > 0.01, "inputs must matter"
    np.testing.assert_allclose(batch.rewards["open"], by_open_clip, rtol=0, atol=1e-5)
    assert {f.reward for f in batch.failures} == {"nowhere"}
    assert len(batch.failures) == 4
    assert all("'/no/such/clip'" in f.message and "HF_HUB_OFFLINE" in f.message for f in batch.failures)
