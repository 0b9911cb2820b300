"""Media and requests that are larger than what a Redis takes as one value, or than all that it holds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tasks import keys
from tasks.payloads import FileStore
from tasks.settings import load_settings
from tests.pipeline.conftest import assert_rewards, samples_of
from tests.reward_models import image_of
from tests.servers import wait_until
from trainer_client import Sample

MIB = 2**20


def film_of(num_frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), np.uint8)


def reward_of_film(film):
    """What `Film` makes of it."""
    return float((np.arange(1, len(film) + 1) * film[:, 0, 0, 0].astype(np.int64)).sum())


@pytest.fixture
def small(private_redis):
    """A Redis that takes values of 1 MiB, the least that can be set, and settings for it."""
    server = private_redis("--proto-max-bulk-len", "1mb")
    return server, load_settings(broker_url=server.url, claim_ttl_s=2, reconcile_s=0.5)


def payload_keys(server):
    with server.client(1) as store:
        return [key.decode() for key in store.keys(keys.payload("*"))]


def test_videos_larger_than_a_value_are_scored_beside_others_and_freed(small, clients, workers):
    server, settings = small
    films = [film_of(40, 240, 320, 1), film_of(3, 16, 16, 2), film_of(7, 400, 300, 3), film_of(1, 700, 900, 4)]
    assert sum(film.nbytes > MIB for film in films) == 3
    client = clients({"reward_model": "Film", "batch_size": 4}, settings=settings)
    client.submit([Sample(prompt=f"film {i}", video=film) for i, film in enumerate(films)])
    client.flush()
    assert client._engine.store.bytes_in_use() > sum(film.nbytes for film in films)
    parts = [key for key in payload_keys(server) if ".of" in key]
    assert len(parts) == sum(-(-film.nbytes // MIB) for film in films if film.nbytes > MIB)

    workers("gpu", settings=settings)
    batch = client.collect(timeout_s=60)
    np.testing.assert_array_equal(batch.rewards["Film"], [reward_of_film(film) for film in films])
    wait_until(lambda: not payload_keys(server))
    assert client._engine.store.bytes_in_use() == 0


@pytest.mark.parametrize("damage", ["gone", "other bytes", "shorter"])
def test_a_video_of_which_a_part_is_not_what_was_stored_is_stored_again(small, clients, workers, damage):
    server, settings = small
    film = film_of(40, 240, 320)
    client = clients("Film", settings=settings)
    client.submit([Sample(prompt="a film", video=film)])
    client.flush()
    part = next(key for key in payload_keys(server) if key.endswith(".of9.5"))
    with server.client(1) as store:
        if damage == "gone":
            store.delete(part)
        else:
            store.setrange(part, 100, b"other") if damage == "other bytes" else store.set(part, b"short", keepttl=True)
    workers("gpu", settings=settings)
    batch = client.collect(timeout_s=60)
    assert batch.rewards["Film"].tolist() == [reward_of_film(film)]


def test_a_sample_whose_prompt_does_not_fit_into_a_request_is_invalid_alone(small, clients, workers):
    _server, settings = small
    workers("gpu", settings=settings)
    client = clients({"reward_model": "TextLength", "batch_size": 4}, settings=settings)
    prompts = ["x" * 10, "y" * 3 * MIB, "z" * 400_000, "u" * 400_001, "v" * 400_002, "w" * 400_003]
    client.submit([Sample(prompt=prompt) for prompt in prompts])
    batch = client.collect(timeout_s=60, on_failure="nan")
    expected = [len(prompt) if len(prompt) < MIB else np.nan for prompt in prompts]
    np.testing.assert_array_equal(batch.rewards["TextLength"], np.array(expected, np.float32))
    (failed,) = batch.failures
    assert (failed.sample, failed.kind) == (1, "invalid")
    assert "its prompt and metadata have 3145729 bytes, and a request takes 917504" in failed.message


def test_a_group_whose_request_is_too_large_is_invalid_and_others_are_scored(small, clients, workers):
    _server, settings = small
    workers("gpu", settings=settings)
    client = clients("OrderInGroup", settings=settings)
    members = [
        Sample(prompt=letter * num_chars, image=image_of(n), group=letter)
        for letter, num_chars in (("a", 600_000), ("b", 100))
        for n in (1, 2)
    ]
    client.submit(members, group_size=2)
    batch = client.collect(timeout_s=60, on_failure="nan")
    assert batch.valid["OrderInGroup"].tolist() == [False, False, True, True]
    assert {failed.kind for failed in batch.failures} == {"invalid"}
    assert re.search(r"the request of its group has 120\d{4} bytes", batch.failures[0].message)


def test_a_member_that_does_not_fit_into_a_request_fails_alone(small, clients, workers):
    _server, settings = small
    workers("gpu", settings=settings)
    client = clients("OrderInGroup", settings=settings)
    prompts = ["a" * 2 * MIB, "a", "a"]
    client.submit([Sample(prompt=p, image=image_of(n), group="g") for n, p in enumerate(prompts)], group_size=3)
    batch = client.collect(timeout_s=60, on_failure="nan")
    assert batch.valid["OrderInGroup"].tolist() == [False, True, True]


@pytest.mark.parametrize("store", ["redis", "file"])
def test_a_sample_that_a_store_can_never_hold_is_invalid_and_waits_for_nothing(
    private_redis, clients, workers, tmp_path, monkeypatch, store
):
    if store == "redis":
        server, payload_url = private_redis("--maxmemory", "16mb", "--maxmemory-policy", "noeviction"), ""
    else:  # Docker's /dev/shm has 64 MB
        server, payload_url = private_redis(), f"file://{tmp_path}/store"
        monkeypatch.setattr(FileStore, "capacity_bytes", lambda _: 16 * MIB)
    settings = load_settings(broker_url=server.url, payload_url=payload_url, claim_ttl_s=2, reconcile_s=0.5)
    workers("gpu", settings=settings)
    client = clients("PixelCode", settings=settings)
    too_large = Sample(prompt="too large", image=np.zeros((2400, 2400, 3), np.uint8))
    client.submit([*samples_of([1, 2]), too_large, *samples_of([3])])
    batch = client.collect(timeout_s=60, on_failure="nan")
    assert batch.rewards["PixelCode"][batch.valid["PixelCode"]].tolist() == [1, 2, 3]
    (failed,) = batch.failures
    assert (failed.sample, failed.kind) == (2, "invalid")
    assert "its media have 17280000 bytes, and the payload store holds 16777216 bytes in all" in failed.message
    client.submit(samples_of([4]))
    assert_rewards(client.collect(timeout_s=60), [4])


def peak_bytes(pid):
    """The most that a process has had in memory."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", [(81, 720, 1280), (300, 1080, 1920)], ids=["81 frames of 720p", "10 s of 1080p"])
