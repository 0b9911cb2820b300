from __future__ import annotations

import numpy as np

from tests.workers.checkpoints import Reference, pictures
from trainer_client import RewardClient, Sample

PROMPTS = ["a red cat", "<|endoftext|> fog", "a red cat"]


def test_rewards_through_real_workers_are_those_of_transformers_on_the_same_pixels(workers, settings, clip_folder):
    name = {"model_name_or_path": str(clip_folder), "dtype": "float32"}
    config = {
        "rewards": [
            {"reward_model": "PickScore", "processor_name_or_path": str(clip_folder), **name},
            {"reward_model": "PickScore", "name": "again", "processor_name_or_path": str(clip_folder), **name},
            {"reward_model": "flow_factory.rewards.clip.CLIPRewardModel", "name": "clip", **name},
            {"reward_model": "CLIP", "name": "nowhere", "model_name_or_path": "/no/such/clip"},
        ]
    }
    images = pictures(3, seed=11)
    workers("gpu")
    with RewardClient.from_dict(config, "test", settings=settings) as client:
        client.submit([Sample(prompt=p, image=i) for p, i in zip(PROMPTS, images, strict=True)])
        batch = client.collect(timeout_s=120, on_failure="nan")
    reference = Reference(clip_folder)
    reference.tokenizer.split_special_tokens = True
    logits = np.array([reference.logit(p, i) for p, i in zip(PROMPTS, images, strict=True)])
    np.testing.assert_allclose(batch.rewards["PickScore"], logits / 26, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(batch.rewards["again"], batch.rewards["PickScore"])
    np.testing.assert_allclose(batch.rewards["clip"], logits / np.exp(4.6), rtol=0, atol=1e-5)
    assert {f.reward for f in batch.failures} == {"nowhere"}
    assert len(batch.failures) == 3
    assert all("'/no/such/clip'" in f.message and "HF_HUB_OFFLINE" in f.message for f in batch.failures)
