"""Rounds through the real pipeline: how fast samples become rewards, what holds the caller, and where the time goes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tasks.media import PixelsHWC
from tasks.settings import Settings
from trainer_client import RewardBatch, RewardClient, Sample

BATCH_SIZE = 16
"""Images in a `submit()`, and samples in a chunk."""

COLLECT_S = 300.0
PROMPT = "a photograph"
STAGES = ("encode", "store", "queue", "fetch", "decode", "result")
"""Encode: copy to uint8 where the sample is something else, check, hash. Fetch: read and check the hash. Result: from
the model's call until the client has the reward."""

_CLIENT_STAGES = {"encode": "encode_s", "store": "store_s"}

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


def run(client: RewardClient, images: Sequence[PixelsHWC]) -> Round:
    """Submit all images, `BATCH_SIZE` at a time, as fast as `submit()` returns, and collect their rewards.

    Each round is a step of one client, as in a training. Its prompt is of its own, so that no outcome of an earlier
    round is found.
    """
    held_s = 0.0
    prompt = f"{PROMPT} {next(_rounds)}"
    started = time.perf_counter()
    for samples in _batches(images, prompt):
        submitting = time.perf_counter()
        client.submit(samples)
        held_s += time.perf_counter() - submitting
    batch = client.collect(COLLECT_S, progress=False)
    total_s = time.perf_counter() - started
    assert batch.rewards["null"].tolist() == [1.0] * len(images)
    return Round(len(images), total_s, held_s)


def run_alone(
    settings: Settings, queue: str, images: Sequence[PixelsHWC]
) -> list[dict[str, float]]:
    """Where the time of chunks goes that travel one at a time: for each, seconds by stage.

    One thread encodes and stores, so that the stages follow one another and add up to the time from `submit()` to the
    reward. `queue` is the time between the measured stages: put the request together, send, take, read, and claim.
    """
    chunks = []
    one_thread = settings.model_copy(update={"sender_threads": 1})
    with open_client(one_thread, queue) as client:
        for samples in _batches(images, PROMPT):
            submitted_at = time.monotonic()
            client.submit(samples)
            batch = client.collect(COLLECT_S, progress=False)
            chunks.append(_stages(batch, submitted_at))
    return chunks


def _batches(images: Sequence[PixelsHWC], prompt: str) -> Iterator[list[Sample]]:
    for start in range(0, len(images), BATCH_SIZE):
        batch = images[start : start + BATCH_SIZE]
        yield [Sample(prompt, image) for image in batch]


def _stages(batch: RewardBatch, submitted_at: float) -> dict[str, float]:
    """Seconds by stage of a batch that travelled as one chunk."""
    seconds = {}
    for stage, timing in _CLIENT_STAGES.items():
        seconds[stage] = batch.timings[timing]
    info = batch.info["null"][-1]
    for stage in ("fetch", "decode"):
        seconds[stage] = info["origin"][f"{stage}_s"]
    answered_at = submitted_at + batch.timings["span_s"]
    seconds["result"] = answered_at - info["called_at"]

    queue_s = batch.timings["span_s"] - sum(seconds.values())
    return {**seconds, "queue": queue_s}


def open_client(settings: Settings, queue: str) -> RewardClient:
    """A client of a run of its own."""
    reward = {
        "name": "null",
        "reward_model": "benchmarks.null_reward.NullReward",
        "batch_size": BATCH_SIZE,
        "queue": queue,
    }
    run = f"bench-{next(_rounds)}"
    return RewardClient.from_dict({"rewards": reward}, run, settings=settings)
