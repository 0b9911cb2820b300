from __future__ import annotations

import collections
import enum
import pickle
import types
import uuid
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import InvalidSampleError
from tasks.hashing import canonical, hash_of
from tasks.rewards import RewardConfig
from tasks.samples import Sample
from trainer_client.steps.group_ids import plain_id
from trainer_client.steps.plain_data import MAX_VALUES, NotPlainError, plain_copy
from trainer_client.steps.sample_checks import check

ANY = RewardConfig.from_dict({"rewards": [{"reward_model": "my_rewards.Mine"}]}).rewards
PIXELS = np.zeros((4, 5, 3), np.uint8)


class Letter(enum.StrEnum):
    A = "a"


class Number(enum.IntEnum):
    THREE = 3


def copy_of(sample: Sample) -> Sample:
    return check(sample, ANY, "sample 3", 10_000)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (types.MappingProxyType({"y": 1}), {"y": 1}),
        (collections.ChainMap({"y": 1}, {"z": 2}), {"y": 1, "z": 2}),
        (collections.UserDict(y=1), {"y": 1}),
        (collections.OrderedDict(y=1), {"y": 1}),
        (collections.defaultdict(int, y=1), {"y": 1}),
        (collections.namedtuple("Point", "x y")(1, 2), [1, 2]),
        ((1, (2, [3])), [1, [2, [3]]]),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(-3), -3),
        (np.bool_(True), True),
        (np.str_("q"), "q"),
        (np.array(7, np.uint8), 7),
        (torch.tensor(2.5), 2.5),
        (torch.tensor(2.5, dtype=torch.bfloat16, requires_grad=True), 2.5),
        (Letter.A, "a"),
        (Number.THREE, 3),
        (2**64 - 1, 2**64 - 1),
        (None, None),
    ],
)
def test_metadata_become_values_of_pythons_own_types_at_any_depth(given, plain):
    copied = copy_of(Sample(metadata={"a": [{"b": given}]})).metadata
    assert copied == {"a": [{"b": plain}]}
    assert type(copied["a"][0]["b"]) is type(plain)
    assert pickle.loads(pickle.dumps(copied)) == copied
    assert hash_of([canonical(copied)], 32) == hash_of([canonical({"a": [{"b": plain}]})], 32)


def test_what_is_changed_after_the_copy_does_not_reach_it():
    shared = {"list": [1, {"deep": 2}], "n": 0}
    sample = Sample(prompt="before", metadata=shared, condition_images=[PIXELS], condition_videos=[[PIXELS]])
    copied = copy_of(sample)
    shared["list"][1]["deep"] = 99
    shared["n"], shared["new"] = 1, 2
    sample.prompt, sample.group, sample.image = "after", "g", PIXELS
    sample.condition_images.append(PIXELS)
    sample.condition_videos[0].append(PIXELS)
    assert copied.metadata == {"list": [1, {"deep": 2}], "n": 0}
    assert (copied.prompt, copied.group, copied.image) == ("before", None, None)
    assert len(copied.condition_images) == 1
    assert len(copied.condition_videos[0]) == 1


def test_media_are_not_copied():
    copied = copy_of(Sample(image=PIXELS, video=[PIXELS], condition_images=(PIXELS,)))
    assert copied.image is PIXELS
    assert copied.video[0] is PIXELS
    assert copied.condition_images[0] is PIXELS


def test_a_text_of_a_subclass_becomes_its_text():
    assert type(copy_of(Sample(prompt=Letter.A)).prompt) is str
    assert copy_of(Sample(prompt=np.str_("abc"))).prompt == "abc"


def test_a_list_that_multiplies_is_refused_before_it_takes_long():
    laughs: list[Any] = [1]
    for _ in range(60):
        laughs = [laughs, laughs]
    with pytest.raises(NotPlainError, match=f"more than {MAX_VALUES} values"):
        plain_copy(laughs)


def test_a_mapping_that_raises_is_refused_with_what_it_raised():
    class Broken(dict):
        def items(self):
            raise ZeroDivisionError("hostile items")

    with pytest.raises(InvalidSampleError, match="sample 3: cannot be looked at: ZeroDivisionError: hostile items"):
        copy_of(Sample(metadata=Broken(a=1)))