def test_a_video_of_true_size_is_scored_and_takes_its_own_size_in_memory(private_redis, clients, workers, shape):
    server = private_redis("--maxmemory-policy", "noeviction")
    settings = load_settings(broker_url=server.url)
    (worker,) = workers("gpu", settings=settings)
    client = clients({"reward_model": "Film", "batch_size": 1}, settings=settings)
    client.submit([Sample(prompt="short", video=film_of(2, 8, 8))])
    client.collect(timeout_s=60)
    film = np.zeros((*shape, 3), np.uint8)
    film[:, 0, 0, 0] = np.random.default_rng(0).integers(0, 256, len(film))
    film[:, -1] = 1
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = peak_bytes("self")
    client.submit([Sample(prompt="long", video=film)])
    batch = client.collect(timeout_s=500)
    assert batch.rewards["Film"].tolist() == [np.float32(reward_of_film(film))]

    in_pil = film.nbytes * 4 / 3
    trainer, of_worker = (peak_bytes("self") - before) / film.nbytes, peak_bytes(worker.pid) / film.nbytes
    print(f"in sizes of the video: the trainer took {trainer:.2f} more, the worker {of_worker:.2f} in all")
    assert peak_bytes("self") - before < 0.1 * film.nbytes + 200 * MIB, "the caller has the one copy"
    assert peak_bytes(worker.pid) < 1.1 * film.nbytes + in_pil + 500 * MIB
