"""Advantages against their formulas written out in plain Python; masks, groups, errors, and of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from tasks.rewards import RewardConfig
from tests.trainer.batches import (
    batch_of,
    batches,
    every_method,
    expected_gdpo,
    expected_sum,
)
from trainer_client.advantages import advantages_of, gdpo, weighted_sum


@given(batches())
def test_the_weighted_sum_equals_its_formula(batch: Any) -> None:
    for global_std in (True, False):
        found = weighted_sum(*batch, global_std=global_std)
        np.testing.assert_allclose(found, expected_sum(*batch, global_std=global_std), rtol=1e-5, atol=1e-6)


@given(batches())
def test_gdpo_equals_its_formula(batch: Any) -> None:
    np.testing.assert_allclose(gdpo(*batch), expected_gdpo(*batch), rtol=1e-5, atol=1e-6)


def test_a_small_batch_by_hand() -> None:
    rewards = {"a": [1.0, 3.0, 10.0, 10.0], "b": [0.0, 0.0, 0.0, 4.0]}
    groups, weights = ["cat", "cat", "dog", "dog"], {"a": 1.0, "b": 0.5}
    # totals 1, 3, 10, 12: group means 2 and 11; their deviation is sqrt(mean of 5.5^2, 3.5^2, 3.5^2, 5.5^2)
    expected = np.array([-1.0, 1.0, -1.0, 1.0])
    np.testing.assert_allclose(weighted_sum(rewards, groups, weights), expected / np.sqrt(21.25), rtol=1e-6)
    np.testing.assert_allclose(weighted_sum(rewards, groups, weights, global_std=False), expected, rtol=1e-6)
    # each in its group: a is -1, 1, 0, 0; b is 0, 0, -1, 1; sums -1, 1, -0.5, 0.5 of mean 0
    np.testing.assert_allclose(gdpo(rewards, groups, weights), np.array([-1, 1, -0.5, 0.5]) / np.sqrt(0.625), rtol=1e-6)


@every_method
@given(batches(max_missing=0.4))
def test_masked_samples_get_zero_and_change_nothing_for_others(method: Any, batch: Any) -> None:
    rewards, groups, weights = batch
    there = np.isfinite(np.stack(list(rewards.values()))).all(axis=0)
    nothing = {name: np.where(there, values, np.nan) for name, values in rewards.items()}
    found = method(nothing, groups, weights)
    assert (found[~there] == 0).all()
    only = method(
        {name: values[there] for name, values in rewards.items()},
        [g for g, is_there in zip(groups, there, strict=True) if is_there],
        weights,
    )
    np.testing.assert_allclose(found[there], only, rtol=1e-5, atol=1e-7)


@every_method
@pytest.mark.parametrize("nothing", [np.nan, np.inf, -np.inf, 1e300, None])
def test_what_is_no_reward_is_masked_whatever_it_is(method: Any, nothing: Any) -> None:
    found = method({"a": [1.0, 2.0, nothing, 4.0]}, [0, 0, 0, 0], {"a": 1.0})
    np.testing.assert_array_equal(found, method({"a": [1.0, 2.0, np.nan, 4.0]}, [0, 0, 0, 0], {"a": 1.0}))
    assert found[2] == 0
    assert found[0] < 0 < found[3]


@every_method
def test_valid_masks_what_is_there(method: Any) -> None:
    rewards, groups, weights = {"a": [1.0, 2.0, 99.0, 4.0]}, [0, 0, 0, 0], {"a": 1.0}
    found = method(rewards, groups, weights, valid={"a": np.array([True, True, False, True])})
    np.testing.assert_array_equal(found, method({"a": [1.0, 2.0, np.nan, 4.0]}, groups, weights))


def test_a_sample_votes_in_a_sum_only_with_all_its_rewards_and_in_gdpo_with_each() -> None:
    rewards = {"a": [0.0, 1.0, 5.0, np.nan], "b": [0.0, 1.0, np.nan, 3.0]}
    groups, weights = [0, 0, 0, 0], {"a": 1.0, "b": 1.0}
    assert weighted_sum(rewards, groups, weights).tolist() == [-1.0, 1.0, 0.0, 0.0]
    found = gdpo(rewards, groups, weights)
    assert (found != 0).all()
    np.testing.assert_allclose(found, expected_gdpo(rewards, groups, weights), rtol=1e-5)


@every_method
def test_a_reward_of_weight_zero_is_not_asked(method: Any) -> None:
    groups = [0, 0, 1, 1]
    found = method({"a": [1.0, 2.0, 3.0, 5.0], "b": [np.nan] * 4}, groups, {"a": 1.0, "b": 0.0})
    np.testing.assert_array_equal(found, method({"a": [1.0, 2.0, 3.0, 5.0]}, groups, {"a": 1.0}))


@every_method
def test_groups_of_one_and_constant_groups_give_exact_zeros(method: Any) -> None:
    rewards = {"a": [7.3, 0.1, 0.1, 0.1, 1.0, 2.0, 4.0, np.nan]}
    found = method(rewards, ["one", "same", "same", "same", "rest", "rest", "left", "left"], {"a": 0.7})
    assert found[[0, 1, 2, 3, 6, 7]].tolist() == [0.0] * 6
    assert found[4] < 0 < found[5]


@every_method
def test_a_spread_of_rounding_gives_zeros_unless_it_is_taken_at_its_word(method: Any) -> None:
    one = np.float32(25.0)
    rewards = {"a": np.array([one, np.nextafter(one, np.float32(26)), one, 1.0, 2.0, 3.0])}
    groups = ["rounding"] * 3 + ["real"] * 3
    found = method(rewards, groups, {"a": 1.0})
    assert found[:3].tolist() == [0.0] * 3
    assert found[3] < 0 < found[5]
    at_its_word = method(rewards, groups, {"a": 1.0}, noise_floor=False)
    assert (at_its_word[:3] != 0).all()


def test_a_small_spread_beside_a_large_constant_reward_still_counts_in_a_sum() -> None:
    rewards = {"large": np.full(4, 1e6), "small": np.array([0.0, 0.25, 0.5, 0.75])}
    found = weighted_sum(rewards, [0, 0, 0, 0], {"large": 1.0, "small": 1.0})
    np.testing.assert_allclose(found, weighted_sum({"small": rewards["small"]}, [0] * 4, {"small": 1.0}), rtol=1e-4)


@every_method
def test_group_ids_may_be_anything_hashable(method: Any) -> None:
    rewards, weights = {"a": np.array([1.0, 2.0, 3.0, 5.0])}, {"a": 1.0}
    expected = method(rewards, [0, 0, 1, 1], weights)
    close = 2**60  # as float32, the next integer is the same number
    for ids in (
        [close, close, close + 1, close + 1],
        ["x", "x", "", ""],
        [(1, "x"), (1, "x"), (1, "y"), (1, "y")],
        [None, None, frozenset({1}), frozenset({1})],
        np.array([close, close, close + 1, close + 1]),
        torch.tensor([close, close, close + 1, close + 1]),
    ):
        np.testing.assert_array_equal(method(rewards, ids, weights), expected)


@pytest.mark.parametrize(
    ("rewards", "groups", "weights", "valid", "message"),
    [
        ({"a": [1.0]}, [0, 0], {"a": 1.0}, None, r"the reward 'a' must have the shape \(2,\), found \(1,\)"),
        ({"a": [[1.0]]}, [0], {"a": 1.0}, None, r"must have the shape \(1,\), found \(1, 1\)"),
        ({"a": [1.0]}, [0], {}, None, "each reward needs its weight: rewards are a, weights are for none"),
        ({"a": [1.0]}, [0], {"a": 1.0, "b": 1.0}, None, "weights are for a, b"),
        ({"a": [1.0]}, [[0]], {"a": 1.0}, None, "group ids must be hashable, found a list at 0"),
        ({"a": [1.0]}, [0], {"a": 1.0}, {"b": [True]}, "valid has b, rewards are a"),
        ({"a": [1.0]}, [0], {"a": 1.0}, {"a": [1.0]}, r"valid\['a'\] must be bool \(1,\), found float64"),
    ],
)
@every_method
def test_wrong_arguments_are_named(
    method: Any, rewards: Any, groups: Any, weights: Any, valid: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        method(rewards, groups, weights, valid=valid)


@every_method
def test_tensors_of_any_float_type_are_taken(method: Any) -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    expected = method({"a": values.numpy()}, [0, 0, 1, 1], {"a": 1.0})
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        found = method({"a": values.to(dtype)}, [0, 0, 1, 1], {"a": 1.0}, valid={"a": torch.ones(4, dtype=torch.bool)})
        np.testing.assert_array_equal(found, expected)


def test_the_advantages_of_a_batch_by_each_method() -> None:
    rewards, groups, weights = {"a": [1.0, 2.0, np.nan, 4.0]}, ["x", "x", "y", "y"], {"a": 2.0}
    batch = batch_of(rewards, groups, weights=weights)
    np.testing.assert_array_equal(advantages_of(batch), gdpo(rewards, groups, weights))
    np.testing.assert_array_equal(advantages_of(batch, method="sum"), weighted_sum(rewards, groups, weights))
    np.testing.assert_array_equal(
        advantages_of(batch, method="sum", global_std=False), weighted_sum(rewards, groups, weights, global_std=False)
    )
    specs = RewardConfig.from_dict({"rewards": {"name": "a", "reward_model": "OCR", "weight": -1.0}}).rewards
    np.testing.assert_array_equal(advantages_of(batch, specs), gdpo(rewards, groups, {"a": -1.0}))


def test_a_method_of_ones_own_is_called_as_ours_are_and_checked() -> None:
    batch = batch_of({"a": [1.0, 2.0]}, ["x", "x"], weights={"a": 2.0})

    def doubled(rewards: Any, groups: Any, weights: Any, *, gather: Any = None) -> Any:
        return 2 * rewards["a"] * weights["a"]

    assert advantages_of(batch, method=doubled).tolist() == [4.0, 8.0]
    with pytest.raises(ValueError, match=r"must return \(2,\) advantages, found the shape \(1,\)"):
        advantages_of(batch, method=lambda *args, **kwargs: [1.0])
    with pytest.raises(ValueError, match="1 advantages that are NaN or infinite"):
        advantages_of(batch, method=lambda *args, **kwargs: [1.0, np.nan])
    with pytest.raises(ValueError, match="must be 'gdpo', 'sum' or a function, found 'gpdo'"):
        advantages_of(batch, method="gpdo")  # type: ignore[arg-type]
