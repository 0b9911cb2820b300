"""The trainer of the long run: step after step, each reward compared with its sample's number."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.pipeline.conftest import config_of, samples_of
from tests.reward_models import image_of
from trainer_client import RewardClient, Sample

REWARD = "number"

COLLECT_TIMEOUT_S = 300.0


def train(model: str, num_samples: int, step_size: int, side: int, say_every: int) -> None:
    """Submit and collect `num_samples` images of `side` x `side`, no two of them equal.

    It prints a JSON object a line, `{"done": samples, "wrong": rewards, "lost": rewards, "memory_MB": resident}`:
    one after the first step, after each `say_every` samples and after the last step, and one when the client is closed.
    """
    counts = {"done": 0, "wrong": 0, "lost": 0}
    reward = {"reward_model": model, "name": REWARD, "batch_size": 16}
    said = 0
    with RewardClient.from_dict(config_of(reward), "soak") as client:
        while counts["done"] < num_samples:
            _step(client, counts, min(step_size, num_samples - counts["done"]), side)
            is_first, is_last = said == 0, counts["done"] == num_samples
            if is_first or is_last or counts["done"] - said >= say_every:
                said = counts["done"]
                _say(counts)
    _say(counts)


def _step(client: RewardClient, counts: dict[str, int], num: int, side: int) -> None:
    numbers = range(counts["done"], counts["done"] + num)
    if side == 8:
        client.submit(samples_of(numbers))
    else:
        client.submit([Sample(prompt=f"number {n}", image=image_of(n, side, side)) for n in numbers])
    batch = client.collect(timeout_s=COLLECT_TIMEOUT_S, on_failure="nan")

    valid = batch.valid[REWARD]
    is_right = batch.rewards[REWARD] == np.array(numbers, np.float32)
    counts["done"] += num
    counts["lost"] += int((~valid).sum())
    counts["wrong"] += int((valid & ~is_right).sum())


def _say(counts: dict[str, int]) -> None:
    gc.collect()
    said: dict[str, Any] = {**counts, "memory_MB": resident_MB("self")}
    print(json.dumps(said), flush=True)


def resident_MB(pid: int | str) -> float:  # noqa: N802
    """Resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("VmRSS:"))
    return int(kilobytes) / 1024
