"""Tickets of a trainer that is gone, at every moment at which one may have been pickled."""

from __future__ import annotations

import os
import pickle

import pytest

from tests.pipeline.conftest import assert_rewards, samples_of
from tests.reward_models import image_of
from tests.servers import wait_until
from trainer_client import CollectTimeoutError, RewardClient, Sample, ScoringError

ORDER = {"reward_model": "OrderInGroup", "version": "1"}


def end(client):
    """As if its process were gone, and its rank lock too."""
    client._engine._loop.close()
    client._process.rank_lock.release()


@pytest.mark.parametrize("num_answered", [8, 5])
def test_a_ticket_pickled_after_answers_have_come_is_collected(clients, workers, num_answered):
    (worker,) = workers("gpu")
    client = clients("PixelCode", launch="one")
    first = client.submit(samples_of(range(num_answered)))
    client.flush()
    wait_until(lambda: client.pending() == 0)
    worker.stop()
    rest = client.submit(samples_of(range(num_answered, 8)))
    client.flush()
    saved = [pickle.dumps(ticket) for ticket in (first, rest)]
    end(client)
    workers("gpu")
    successor = clients("PixelCode", launch="one")
    for one, numbers in zip(saved, (range(num_answered), range(num_answered, 8)), strict=True):
        assert_rewards(successor.collect(timeout_s=30, ticket=pickle.loads(one)), numbers)


def test_a_successor_in_a_launch_of_its_own_collects_what_its_predecessor_asked_for(clients, workers):
    client = clients("PixelCode")  # a class without version, which counts the launch
    ticket = client.submit(samples_of(range(8)))
    client.flush()
    saved = pickle.dumps(ticket)
    end(client)
    workers("gpu")
    successor = clients("PixelCode")
    assert successor.launch != client.launch
    assert_rewards(successor.collect(timeout_s=30, ticket=pickle.loads(saved)), range(8))


def test_tickets_of_a_group_over_two_ranks_are_collected_whichever_rank_sent_it(clients, workers):
    ranks = [clients(ORDER, rank=r, world_size=2, launch="one") for r in range(2)]
    tickets = []
    for rank, numbers in zip(ranks, ([10, 30], [20, 40]), strict=True):
        tickets.append(rank.submit(samples_of(numbers, group="g"), group_size=4, step=0))
        rank.flush()
    wait_until(lambda: [t.num_sent for t in tickets] == [2, 2], 30)
    saved = [pickle.dumps(t) for t in tickets]
    for rank in ranks:
        end(rank)
    workers("gpu")
    for r, order in ((1, [1, 3]), (0, [0, 2])):
        successor = clients(ORDER, rank=r, world_size=2, launch="one")
        assert_rewards(successor.collect(timeout_s=30, ticket=pickle.loads(saved[r])), order, "OrderInGroup")


def test_an_answer_that_is_gone_with_its_trainer_is_a_reason_and_no_long_wait(clients, workers, redis_server):
    workers("gpu")
    client = clients("PixelCode", launch="one")
    ticket = client.submit(samples_of(range(4)))
    client.flush()
    wait_until(lambda: client.pending() == 0)
    saved = pickle.dumps(ticket)
    end(client)
    with redis_server.client() as redis:
        redis.flushall()
    with pytest.raises(ScoringError, match="its media left the payload store with the process that held them"):
        clients("PixelCode", launch="one").collect(timeout_s=60, ticket=pickle.loads(saved))


def test_a_ticket_of_evaluation_has_the_times_of_its_own_step(clients, workers):
    workers("gpu")
    client = clients("PixelCode")
    ticket = client.submit(samples_of(range(4)), split="eval")
    batch = client.collect(timeout_s=60, ticket=ticket)
    assert_rewards(batch, range(4))
    assert (batch.split, batch.step) == ("eval", 0)
    assert batch.timings["submit_s"] > 0


def test_a_pickled_ticket_is_collected_where_it_was_made(clients, workers):
    workers("gpu")
    client = clients("PixelCode")
    for numbers in (range(8), range(4)):  # at once, when nothing is sent yet, and in the next step
        ticket = pickle.loads(pickle.dumps(client.submit(samples_of(numbers))))
        assert_rewards(client.collect(timeout_s=30, ticket=ticket), numbers)
    assert client.pending() == 0


def test_tickets_of_one_message_are_collected_whatever_became_of_the_wait_for_another(clients, workers):
    client = clients({"reward_model": "PixelCode", "batch_size": 4}, launch="one")
    tickets = [client.submit(samples_of([n])) for n in range(4)]
    client.flush()
    saved = [pickle.dumps(ticket) for ticket in tickets]
    end(client)
    successor = clients({"reward_model": "PixelCode", "batch_size": 4}, launch="one")
    for one in saved:
        with pytest.raises(CollectTimeoutError):
            successor.collect(timeout_s=0.2, ticket=pickle.loads(one))
    workers("gpu")
    for n, one in enumerate(saved):
        assert_rewards(successor.collect(timeout_s=30, ticket=pickle.loads(one)), [n])


def test_a_forked_child_collects_a_ticket_of_its_parent(clients, workers):
    workers("gpu")
    client = clients({"reward_model": "Slow", "seconds": 1})
    ticket = client.submit(samples_of(range(4)))
    client.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert_rewards(client.collect(timeout_s=30, ticket=ticket), range(4), "Slow")
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert_rewards(client.collect(timeout_s=30), range(4), "Slow")


def test_a_ticket_of_evaluation_is_collected_though_its_samples_travelled_with_a_group_of_training(settings, workers):
    alone = {"reward_model": "jpeg_incompressibility"}
    config = {"rewards": [alone, {"reward_model": "jpeg_incompressibility_Rank"}], "eval_rewards": alone}
    samples = [Sample(prompt="p", image=image_of(n), group="g") for n in (1, 2)]
    client = RewardClient.from_dict(config, "test", launch="one", settings=settings)
    client.submit(samples, group_size=2)
    ticket = client.submit(samples, split="eval")
    client.flush()
    assert [chunk.fingerprint for chunk in pickle.loads(pickle.dumps(ticket)).deliveries] == [
        client.config.rewards[1].fingerprint
    ]
    saved = pickle.dumps(ticket)
    end(client)
    workers("gpu")
    with RewardClient.from_dict(config, "test", launch="one", settings=settings) as successor:
        batch = successor.collect(timeout_s=30, ticket=pickle.loads(saved))
    assert batch.valid["jpeg_incompressibility"].tolist() == [True, True]
    client.close()
