"""What holds for the advantages of any batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.trainer.batches import (
    batches,
    every_method,
    whole_batches,
)
from trainer_client.advantages.formulas import gdpo


@every_method
@settings(max_examples=200)
@given(
    values=st.lists(st.floats(width=64), min_size=0, max_size=40),
    num_groups=st.integers(1, 6),
    weight=st.floats(-3.4e38, 3.4e38),
)
def test_whatever_comes_in_advantages_are_finite(
    method: Any, values: list[float], num_groups: int, weight: float
) -> None:
    groups = [i % num_groups for i in range(len(values))]
    found = method({"a": values, "b": values[::-1]}, groups, {"a": weight, "b": 1.0})
    assert found.dtype == np.float32
    assert found.shape == (len(values),)
    assert np.isfinite(found).all()


@every_method
def test_there_may_be_no_samples_no_rewards_and_no_vote(method: Any) -> None:
    assert method({"a": []}, [], {"a": 1.0}).shape == (0,)
    assert method({}, [1, 1], {}).tolist() == [0.0, 0.0]
    assert method({"a": [np.nan] * 3}, [1, 1, 2], {"a": 1.0}).tolist() == [0.0] * 3


@every_method
@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf, 1e39])
def test_a_weight_that_is_not_finite_is_an_error(method: Any, weight: float) -> None:
    with pytest.raises(ValueError, match="the weight of 'a' must be a finite number"):
        method({"a": [1.0, 2.0]}, [0, 0], {"a": weight})


@every_method
@pytest.mark.parametrize("num_groups", [1, 7, 10_000])
def test_few_and_many_groups(method: Any, num_groups: int) -> None:
    rng = np.random.default_rng(num_groups)
    groups = [f"group {i % num_groups}" for i in range(4 * num_groups)]
    rewards = {"a": rng.normal(size=len(groups)).astype(np.float32), "b": rng.normal(size=len(groups))}
    found = method(rewards, groups, {"a": 1.0, "b": 2.0})
    assert np.isfinite(found).all()
    sums = np.bincount(np.arange(len(groups)) % num_groups, weights=found)
    np.testing.assert_allclose(sums, 0.0, atol=1e-4)
    assert np.abs(found).max() > 0.5


@every_method
@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(method: Any, batch: Any, random: Any) -> None:
    rewards, groups, weights = batch
    order = list(range(len(groups)))
    random.shuffle(order)
    shuffled = method({n: v[order] for n, v in rewards.items()}, [groups[i] for i in order], weights)
    np.testing.assert_allclose(shuffled, method(*batch)[order], rtol=1e-5, atol=1e-6)


@every_method
@given(whole_batches, st.sampled_from([-30.0, 0.25, 64.0]))
def test_shifting_a_reward_changes_nothing(method: Any, batch: Any, shift: float) -> None:
    rewards, groups, weights = batch
    shifted = {**rewards, "reward 0": rewards["reward 0"] + shift}
    np.testing.assert_allclose(method(shifted, groups, weights), method(*batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [0.125, 3.0, 1000.0])
@given(whole_batches)
def test_one_scaled_reward_changes_nothing_in_gdpo(factor: float, batch: Any) -> None:
    rewards, groups, weights = batch
    scaled = {**rewards, "reward 0": rewards["reward 0"] * factor}
    np.testing.assert_allclose(gdpo(scaled, groups, weights), gdpo(*batch), rtol=1e-4, atol=1e-5)


@every_method
@pytest.mark.parametrize("factor", [0.125, 3.0, 1000.0])
@given(batch=whole_batches)
def test_scaling_all_rewards_changes_nothing_and_a_negative_factor_turns_it_round(
    method: Any, factor: float, batch: Any
) -> None:
    rewards, groups, weights = batch
    expected = method(*batch)
    assume(np.abs(expected).max(initial=0) == 0 or np.abs(expected).max() > 1e-3)  # no deviation at its floor
    scaled = method({n: v * factor for n, v in rewards.items()}, groups, weights)
    np.testing.assert_allclose(scaled, expected, rtol=1e-4, atol=1e-5)
    turned = method({n: -v for n, v in rewards.items()}, groups, weights)
    np.testing.assert_allclose(turned, -expected, rtol=1e-4, atol=1e-5)


@given(whole_batches)
def test_gdpo_has_mean_zero_and_deviation_one_or_is_all_zero(batch: Any) -> None:
    found = gdpo(*batch).astype(np.float64)
    assert abs(found.mean()) < 1e-5
    assert abs(found.std() - 1) < 1e-3 or np.abs(found).max() < 1e-3
