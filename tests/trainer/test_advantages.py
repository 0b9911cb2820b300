"""Advantages against formulas written out in plain Python, and their properties under masks, shifts and many ranks."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tasks.rewards import RewardConfig
from trainer_client.advantages import advantages_of, gdpo, weighted_sum
from trainer_client.results import RewardBatch

Numbers = Sequence[float]
METHODS: list[Callable[..., Any]] = [
    weighted_sum,
    lambda *args, **kwargs: weighted_sum(*args, global_std=False, **kwargs),
    gdpo,
]
IDS = ["sum", "sum by group", "gdpo"]
every_method = pytest.mark.parametrize("method", METHODS, ids=IDS)


# --- an independent computation -------------------------------------------------------------------


def mean_of(values: Numbers) -> float:
    return float(sum(Fraction(v) for v in values) / len(values))


def std_of(values: Numbers) -> float:
    mean = mean_of(values)
    return max(math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)), 1e-6)


def members_of(groups: Sequence[Hashable]) -> list[list[int]]:
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    return list(members.values())


def expected_sum(
    rewards: Mapping[str, Numbers], groups: Sequence[Hashable], weights: Mapping[str, float], global_std: bool = True
) -> list[float]:
    """By the formula; a sample with a NaN is masked."""
    totals = [math.fsum(weights[name] * values[i] for name, values in rewards.items()) for i in range(len(groups))]
    result = [0.0] * len(groups)
    voting = [total for total in totals if not math.isnan(total)]
    for members in members_of(groups):
        there = [i for i in members if not math.isnan(totals[i])]
        if len(there) >= 2:
            mean = mean_of([totals[i] for i in there])
            std = std_of(voting if global_std else [totals[i] for i in there])
            for i in there:
                result[i] = (totals[i] - mean) / std
    return result


def expected_gdpo(
    rewards: Mapping[str, Numbers], groups: Sequence[Hashable], weights: Mapping[str, float]
) -> list[float]:
    """By the formula; a NaN is no vote."""
    sums = [0.0] * len(groups)
    compared = [False] * len(groups)
    for name, values in rewards.items():
        for members in members_of(groups):
            there = [i for i in members if not math.isnan(values[i])]
            if len(there) >= 2:
                mean, std = mean_of([values[i] for i in there]), std_of([values[i] for i in there])
                for i in there:
                    sums[i] += weights[name] * (values[i] - mean) / std
                    compared[i] = True
    voting = [sums[i] for i in range(len(groups)) if any(not math.isnan(v[i]) for v in rewards.values())]
    if not voting:
        return [0.0] * len(groups)
    mean, std = mean_of(voting), std_of(voting)
    return [(sums[i] - mean) / std if compared[i] else 0.0 for i in range(len(groups))]


# --- batches ---------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn, max_missing: float = 0.5) -> tuple[dict[str, Any], list[Hashable], dict[str, float]]:
    """Rewards with some NaN, groups of 1 to 9 in any order, and weights."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    groups: list[Hashable] = [g for g, size in enumerate(sizes) for _ in range(size)]
    rng.shuffle(groups)
    rewards, weights = {}, {}
    for k in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["normal", "binary", "constant", "by group"]))
        center, scale = draw(st.sampled_from([0.0, 0.5, -20.0])), draw(st.sampled_from([0.01, 1.0, 30.0]))
        values = {
            "normal": center + scale * rng.normal(size=len(groups)),
            "binary": rng.integers(0, 2, len(groups)).astype(float),
            "constant": np.full(len(groups), center + 0.1),
            "by group": center + 0.3 * np.array(groups, float),
        }[kind]
        values[rng.random(len(groups)) < draw(st.floats(0, max_missing))] = np.nan
        rewards[f"reward {k}"] = values
        weights[f"reward {k}"] = draw(st.sampled_from([1.0, 0.5, -2.0, 3.25]))
    return rewards, groups, weights


whole_batches = batches(max_missing=0.0)


# --- equal to the formulas -------------------------------------------------------------------------


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


# --- never NaN ------------------------------------------------------------------------------------


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


# --- masks ----------------------------------------------------------------------------------------


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


# --- groups ---------------------------------------------------------------------------------------


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


# --- properties -----------------------------------------------------------------------------------


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
    assert abs(found.std() - 1) < 1e-4 or np.abs(found).max() < 1e-3


# --- several ranks --------------------------------------------------------------------------------


