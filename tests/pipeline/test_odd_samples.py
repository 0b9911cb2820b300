"""One odd sample fails alone, and what a trainer changes after `submit()` makes no wrong reward: on a real Redis."""

from __future__ import annotations

import io
import logging
import types

import numpy as np
import pytest
import torch
from PIL import Image

from tasks import media
from tasks.settings import load_settings
from tests.pipeline.conftest import assert_rewards, expected_ranks, jpeg_bytes, noisy, samples_of
from tests.reward_models import image_of
from trainer_client import Sample

NUM_SAMPLES = 32


class Hostile(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ == "detach":
            raise AttributeError("hostile detach")
        return super().__torch_function__(func, types, args, kwargs or {})


def palette_file() -> Image.Image:
    image = Image.new("P", (4, 4))
    image.putpalette([10, 20, 30, 40, 50, 60])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=b"\x80\xff")
    return Image.open(file)


def cut_pcx() -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(image_of(1, 32, 32)).quantize(8).save(file, "PCX")
    return Image.open(io.BytesIO(file.getvalue()[:-100]))


ODD = {
    "black and white of a palette": (palette_file().convert("1"), "info['transparency'] of an image of mode '1'"),
    "grey of a palette": (palette_file().point(list(range(256)), "L"), "info['transparency']"),
    "hostile tensor": (torch.full((3, 8, 8), 0.5).as_subclass(Hostile), "AttributeError: hostile detach"),
    "masked": (np.ma.masked_array(image_of(1), mask=True), "are masked"),
    "cut PCX": (cut_pcx(), "the file is cut"),
}


def test_odd_samples_fail_alone_and_the_client_goes_on(clients, workers):
    workers("gpu")
    client = clients({"reward_model": "PixelCode", "batch_size": 3})
    odd = [Sample(prompt=name, image=image) for name, (image, _) in ODD.items()]
    client.submit([*samples_of([1]), *odd, *samples_of([2, 3])])
    batch = client.collect(timeout_s=60, on_failure="nan")
    assert batch.rewards["PixelCode"][[0, -2, -1]].tolist() == [1, 2, 3]
    messages = {failure.sample: failure.message for failure in batch.failures}
    assert sorted(messages) == list(range(1, 1 + len(odd)))
    for i, (_, words) in enumerate(ODD.values(), 1):
        assert words in messages[i]
    client.submit(samples_of([4]))
    assert_rewards(client.collect(timeout_s=60), [4])


def test_a_group_is_ranked_without_its_odd_member(clients, workers):
    workers("gpu")
    client = clients({"reward_model": "jpeg_compressibility_Rank", "name": "rank"})
    pictures = [noisy(n, 20 * n) for n in (1, 2, 3)]
    odd = palette_file().convert("1")
    client.submit([Sample(prompt="p", image=image, group="g") for image in [pictures[0], odd, *pictures[1:]]])
    batch = client.collect(timeout_s=60, on_failure="nan")
    ranks = expected_ranks([-jpeg_bytes(picture) for picture in pictures])
    # Of three members that can be ranked, whatever the size of the group.
    assert np.argsort(batch.rewards["rank"][[0, 2, 3]]).tolist() == np.argsort(ranks).tolist()
    (failure,) = batch.failures
    assert failure.sample == 1
    assert "info['transparency']" in failure.message


def test_mappings_of_every_class_reach_the_model(clients, workers):
    workers("gpu")
    client = clients("MetadataNumber")
    given = [{"n": 1}, types.MappingProxyType({"n": 2, "deep": types.MappingProxyType({"x": 1})}), {"n": np.int64(3)}]
    client.submit([Sample(prompt="p", metadata=metadata) for metadata in given])
    assert_rewards(client.collect(timeout_s=60), [1, 2, 3], "MetadataNumber")


def test_a_mapping_and_a_sample_that_are_filled_anew_for_each_submit_have_their_own_rewards(clients, workers):
    client = clients({"reward_model": "MetadataNumber", "batch_size": 4})
    metadata: dict[str, int] = {}
    sample = Sample(metadata=metadata)
    for n in range(NUM_SAMPLES):
        sample.prompt, metadata["n"] = f"prompt {n}", n
        client.submit([sample])
    sample.prompt, metadata["n"] = "last", -1
    workers("gpu")
    assert_rewards(client.collect(timeout_s=60), range(NUM_SAMPLES), "MetadataNumber")