def test_an_error_whose_text_raises_is_told_by_its_class():
    class UnspeakableError(Exception):
        def __str__(self):
            raise RuntimeError("no words")

    class Broken(dict):
        def items(self):
            raise UnspeakableError

    with pytest.raises(InvalidSampleError, match=r"UnspeakableError: \(its text cannot be read\)"):
        copy_of(Sample(metadata=Broken(a=1)))


@dataclass(frozen=True)
class Place:
    row: int
    inner: Any = None


class Thing:
    """Equal to nothing but itself."""


class Raising:
    def __hash__(self):
        raise ZeroDivisionError("hostile hash")

    def __eq__(self, other):
        return True


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (torch.tensor([5, 6])[0], 5),
        (torch.tensor(2.5), 2.5),
        (torch.tensor(True), True),
        (np.int64(5), 5),
        (np.array(5), 5),
        (np.float32(0.5), 0.5),
        (np.str_("g"), "g"),
        (Letter.A, "a"),
        (Number.THREE, 3),
        ((torch.tensor(1), "a", None, np.int8(2)), (1, "a", None, 2)),
        (frozenset({np.int64(3)}), frozenset({3})),
        (collections.namedtuple("Point", "x y")(1, 2), (1, 2)),
        (Fraction(1, 3), Fraction(1, 3)),
        (uuid.UUID(int=7), uuid.UUID(int=7)),
        (Place(3), Place(3)),
        (b"id", b"id"),
        (0.1, 0.1),
        (None, None),
    ],
)
def test_a_group_is_a_value_that_a_pickled_ticket_names_again(given, plain):
    found = plain_id(given, "sample 3")
    assert found == plain
    assert type(found) is type(plain)
    assert {pickle.loads(pickle.dumps(found)): 1}[found] == 1


@pytest.mark.parametrize(
    ("group", "needle"),
    [
        (float("nan"), "group is NaN"),
        (np.float32("nan"), "group is NaN"),
        (torch.tensor(float("nan")), "group is NaN"),
        (("a", float("nan")), "group is NaN"),
        (complex("nan"), "group is NaN"),
        (object(), "equals nothing but this very object"),
        (Thing(), "found a Thing, which equals nothing but this very object"),
        (("a", Thing()), "equals nothing but this very object"),
        (lambda: 0, "equals nothing but this very object"),
        (Thing, "equals nothing but this very object"),
        (Place(1, Thing()), "does not equal its pickled copy"),
        (Place(1, lambda: 0), "cannot be pickled with its ticket"),
        (torch.tensor([1, 2]), "found a Tensor of shape (2,)"),
        (torch.zeros((), device="meta"), "cannot be looked at: "),
        (np.array([1]), "found a ndarray of shape (1,)"),
        (np.ma.masked, "found a MaskedConstant"),
        ([1], "found a list, which is not hashable"),
        ({"a": 1}, "found a dict, which is not hashable"),
        ("\ud800", "group is no valid Unicode"),
        (("a", "\udfff"), "group is no valid Unicode"),
        (Raising(), "cannot be looked at: ZeroDivisionError: hostile hash"),
    ],
)
def test_a_group_that_no_other_rank_could_name_is_refused(group, needle):
    with pytest.raises(InvalidSampleError) as caught:
        copy_of(Sample(prompt="p", image=PIXELS, group=group))
    assert str(caught.value).startswith("sample 3: ")
    assert needle in str(caught.value)


@pytest.mark.parametrize("value", [np.array(24), torch.tensor(24.0), Fraction(24), np.float32(24)])
def test_rates_become_pythons_own_numbers(value):
    copied = copy_of(Sample(prompt="p", fps=value, sample_rate=29.97))
    assert copied.fps == 24
    assert type(copied.fps) is int
    assert copied.sample_rate == 29.97


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4, alphabet="abc"), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(alphabet="abc", max_size=3), PLAIN, max_size=5))
def test_plain_data_are_copied_as_they_are_and_can_be_packed(metadata):
    copied = plain_copy(metadata)
    assert copied == metadata
    assert msgpack.unpackb(msgpack.packb(copied)) == copied
