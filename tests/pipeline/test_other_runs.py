"""What a run is told of others that are in its way, and what it leaves them when it ends."""

from __future__ import annotations

import gc
import pickle
import re

import numpy as np
import pytest

from tasks import keys
from tasks.settings import load_settings
from tests.pipeline.conftest import assert_rewards, samples_of
from tests.servers import wait_until
from trainer_client import CollectTimeoutError, Sample

SLOW = {"reward_model": "Slow", "seconds": 0.1, "batch_size": 1}


def payload_keys(redis_server):
    with redis_server.client(1) as store:
        return sorted(key.decode() for key in store.keys(keys.payload("*")))


def test_a_run_is_told_how_many_messages_of_which_run_are_ahead_and_how_long_they_take(clients, workers):
    flood, other = clients(SLOW, run="flood"), clients(SLOW, run="other")
    flood.submit(samples_of(range(400)))
    flood.flush()
    other.submit(samples_of([1]))
    other.flush()
    with pytest.raises(CollectTimeoutError, match=r"400 messages of run 'flood' are ahead in queue 'gpu'") as caught:
        other.collect(timeout_s=0.5)
    assert "at the rate" not in str(caught.value), "it has seen the queue for no second"
    with pytest.raises(CollectTimeoutError, match=r"ahead in queue 'gpu', and none was taken in the last \d s"):
        other.collect(timeout_s=2)

    workers("gpu")
    said = r"([\d,]+) messages of run 'flood' are ahead in queue 'gpu'; (\d+) s at the rate of the last (\d+) s"
    with pytest.raises(CollectTimeoutError, match=said) as caught:
        other.collect(timeout_s=6)
    num_ahead, seconds, _ = (int(number) for number in re.search(said, str(caught.value)).groups())
    assert 250 < num_ahead < 390
    # 20 messages a second; at first none was taken, while the worker started.
    assert num_ahead / 20 * 0.8 < seconds < num_ahead / 20 * 6
    assert_rewards(other.collect(timeout_s=60), [1], "Slow")


def test_several_runs_and_its_own_earlier_messages_are_told_apart(clients, workers):
    mine = clients(SLOW, run="mine")
    for name, num in (("first", 3), ("second", 5), ("first", 4)):
        client = clients(SLOW, run=name, launch=f"{num}")
        client.submit(samples_of(range(num)))
        client.flush()
    mine.submit(samples_of([1, 2]), split="eval")
    mine.flush()
    mine.submit(samples_of([3, 4, 5]))
    mine.flush()
    said = r"7 messages of run 'first', 5 messages of run 'second', 2 messages of this run are ahead in queue 'gpu'"
    with pytest.raises(CollectTimeoutError, match=said):
        mine.collect(timeout_s=0.5)


def test_a_run_alone_in_its_queue_is_told_of_nothing_ahead(clients):
    client = clients(SLOW)
    client.submit(samples_of(range(8)))
    with pytest.raises(CollectTimeoutError, match="queue 'gpu' has no worker") as caught:
        client.collect(timeout_s=1)
    assert "ahead" not in str(caught.value)


def images_of(name, num):
    return [Sample(prompt=f"{name}{i}", image=np.full((512, 512, 3), i, np.uint8)) for i in range(num)]


@pytest.fixture(params=["redis", "file"])
def narrow(request, redis_url, tmp_path):
    """Settings with room for five images of 512 x 512."""
    payload_url = f"file://{tmp_path}/store" if request.param == "file" else ""
    return load_settings(
        broker_url=redis_url, payload_url=payload_url, claim_ttl_s=2, reconcile_s=0.5, max_store_bytes=4_000_000
    )


def test_a_run_is_told_whose_bytes_fill_the_store_and_gets_room_when_that_run_ends(clients, workers, narrow):
    workers("gpu", settings=narrow)
    hoarder = clients({"reward_model": "PixelCode", "queue": "nobody"}, run="hoarder", settings=narrow)
    hoarder.submit(images_of("a", 12))
    wait_until(lambda: hoarder._engine.store.bytes_in_use() > 3_000_000)
    other = clients("PixelCode", run="other", settings=narrow)
    other.submit(images_of("b", 8))
    with pytest.raises(CollectTimeoutError, match=r"in the payload store are 3\.\d MB of run 'hoarder'"):
        other.collect(timeout_s=3)
    hoarder.close()
    batch = other.collect(timeout_s=60)
    np.testing.assert_array_equal(batch.rewards["PixelCode"], [i << 16 | i << 8 | i for i in range(8)])


def test_a_client_that_is_closed_leaves_nothing_in_the_store_that_nobody_can_collect(clients, redis_server):
    client = clients({"reward_model": "PixelCode", "batch_size": 2})
    client.submit(samples_of(range(6)))
    client.submit(samples_of(range(10, 13)), split="eval")
    client.flush()
    assert len(payload_keys(redis_server)) > 9
    client.close()
    gc.collect()
    assert payload_keys(redis_server) == []


@pytest.mark.parametrize("how", ["held", "pickled"])
def test_what_a_ticket_can_collect_is_kept_when_its_client_is_closed(clients, workers, redis_server, how):
    client = clients({"reward_model": "PixelCode", "batch_size": 2}, launch="one")
    client.submit(samples_of(range(4)))
    client.flush()
    ticket = client.submit(samples_of(range(10, 14)))
    client.flush()
    num_before = len(payload_keys(redis_server))
    if how == "pickled":
        ticket = pickle.dumps(ticket)
        gc.collect()
    client.close()
    assert len(payload_keys(redis_server)) == num_before // 2
    workers("gpu")
    if how == "pickled":
        ticket = pickle.loads(ticket)
    successor = clients({"reward_model": "PixelCode", "batch_size": 2}, launch="one")
    assert_rewards(successor.collect(timeout_s=60, ticket=ticket), range(10, 14))
    # Another ticket of that client may have them too.
    assert payload_keys(redis_server) != []
    successor.close()
    assert payload_keys(redis_server) == []


def test_the_media_of_a_group_over_ranks_are_kept_for_the_other_rank(clients, workers):
    order = {"reward_model": "OrderInGroup"}
    ranks = [clients(order, rank=rank, world_size=2, launch="one") for rank in range(2)]
    for rank, client in enumerate(ranks):
        client.submit(samples_of([rank, rank + 2], group="g"), group_size=4, step=0)
        client.flush()
    ranks[0].close()
    workers("gpu")
    wait_until(lambda: ranks[1].pending() == 0, 60)
