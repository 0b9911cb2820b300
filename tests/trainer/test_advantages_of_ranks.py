"""Advantages over several ranks are those of one, or an error on all."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.batches import (
    Ranks,
    batch_of,
    batches,
    every_method,
)
from trainer_client.advantages.formulas import advantages_of, gdpo, weighted_sum

_SIMPLE_IDS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.sampled_from([2**63, 2**64, -(2**70), 2**200, 0.5, -0.0, 1.0, 2.0**70, float("inf")]),
    st.text(max_size=2),
    st.sampled_from(["\ud800", b"", b"x", "x", np.int64(1), np.float64(0.5), np.bool_(True), np.str_("x")]),
)
_IDS = st.recursive(
    _SIMPLE_IDS,
    lambda ids: st.one_of(st.lists(ids, max_size=2).map(tuple), st.frozensets(ids, max_size=2)),
    max_leaves=4,
)


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
    assert sorted(ranks.calls) == list(range(num_ranks))


def test_group_ids_of_ranks_may_be_tuples_and_numpys_numbers() -> None:
    ids = [("dog", (1, None)), np.int64(2**60), ("dog", (2, None)), 2**60]

    def on_rank(rank: int, gather: Any) -> Any:
        return gdpo({"a": [1.0 + rank, 5.0, 7.0, 8.0 - 2 * rank]}, ids, {"a": 1.0}, gather=gather)

    found = np.concatenate(Ranks(2).run(on_rank))
    expected = gdpo({"a": [1.0, 5.0, 7.0, 8.0, 2.0, 5.0, 7.0, 6.0]}, [0, 1, 2, 1] * 2, {"a": 1.0})
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(_IDS, min_size=2, max_size=8))
def test_ids_are_equal_between_ranks_exactly_when_they_are_equal_here(ids: list[Any]) -> None:
    rewards = np.arange(2.0 * len(ids)) ** 2

    def on_rank(rank: int, gather: Any) -> Any:
        mine = ids if rank == 0 else ids[::-1]
        return weighted_sum({"a": rewards[rank::2]}, mine, {"a": 1.0}, gather=gather)

    numbers: dict[Any, int] = {}
    everyone = [numbers.setdefault(one, len(numbers)) for one in ids + ids[::-1]]
    expected = weighted_sum({"a": np.concatenate([rewards[::2], rewards[1::2]])}, everyone, {"a": 1.0})
    np.testing.assert_array_equal(np.concatenate(Ranks(2).run(on_rank)), expected)


@pytest.mark.parametrize("unfit", [uuid.UUID(int=1), Decimal(1), ("dog", object())])
def test_an_id_that_ranks_cannot_compare_is_named_on_all(unfit: Any) -> None:
    def on_rank(rank: int, gather: Any) -> Any:
        return gdpo({"a": [1.0, 2.0]}, ["cat", unfit if rank else "cat"], {"a": 1.0}, gather=gather)

    for raised in Ranks(3).run(on_rank):
        assert "rank 1 of those gathered: group ids that several ranks compare must be text" in str(raised)
        assert "at 1" in str(raised)


def test_tensors_of_no_axis_are_ids_by_value() -> None:
    groups = list(torch.tensor([7, 7, 8, 8]))
    found = gdpo({"a": [1.0, 2.0, 5.0, 3.0]}, groups, {"a": 1.0})
    np.testing.assert_array_equal(found, gdpo({"a": [1.0, 2.0, 5.0, 3.0]}, [7, 7, 8, 8], {"a": 1.0}))


def _raises(rewards: Any, groups: Any, weights: Any, *, gather: Any = None) -> Any:
    if rewards["a"][0] == 0:
        raise KeyError("mine")
    return np.zeros(2)


def _raises_before_it_gathers(rewards: Any, groups: Any, weights: Any, *, gather: Any = None) -> Any:
    _raises(rewards, groups, weights)
    return gdpo(rewards, groups, weights, gather=gather)


def _raises_after_it_gathered(rewards: Any, groups: Any, weights: Any, *, gather: Any = None) -> Any:
    found = gdpo(rewards, groups, weights, gather=gather)
    _raises(rewards, groups, weights)
    return found


def _is_not_stopped(rewards: Any, groups: Any, weights: Any, *, gather: Any = None) -> Any:
    _raises(rewards, groups, weights)
    try:
        gather(1)
    except ValueError:
        return np.zeros(2)


def _is_nan(rewards: Any, groups: Any, weights: Any, *, gather: Any = None) -> Any:
    return [1.0, np.nan] if rewards["a"][0] == 0 else [1.0, 2.0]


def _is_short(rewards: Any, groups: Any, weights: Any, *, gather: Any = None) -> Any:
    return [1.0] if rewards["a"][0] == 0 else [1.0, 2.0]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (_raises, "KeyError: 'mine'"),
        (_raises_before_it_gathers, "KeyError: 'mine'"),
        (_raises_after_it_gathered, "KeyError: 'mine'"),
        (_is_not_stopped, "KeyError: 'mine'"),
        (_is_nan, "1 advantages that are NaN or infinite"),
        (_is_short, r"must return (2,) advantages, found the shape (1,)"),
    ],
)
def test_a_method_of_ones_own_that_fails_on_one_rank_is_an_error_on_all(
    method: Callable[..., Any], message: str
) -> None:
    def on_rank(rank: int, gather: Any) -> Any:
        batch = batch_of({"a": [float(rank), 9.0]}, ["g", "g"], weights={"a": 1.0})
        return advantages_of(batch, method=method, gather=gather)

    for raised in Ranks(3).run(on_rank):
        assert isinstance(raised, ValueError)
        assert "rank 0 of those gathered: " in str(raised)
        assert message in str(raised)


def test_a_method_of_ones_own_gathers_as_ours_do() -> None:
    def twice(rewards: Any, groups: Any, weights: Any, *, gather: Any = None) -> Any:
        return gdpo(rewards, groups, weights, gather=gather) + weighted_sum(rewards, groups, weights, gather=gather)

    def on_rank(rank: int, gather: Any) -> Any:
        batch = batch_of({"a": [1.0 + rank, 9.0 * rank]}, ["g", "h"], weights={"a": 1.0})
        return advantages_of(batch, method=twice, gather=gather)

    everyone = {"a": np.array([1.0, 0.0, 2.0, 9.0])}, ["g", "h"] * 2, {"a": 1.0}
    ranks = Ranks(2)
    np.testing.assert_array_equal(np.concatenate(ranks.run(on_rank)), gdpo(*everyone) + weighted_sum(*everyone))
    assert sorted(ranks.calls) == [0] * 3 + [1] * 3


def test_a_method_of_ones_own_that_gathers_on_one_rank_only_is_an_error_on_all() -> None:
    def sometimes(rewards: Any, groups: Any, weights: Any, *, gather: Any = None) -> Any:
        return np.zeros(1 + len(gather(0))) if rewards["a"][0] else np.zeros(2)

    def on_rank(rank: int, gather: Any) -> Any:
        batch = batch_of({"a": [float(rank), 9.0]}, ["g", "g"], weights={"a": 1.0})
        return advantages_of(batch, method=sometimes, gather=gather)

    for raised in Ranks(2).run(on_rank):
        assert "must call gather equally often on all ranks" in str(raised)


@pytest.mark.parametrize("method", ["sum", lambda rewards, *args, **kwargs: rewards["a"]])
def test_a_method_that_one_rank_does_not_know_is_an_error_on_all(method: Any) -> None:
    def on_rank(rank: int, gather: Any) -> Any:
        batch = batch_of({"a": [1.0, 9.0]}, ["g", "g"], weights={"a": 1.0})
        return advantages_of(batch, method="gpdo" if rank else method, gather=gather)  # type: ignore[arg-type]

    for raised in Ranks(2).run(on_rank):
        assert "rank 1 of those gathered: the advantage method must be 'gdpo', 'sum' or a function" in str(raised)


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
