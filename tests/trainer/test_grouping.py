"""Which samples are a group where they do not say so."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.reward_models import image_of
from trainer_client import Sample
from trainer_client.steps.grouping import groups_of


def test_equal_prompts_are_a_group_named_after_them():
    assert groups_of([Sample("a red fox"), Sample("a blue door"), Sample("a red fox")], "0.1") == [
        "a red fox",
        "a blue door",
        "a red fox",
    ]


def test_long_prompts_are_told_apart_by_their_ends():
    long = "a photo of " * 500
    found = groups_of([Sample(long), Sample(long + "a fox"), Sample(long)], "0.1")
    assert found[0] == found[2] != found[1]
    assert max(map(len, found)) < 300


def test_a_group_that_is_given_stays_whatever_it_is():
    given = [7, ("a", 1), "x", frozenset({1})]
    assert groups_of([Sample("p", group=group) for group in given], "0.1") == given


def test_equal_condition_media_are_a_group_whatever_objects_and_types_they_are():
    pixels = image_of(1, 16, 12)
    same = [pixels, pixels.copy(), Image.fromarray(pixels), torch.from_numpy(pixels.transpose(2, 0, 1).copy()) / 255]
    found = groups_of([Sample("make it blue", condition_images=[one]) for one in same], "0.1")
    assert len(set(found)) == 1
    assert found[0].startswith("make it blue [condition ")


def test_other_condition_media_under_one_prompt_are_other_groups():
    one, other = image_of(1), image_of(2)
    samples = [
        Sample("edit", condition_images=[one]),
        Sample("edit", condition_images=[other]),
        Sample("edit", condition_images=[one, other]),
        Sample("edit", condition_images=[other, one]),
        Sample("edit", condition_videos=[np.stack([one])]),
        Sample("edit", condition_images=[one.reshape(4, 16, 3)]),
        Sample("edit", condition_images=[]),
        Sample("edit"),
    ]
    found = groups_of(samples, "0.1")
    assert len(set(found)) == 7
    assert found[6] == found[7] == "edit"


def test_the_id_is_the_same_on_all_ranks():
    def on_rank(rank):
        return groups_of([Sample("edit", condition_images=[image_of(3)])], f"{rank}.1")

    assert on_rank(0) == on_rank(1)


def test_condition_media_that_cannot_be_read_are_compared_with_nobody():
    buffer = io.BytesIO()
    Image.fromarray(image_of(1, 128, 128)).save(buffer, "JPEG")

    def truncated():
        return Image.open(io.BytesIO(buffer.getvalue()[:2000]))

    found = [groups_of([Sample("edit", condition_images=[truncated()]) for _ in range(2)], f"{r}.1") for r in range(2)]
    assert len({group for one in found for group in one}) == 4


@pytest.mark.parametrize("num_samples", [8])
def test_a_source_that_a_whole_group_shares_is_read_once(num_samples):
    reads = []

    class Counted(Image.Image):
        def load(self):
            reads.append(1)
            return super().load()

    source = Image.fromarray(image_of(1, 32, 32))
    source.__class__ = Counted
    groups_of([Sample("edit", condition_images=[source])], "0.1")
    num_alone = len(reads)
    reads.clear()
    assert len(set(groups_of([Sample("edit", condition_images=[source]) for _ in range(num_samples)], "0.2"))) == 1
    assert len(reads) == num_alone > 0
