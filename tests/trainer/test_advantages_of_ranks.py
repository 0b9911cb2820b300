"""Advantages over several ranks are those of one, or an error on all."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.batches import (
    Ranks,
    batches,
    every_method,
)
from trainer_client.advantages import gdpo


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
