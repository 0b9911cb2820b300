"""Payloads and requests whose bytes are not those that were hashed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tasks.messages import ScoreRequest, pack, unpack
from tasks.payloads import RedisStore
from tasks.servers.connections import connect
from tasks.settings import load_settings
from tests.pipeline.conftest import assert_rewards, expected_ranks, jpeg_bytes, noisy, samples_of
from tests.pipeline.test_tickets import end
from tests.servers import wait_until
from trainer_client import Sample

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


# --- requests that somebody replaced --------------------------------------------------------------


@pytest.fixture(params=["redis", "file"])
def somewhere(request, settings, tmp_path):
    """Settings with payloads in Redis, or in a folder."""
    if request.param == "redis":
        return settings
    return load_settings(
        broker_url=settings.broker, payload_url=f"file://{tmp_path}/store", claim_ttl_s=2, reconcile_s=0.5
    )


def deliveries_of(ticket):
    return pickle.loads(pickle.dumps(ticket)).deliveries


def swap_media(store, request):
    """Replace a stored request by one in which its first two samples have each other's media."""
    (data,) = store.get([request])
    asked = unpack(ScoreRequest, data)
    first, second, *others = asked.samples
    swapped = first.model_copy(update={"media": second.media}), second.model_copy(update={"media": first.media})
    store.put({request: pack(asked.model_copy(update={"samples": (*swapped, *others)}))}, ttl_s=600)


def test_a_request_that_somebody_replaced_is_not_obeyed(workers, clients, somewhere):
    client = clients({"reward_model": "PixelCode", "batch_size": 4}, settings=somewhere)
    ticket = client.submit(samples_of(range(8)))
    client.flush()
    sent = deliveries_of(ticket)
    assert len(sent) == 2
    for one in sent:
        swap_media(client._engine.store, one.request)
    (worker,) = workers("gpu", settings=somewhere)
    assert_rewards(client.collect(timeout_s=60), range(8))
    assert worker.log_text.count("request is not what its client stored") == 2


def test_a_part_of_a_chord_that_somebody_replaced_is_not_obeyed(workers, clients, settings):
    rank = {"reward_model": "jpeg_incompressibility_Rank", "batch_size": 2}
    images = [noisy(n, 40 * (n + 1)) for n in range(4)]
    expected = expected_ranks([jpeg_bytes(image) for image in images])
    client = clients(rank)
    ticket = client.submit([Sample(prompt="p", image=image, group="g") for image in images], group_size=4)
    client.flush()
    (sent,) = deliveries_of(ticket)
    swap_media(client._engine.store, f"{sent.request}.0")
    (worker,) = workers("gpu")
    batch = client.collect(timeout_s=60)
    np.testing.assert_allclose(batch.rewards["jpeg_incompressibility_Rank"], expected)
    assert "request is not what its client stored" in worker.log_text


def test_a_request_of_a_ticket_that_somebody_replaced_is_not_obeyed_when_its_message_is_sent_again(
    workers, clients, somewhere
):
    client = clients("PixelCode", settings=somewhere, launch="one")
    ticket = client.submit(samples_of([3, 4]))
    client.flush()
    saved = wait_until(lambda: all(one.digest for one in deliveries_of(ticket)) and pickle.dumps(ticket))
    (sent,) = deliveries_of(ticket)
    store = client._engine.store
    end(client)
    swap_media(store, sent.request)
    with connect(somewhere.broker) as broker:
        assert broker.delete(*broker.keys("*gpu*"))  # its message is lost
    successor = clients("PixelCode", settings=somewhere, launch="one")
    workers("gpu", settings=somewhere)
    batch = successor.collect(timeout_s=60, ticket=pickle.loads(saved), on_failure="nan")
    assert not batch.valid["PixelCode"].any()
    assert {failed.kind for failed in batch.failures} == {"failed"}
