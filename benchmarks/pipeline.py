"""Rounds through the real pipeline: how fast samples become rewards, what holds the caller, and where the time goes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.media import PixelsHWC
from tasks.settings import Settings
from trainer_client import RewardBatch, RewardClient, Sample

BATCH_SIZE = 16
"""Images in a `submit()`, and samples in a chunk."""

COLLECT_S = 300.0
PROMPT = "a photograph"
STEPS = ("encode", "store", "queue", "fetch", "decode", "result")
"""Encode: copy to uint8 where the sample is something else, check, hash. Fetch: read and check the hash. Result: from
the model's call to the client's having the reward."""

_CLIENT_STEPS = {"encode": "encode_s", "store": "store_s"}

_rounds = itertools.count()


@dataclass(frozen=True, slots=True)
class Round:
    """One pass of all images: from the first `submit()` until `collect()` has every reward."""

    num_images: int
    total_s: float
    held_s: float
    """How long the caller could do nothing else, in all."""

    @property
    def images_per_s(self) -> float:
        """Throughput."""
        return self.num_images / self.total_s


def run(settings: Settings, queue: str, images: Sequence[PixelsHWC]) -> Round:
    """Submit all images, `BATCH_SIZE` at a time, as fast as `submit()` returns, and collect their rewards."""
    held_s = 0.0
    with _client(settings, queue) as client:
        started = time.perf_counter()
        for i in range(0, len(images), BATCH_SIZE):
            samples = [Sample(PROMPT, image) for image in images[i : i + BATCH_SIZE]]
            submitting = time.perf_counter()
            client.submit(samples)
            held_s += time.perf_counter() - submitting
        batch = client.collect(COLLECT_S, progress=False)
        total_s = time.perf_counter() - started
    assert batch.rewards["null"].tolist() == [1.0] * len(images)
    return Round(len(images), total_s, held_s)


def run_alone(settings: Settings, queue: str, images: Sequence[PixelsHWC]) -> list[dict[str, float]]:
    """Where the time of chunks goes that travel one at a time: for each, seconds by step.

    One thread encodes and stores, so that the steps follow one another and add up to the time from `submit()` to the
    reward. `queue` is what is left between the measured ones: put the request together, send, take, read, and claim.
    """
    chunks = []
    with _client(settings.model_copy(update={"sender_threads": 1}), queue) as client:
        for i in range(0, len(images), BATCH_SIZE):
            submitted_at = time.monotonic()
            client.submit([Sample(PROMPT, image) for image in images[i : i + BATCH_SIZE]])
            batch = client.collect(COLLECT_S, progress=False)
            chunks.append(_steps(batch, submitted_at))
    return chunks


def _steps(batch: RewardBatch, submitted_at: float) -> dict[str, float]:
    """Seconds by step of a batch that travelled as one chunk."""
    client_s = {step: batch.timings[name] for step, name in _CLIENT_STEPS.items()}
    info = batch.info["null"][-1]
    worker_s = {step: info["origin"][f"{step}_s"] for step in ("fetch", "decode")}
    result_s = submitted_at + batch.timings["span_s"] - info["called_at"]
    known_s = {**client_s, **worker_s, "result": result_s}
    return {**known_s, "queue": batch.timings["span_s"] - sum(known_s.values())}


def _client(settings: Settings, queue: str) -> RewardClient:
    """A client of a run of its own, so that nothing is answered by an earlier round."""
    reward = {
        "name": "null",
        "reward_model": "benchmarks.null_reward.NullReward",
        "batch_size": BATCH_SIZE,
        "queue": queue,
    }
    return RewardClient.from_dict({"rewards": reward}, run=f"bench-{next(_rounds)}", settings=settings)
