"""A client on an empty Redis, and samples whose rewards are known."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks.settings import Settings
from tests.reward_models import image_of
from trainer_client import RewardClient, Sample

MODELS = "tests.reward_models"


def samples_of(numbers: Sequence[int], **fields: Any) -> list[Sample]:
    """One sample for each number; `PixelCode` rewards it with that number."""
    return [Sample(prompt=f"number {n}", image=image_of(n), **fields) for n in numbers]


def config_of(*rewards: Mapping[str, Any] | str) -> dict[str, Any]:
    """A config of reward models of the tests, by class name or as mappings with one."""
    entries: list[Mapping[str, Any]] = [{"reward_model": r} if isinstance(r, str) else r for r in rewards]
    return {
        "rewards": [
            {"name": e["reward_model"], **e, "reward_model": f"{MODELS}.{e['reward_model']}"}
            if "." not in e["reward_model"] and e["reward_model"][0].isupper() and e["reward_model"] != "OCR"
            else dict(e)
            for e in entries
        ]
    }


@pytest.fixture
def clients(settings: Settings) -> Iterator[Callable[..., RewardClient]]:
    """Makes clients, closed at the end: `clients("PixelCode", {"reward_model": "Slow", "seconds": 2})`."""
    made: list[RewardClient] = []

    def make(
        *rewards: Mapping[str, Any] | str, settings: Settings = settings, run: str = "test", **options: Any
    ) -> RewardClient:
        options.setdefault("max_failure_rate", 1.0)  # most tests of failures have a few samples, of which most fail
        made.append(RewardClient.from_dict(config_of(*rewards), run, settings=settings, **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def never_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that is not full does not go by itself, however slow this machine is."""
    monkeypatch.setattr("trainer_client.engine.chunk_accumulator.LINGER_S", 60.0)


def assert_rewards(batch: Any, numbers: Sequence[int], name: str = "PixelCode") -> None:
    """Every reward is there and is its own sample's."""
    np.testing.assert_array_equal(batch.rewards[name], np.array(numbers, np.float32), batch.describe_failures())
    assert batch.valid[name].all()


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Run each call in a thread of its own; their results or what they raised."""
    found: list[Any] = [None] * len(calls)

    def run(i: int, call: Callable[[], Any]) -> None:
        try:
            found[i] = call()
        except Exception as error:  # looked at by the test
            found[i] = error

    threads = [threading.Thread(target=run, args=(i, call)) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def noisy(seed: int, amount: int) -> np.ndarray:
    """A picture whose JPEG is larger, the larger `amount` is."""
    rng = np.random.default_rng(seed)
    return (100 + rng.integers(0, amount + 1, (48, 48, 3))).astype(np.uint8)


def jpeg_bytes(pixels: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue())


def expected_ranks(scores: list[float]) -> list[float]:
    """By hand: members below, and half of the others that are equal, divided by the number of members."""
    return [(sum(s < mine for s in scores) + (sum(s == mine for s in scores) - 1) / 2) / len(scores) for mine in scores]


def spread_over_ranks(
    rng: random.Random, num_ranks: int, num_steps: int, num_groups: int, group_size: int
) -> tuple[list[list[list[tuple[int, str]]]], dict[tuple[int, str], list[int]]]:
    """Groups of samples whose members are spread over trainer ranks by chance.

    Returns:
        For each rank and step its members as (number, group), in its own order; and by step and group its numbers.
    """
    plans: list[list[list[tuple[int, str]]]] = [[[] for _ in range(num_steps)] for _ in range(num_ranks)]
    groups = {}
    for step in range(num_steps):
        for g in range(num_groups):
            groups[step, f"g{g}"] = numbers = rng.sample(range(step * 10_000, step * 10_000 + 9_000), group_size)
            for number in numbers:
                plans[rng.randrange(num_ranks)][step].append((number, f"g{g}"))
        for plan in plans:
            rng.shuffle(plan[step])
    return plans, groups