def refilled_array():
    buffer = np.zeros((16, 16, 3), np.uint8)
    return buffer, lambda n: buffer.__setitem__(slice(None), image_of(n, 16, 16))


def refilled_image():
    image = Image.new("RGB", (16, 16))
    return image, lambda n: image.paste(Image.fromarray(image_of(n, 16, 16)))


def refilled_tensor():
    buffer = np.zeros((3, 16, 16), np.float32)
    tensor = torch.from_numpy(buffer)
    return tensor, lambda n: buffer.__setitem__(slice(None), image_of(n, 16, 16).transpose(2, 0, 1) / 255)


@pytest.mark.parametrize("form", [refilled_array, refilled_image, refilled_tensor])
def test_a_buffer_that_is_filled_anew_for_each_submit_makes_no_wrong_reward(clients, workers, form):
    workers("gpu")
    client = clients({"reward_model": "PixelCode", "batch_size": 4})
    buffer, fill = form()
    for n in range(NUM_SAMPLES):
        fill(n)
        client.submit([Sample(prompt=f"number {n}", image=buffer)])
    batch = client.collect(timeout_s=60, on_failure="nan")
    rewards = batch.rewards["PixelCode"]
    failed = {failure.sample: failure.message for failure in batch.failures}
    for n in range(NUM_SAMPLES):
        if n in failed:
            assert "was changed after submit()" in failed[n]
            assert "call flush() before you reuse it" in failed[n]
        else:
            assert rewards[n] == n
    assert rewards[-1] == NUM_SAMPLES - 1  # nobody changed the last

    for n in range(NUM_SAMPLES):
        fill(n)
        client.submit([Sample(prompt=f"number {n}", image=buffer)])
        client.flush()
    assert_rewards(client.collect(timeout_s=60), range(NUM_SAMPLES))


def test_tensors_without_axes_name_groups_by_their_values(clients, workers):
    workers("gpu")
    client = clients({"reward_model": "jpeg_compressibility_Rank", "name": "rank"})
    ids = torch.tensor([5, 5, 6, 6])
    pictures = [noisy(n, 20 * n) for n in (1, 2, 3, 4)]
    client.submit([Sample(prompt="p", image=p, group=g) for p, g in zip(pictures, ids, strict=True)], group_size=2)
    batch = client.collect(timeout_s=60)
    sizes = [-jpeg_bytes(picture) for picture in pictures]
    assert batch.rewards["rank"].tolist() == [*expected_ranks(sizes[:2]), *expected_ranks(sizes[2:])]
    assert list(batch.groups) == [5, 5, 6, 6]


def test_an_odd_entry_in_the_payload_folder_fails_the_sample_in_whose_place_it_is(
    clients, workers, redis_url, tmp_path
):
    settings = load_settings(
        broker_url=redis_url, payload_url=f"file://{tmp_path}/payloads", claim_ttl_s=2, reconcile_s=0.5
    )
    workers("gpu", settings=settings)
    client = clients("PixelCode", settings=settings)
    name = f"{client._engine.client_id}.1.{media.digest(image_of(1))}.payload"
    (tmp_path / "payloads" / name / "inside").mkdir(parents=True)
    client.submit(samples_of([1]))
    client.submit(samples_of([2, 3]))
    batch = client.collect(timeout_s=60, on_failure="nan")
    assert batch.rewards["PixelCode"][1:].tolist() == [2, 3]
    (failure,) = batch.failures
    assert failure.sample == 0
    assert "its media cannot be stored: SettingsError" in failure.message
    assert "is a folder of user" in failure.message


def test_an_exif_orientation_is_hinted_at_once(clients, workers, caplog):
    workers("gpu")
    client = clients("PixelCode")
    images = []
    for n in (1, 2):
        exif = Image.Exif()
        exif[0x0112] = 6
        file = io.BytesIO()
        Image.fromarray(image_of(n)).save(file, "PNG", exif=exif)
        images.append(Image.open(file))
    with caplog.at_level(logging.WARNING):
        client.submit([Sample(prompt="p", image=image) for image in images])
        assert_rewards(client.collect(timeout_s=60), [1, 2])
    assert sum("EXIF orientation 6, which is not applied" in text for text in caplog.messages) == 1
