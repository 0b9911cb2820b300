"""Payloads whose bytes are not those that were hashed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tasks.payloads import RedisStore
from tests.pipeline.conftest import assert_rewards, samples_of

Change = Callable[[memoryview], Any]


@pytest.fixture
def on_first_upload(monkeypatch) -> Callable[[Change], None]:
    """Lets a function give other bytes to store for the first media that are uploaded."""

    def change_with(change: Change) -> None:
        put, seen = RedisStore.put, []

        def put_changed(store: RedisStore, payloads: dict[str, Any], ttl_s: float) -> None:
            media = [name for name, data in payloads.items() if isinstance(data, memoryview)]
            if media and not seen:
                seen.append(media[0])
                payloads = {**payloads, media[0]: change(payloads[media[0]])}
            put(store, payloads, ttl_s)

        monkeypatch.setattr(RedisStore, "put", put_changed)

    return change_with


def test_a_payload_that_was_damaged_is_stored_again(workers, clients, on_first_upload):
    workers("gpu")
    on_first_upload(lambda data: bytes(len(data)))
    client = clients("PixelCode")
    client.submit(samples_of([5, 6, 7]))
    assert_rewards(client.collect(timeout_s=30), [5, 6, 7])


def test_an_array_that_is_changed_between_its_hash_and_its_upload_is_invalid_alone(workers, clients, on_first_upload):
    workers("gpu")

    def paint_over(pixels: memoryview) -> memoryview:
        """The caller's own array: as a trainer does that uses its buffer again too early."""
        pixels[:] = bytes(len(pixels))
        return pixels

    on_first_upload(paint_over)
    client = clients("PixelCode")
    client.submit(samples_of([5, 6, 7]))
    batch = client.collect(timeout_s=30, on_failure="nan")
    assert [failed.kind for failed in batch.failures] == ["invalid"]
    assert "changed after submit()" in batch.failures[0].message
    others = batch.valid["PixelCode"]
    np.testing.assert_array_equal(batch.rewards["PixelCode"][others], np.array([5, 6, 7], np.float32)[others])
