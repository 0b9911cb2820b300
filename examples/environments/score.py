"""A step of a trainer whose two rewards are computed in two environments."""

from __future__ import annotations

import numpy as np

from trainer_client import RewardClient, Sample

COLOURS = ((255, 0, 0), (0, 0, 128), (200, 180, 60))
PROMPTS = ("a red door", "a navy door")


def main() -> None:
    samples = [
        Sample(prompt=prompt, image=np.full((32, 32, 3), colour, np.uint8))
        for prompt in PROMPTS
        for colour in COLOURS
    ]
    with RewardClient.from_yaml("rewards.yaml", run="two-environments") as client:
        client.submit(samples)
        batch = client.collect(timeout_s=120)
    for name, rewards in batch.rewards.items():
        for sample, reward, info in zip(
            samples, rewards, batch.info[name], strict=True
        ):
            print(
                f"{name:10} {sample.prompt:12} {sample.image[0, 0]!s:14} {reward:.4f}  webcolors {info['webcolors']}"
            )


if __name__ == "__main__":
    main()