class Ranks:
    """Simulated ranks, one thread each."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.num_calls = 0
        self._barrier = threading.Barrier(num_ranks)
        self._brought: list[Any] = [None] * num_ranks

    def gather_for(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(mine: Any) -> list[Any]:
            self.num_calls += 1
            self._brought[rank] = mine
            self._barrier.wait(10)
            everyone = list(self._brought)
            self._barrier.wait(10)
            return everyone

        return gather

    def run(self, on_rank: Callable[[int, Any], Any]) -> list[Any]:
        """What each rank returned or raised."""

        def run(rank: int) -> Any:
            try:
                return on_rank(rank, self.gather_for(rank))
            except ValueError as error:
                return error

        with ThreadPoolExecutor(self.num_ranks) as pool:
            return list(pool.map(run, range(self.num_ranks)))


@every_method
@settings(max_examples=30, deadline=None)
@given(batches(), st.integers(1, 5))
def test_several_ranks_equal_one_though_groups_span_them(method: Any, batch: Any, num_ranks: int) -> None:
    rewards, groups, weights = batch
    cuts = [len(groups) * r // num_ranks for r in range(num_ranks + 1)]

    def on_rank(rank: int, gather: Any) -> Any:
        part = slice(cuts[rank], cuts[rank + 1])
        return method({n: v[part] for n, v in rewards.items()}, groups[part], weights, gather=gather)

    ranks = Ranks(num_ranks)
    np.testing.assert_array_equal(np.concatenate(ranks.run(on_rank)), method(*batch))
    assert ranks.num_calls == num_ranks


def test_a_rank_with_wrong_arguments_makes_all_ranks_raise() -> None:
    def on_rank(rank: int, gather: Any) -> Any:
        return gdpo({"a": [1.0] if rank else [1.0, 2.0]}, [0], {"a": 1.0}, gather=gather)

    for raised in Ranks(3).run(on_rank):
        assert isinstance(raised, ValueError)
        assert "rank 0 of those gathered: the reward 'a' must have the shape (1,), found (2,)" in str(raised)


def test_ranks_with_other_weights_are_an_error_on_all() -> None:
    raised = Ranks(2).run(lambda rank, gather: gdpo({"a": [1.0]}, [0], {"a": 1.0 + rank}, gather=gather))
    assert all("ranks must have the same rewards and weights" in str(error) for error in raised)


def _gloo_rank(rank: int, folder: str, results: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)

    def gather(mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return everyone

    rewards = {"a": [1.0, 5.0] if rank == 0 else [2.0, 9.0]}
    np.save(f"{results}/{rank}.npy", gdpo(rewards, ["cat", ("dog", 1)], {"a": 1.0}, gather=gather))
    dist.destroy_process_group()


def test_torch_distributed_gathers(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_gloo_rank, (str(tmp_path), str(tmp_path)), nprocs=2)
    found = np.concatenate([np.load(tmp_path / f"{rank}.npy") for rank in range(2)])
    expected = gdpo({"a": [1.0, 5.0, 2.0, 9.0]}, ["cat", ("dog", 1)] * 2, {"a": 1.0})
    np.testing.assert_array_equal(found, expected)


# --- errors and other kinds of arrays --------------------------------------------------------------


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


# --- of a batch -----------------------------------------------------------------------------------


def batch_of(rewards: Mapping[str, Numbers], groups: Sequence[Hashable], weights: Mapping[str, float]) -> RewardBatch:
    arrays = {name: np.array(values, np.float32) for name, values in rewards.items()}
    return RewardBatch(
        rewards=arrays,
        valid={name: np.isfinite(values) for name, values in arrays.items()},
        failures=(),
        info={},
        groups=tuple(groups),
        timings={},
        num_hits={},
        weights=weights,
    )


def test_the_advantages_of_a_batch_by_each_method() -> None:
    rewards, groups, weights = {"a": [1.0, 2.0, np.nan, 4.0]}, ["x", "x", "y", "y"], {"a": 2.0}
    batch = batch_of(rewards, groups, weights)
    np.testing.assert_array_equal(advantages_of(batch), gdpo(rewards, groups, weights))
    np.testing.assert_array_equal(advantages_of(batch, method="sum"), weighted_sum(rewards, groups, weights))
    np.testing.assert_array_equal(
        advantages_of(batch, method="sum", global_std=False), weighted_sum(rewards, groups, weights, global_std=False)
    )
    specs = RewardConfig.from_dict({"rewards": {"name": "a", "reward_model": "OCR", "weight": -1.0}}).rewards
    np.testing.assert_array_equal(advantages_of(batch, specs), gdpo(rewards, groups, {"a": -1.0}))


def test_a_method_of_ones_own_is_called_as_ours_are_and_checked() -> None:
    batch = batch_of({"a": [1.0, 2.0]}, ["x", "x"], {"a": 2.0})

    def doubled(rewards: Any, groups: Any, weights: Any, *, gather: Any = None) -> Any:
        return 2 * rewards["a"] * weights["a"]

    assert advantages_of(batch, method=doubled).tolist() == [4.0, 8.0]
    with pytest.raises(ValueError, match=r"must return \(2,\) advantages, found the shape \(1,\)"):
        advantages_of(batch, method=lambda *args, **kwargs: [1.0])
    with pytest.raises(ValueError, match="1 advantages that are NaN or infinite"):
        advantages_of(batch, method=lambda *args, **kwargs: [1.0, np.nan])
    with pytest.raises(ValueError, match="must be 'gdpo', 'sum' or a function, found 'gpdo'"):
        advantages_of(batch, method="gpdo")  # type: ignore[arg-type]
