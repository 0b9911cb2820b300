"""A step of a trainer whose reward a server computes: prints the reward of each flat image, or the reason for none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from trainer_client import RewardClient, Sample

PROMPTS = ("a red door", "a blue door", "a door")


def main() -> None:
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(np.full((64, 64, 3), rng.integers(0, 256, 3), np.uint8))
        for _ in range(4)
    ]
    samples = [
        Sample(prompt=prompt, image=image) for prompt in PROMPTS for image in images
    ]
    with RewardClient.from_yaml(
        Path(__file__).with_name("rewards.yaml"), run="try-a-server"
    ) as client:
        client.submit(samples)
        batch = client.collect(timeout_s=120)
    reasons = {failure.sample: failure.message for failure in batch.failures}
    for i, (sample, reward) in enumerate(
        zip(samples, batch.rewards["colour"], strict=True)
    ):
        print(
            f"{sample.prompt:12} {sample.image.getpixel((0, 0))!s:16} {reasons.get(i) or f'{reward:.4f}'}"
        )


if __name__ == "__main__":
    main()
