"""When samples go: chunks fill, groups complete, steps are released by their own `collect()` alone, or given up."""

from __future__ import annotations

import base64
import contextlib
import json
import time

import msgpack
import pytest

from tasks import keys
from tasks.servers.connections import connect
from tasks.settings import load_settings
from tests.pipeline.conftest import assert_rewards, config_of, samples_of, together
from tests.reward_models import image_of
from tests.servers import messages_in, wait_until
from trainer_client import CollectTimeoutError, RewardClient, Sample


@pytest.fixture
def sent(settings):
    """How many samples each message in the queue `gpu` is for."""
    with connect(settings.broker) as broker, connect(settings.payloads) as store:

        def sizes():
            names = [msgpack.unpackb(base64.b64decode(json.loads(m)["body"]))[0][1] for m in messages_in(broker, "gpu")]
            return sorted(len(msgpack.unpackb(store.get(keys.payload(name)))["samples"]) for name in names)

        yield sizes


def payloads_left(settings):
    with connect(settings.payloads) as store:
        return store.keys(keys.payload("*"))


# --- filling -------------------------------------------------------------------------------------


def test_a_chunk_fills_over_several_submits_and_goes_when_it_is_full(clients, sent, never_idle):
    client = clients({"reward_model": "PixelCode", "batch_size": 16}, {"reward_model": "Null", "batch_size": 5})
    for start in range(0, 20, 4):
        client.submit(samples_of(range(start, start + 4)))
    wait_until(lambda: sent() == [5, 5, 5, 5, 16])
    time.sleep(0.5)
    assert sent() == [5, 5, 5, 5, 16]
    client.flush()
    assert sent() == [4, 5, 5, 5, 5, 16]


def test_a_chunk_that_is_not_full_goes_after_a_short_idle_time(clients, sent):
    client = clients({"reward_model": "PixelCode", "batch_size": 16})
    client.submit(samples_of(range(3)))
    wait_until(lambda: sum(sent()) == 3)


def test_a_group_goes_as_soon_as_it_is_full(clients, sent, never_idle):
    client = clients("OrderInGroup")
    client.submit(samples_of([1, 2], group="a") + samples_of([3], group="b"), group_size=3)
    time.sleep(0.5)
    assert sent() == []
    client.submit(samples_of([4], group="a"), group_size=3)
    wait_until(lambda: sent() == [1])  # one sample whose members are three


# --- steps that are open at the same time --------------------------------------------------------


def test_a_collect_leaves_the_open_groups_of_another_split_alone(settings, workers):
    workers("gpu")
    config = config_of("PixelCode") | {"eval_rewards": config_of("OrderInGroup")["rewards"]}
    with RewardClient.from_dict(config, "test", settings=settings) as client:
        client.submit(samples_of([30, 10], group="g"), split="eval")
        client.submit(samples_of([1, 2]))
        assert_rewards(client.collect(timeout_s=60), [1, 2])
        client.submit(samples_of([20, 40], group="g"), split="eval")
        assert_rewards(client.collect(timeout_s=60, split="eval"), [2, 0, 1, 3], "OrderInGroup")


def test_a_collect_leaves_what_another_split_holds_alone(settings, workers, tmp_path):
    calls = tmp_path / "calls"
    calls.touch()
    held = {"reward_model": "Counts", "async_reward": False, "file": str(calls)}
    config = config_of("PixelCode") | {"eval_rewards": config_of(held)["rewards"]}
    workers("gpu")
    with RewardClient.from_dict(config, "test", settings=settings) as client:
        client.submit(samples_of([30, 10]), split="eval")
        client.submit(samples_of([1, 2]))
        assert_rewards(client.collect(timeout_s=60), [1, 2])
        assert calls.read_text() == ""
        assert_rewards(client.collect(timeout_s=60, split="eval"), [30, 10], "Counts")


def test_what_one_split_holds_goes_when_another_that_needs_the_same_is_collected(settings, workers):
    held = config_of({"reward_model": "PixelCode", "async_reward": False})["rewards"]
    workers("gpu")
    config = {"rewards": held, "eval_rewards": held}
    with RewardClient.from_dict(config, "test", settings=settings) as client:
        client.submit(samples_of([1, 2]), split="eval")
        client.submit(samples_of([1, 2]))
        assert_rewards(client.collect(timeout_s=60), [1, 2])
        assert_rewards(client.collect(timeout_s=60, split="eval"), [1, 2])


def test_a_submit_that_waits_for_its_backlog_closes_no_group(redis_url, workers):
    settings = load_settings(broker_url=redis_url, max_backlog=2, claim_ttl_s=2, reconcile_s=0.5)
    workers("gpu", settings=settings)
    config = config_of("OrderInGroup", {"reward_model": "PixelCode", "batch_size": 64})
    numbers = [50, 40, 30, 20, 10, 60, 70, 80]
    with RewardClient.from_dict(config, "test", settings=settings) as client:
        for number in numbers:
            client.submit(samples_of([number], group="g"))
        batch = client.collect(timeout_s=60)
    assert_rewards(batch, numbers)
    assert_rewards(batch, [sorted(numbers).index(n) for n in numbers], "OrderInGroup")


# --- given up ------------------------------------------------------------------------------------


def test_a_step_that_is_cancelled_at_any_moment_leaves_nothing_and_is_not_scored(clients, settings, workers, tmp_path):
    calls = tmp_path / "calls"
    calls.touch()
    counted = {"reward_model": "Counts", "file": str(calls), "version": "1"}
    held = {**counted, "name": "held", "async_reward": False, "x": 1}
    client = clients(counted, held, {"reward_model": "OrderInGroup", "version": "1"})
    for i in range(100):
        samples = [Sample(prompt="", image=image_of(10 * i + n, 128, 128), group=i) for n in range(8)]
        client.submit(samples[: 8 - i % 2], group_size=8)
        time.sleep(0.002 * (i % 6))
        client.cancel()
    wait_until(lambda: client._engine.num_unsent == 0, 30)
    wait_until(lambda: not payloads_left(settings), 30)
    state = client._engine._state
    assert (len(state.core.payloads), state.core.awaited, state.core.deliveries, len(state.groups)) == (0, {}, {}, 0)
    workers("gpu")
    client.submit(samples_of([5000], group="last"), group_size=1)
    assert_rewards(client.collect(timeout_s=60), [5000], "Counts")
    assert calls.read_text().split() == ["5000", "5000"]
    with connect(settings.broker) as broker:
        assert messages_in(broker, "gpu") == []


def test_a_step_cancelled_while_the_store_is_full_makes_room_for_the_next(redis_url, workers):
    image_bytes = 64 * 64 * 3
    settings = load_settings(
        broker_url=redis_url, max_store_bytes=6 * image_bytes + 4000, claim_ttl_s=2, reconcile_s=0.5
    )
    fields = ["image", "condition_images"]
    config = config_of({"reward_model": "PixelCode", "batch_size": 1, "required_fields": fields})

    def samples(numbers):
        return [
            Sample(image=image_of(n, 64, 64), condition_images=[image_of(m + n, 64, 64) for m in (1000, 2000)])
            for n in numbers
        ]

    with RewardClient.from_dict(config, "test", settings=settings) as client:
        client.submit(samples(range(12)))
        wait_until(lambda: client._engine.known_reasons() is not None)
        client.cancel()
        wait_until(lambda: not payloads_left(settings))
        workers("gpu", settings=settings)
        client.submit(samples(range(100, 104)))
        assert_rewards(client.collect(timeout_s=60), range(100, 104))


def test_a_submit_whose_backlog_does_not_move_raises_and_queues_nothing(redis_url, workers):
    settings = load_settings(
        broker_url=redis_url,
        max_store_bytes=20_000,
        max_backlog=4,
        submit_timeout_s=1,
        claim_ttl_s=2,
        reconcile_s=0.5,
    )
    config = config_of({"reward_model": "PixelCode", "batch_size": 1})
    with RewardClient.from_dict(config, "test", settings=settings) as client:
        client.submit([Sample(image=image_of(n, 64, 64)) for n in range(10)])
        with pytest.raises(CollectTimeoutError) as raised:
            client.submit([Sample(image=image_of(99, 64, 64))])
        assert "nothing was queued: " in str(raised.value)
        assert "REWARDQ_MAX_STORE_BYTES is 20000" in str(raised.value)
        assert "queue 'gpu' has no worker" in str(raised.value)
        workers("gpu", settings=settings)
        assert_rewards(client.collect(timeout_s=60), range(10))


# --- a store without room ------------------------------------------------------------------------


def small_store(redis_url, num_images):
    return load_settings(
        broker_url=redis_url, max_store_bytes=num_images * 64 * 64 * 3 + 2000, claim_ttl_s=2, reconcile_s=0.5
    )


def test_a_lost_message_is_sent_again_while_others_wait_for_room(redis_url, redis_server, workers):
    settings = small_store(redis_url, 4)
    config = config_of({"reward_model": "PixelCode", "batch_size": 1})
    with RewardClient.from_dict(config, "test", settings=settings) as client:
        client.submit([Sample(image=image_of(n, 64, 64)) for n in range(12)])
        with redis_server.client() as broker:
            wait_until(lambda: len(messages_in(broker, "gpu")) >= 4)
            wait_until(lambda: client._engine.known_reasons() is not None)
            broker.delete(*broker.keys("rewardq:queue:gpu*"))
        workers("gpu", settings=settings)
        assert_rewards(client.collect(timeout_s=60), range(12))


@pytest.mark.parametrize("num_images", [12, 30])
def test_groups_over_ranks_are_scored_though_their_samples_wait_for_room(redis_url, workers, num_images, monkeypatch):
    """With room for 12 the first rank may fill the store with halves of groups, before the second has any."""
    monkeypatch.setattr("trainer_client.engine.room.STUCK_S", 1.0)
    settings = small_store(redis_url, num_images)
    workers("gpu", settings=settings)
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                RewardClient.from_dict(
                    config_of("OrderInGroup"), "test", rank=r, world_size=2, launch="one", settings=settings
                )
            )
            for r in range(2)
        ]
        for r, rank in enumerate(ranks):
            samples = [Sample(prompt=f"{g}", image=image_of(2 * g + r, 64, 64), group=g) for g in range(24)]
            rank.submit(samples, group_size=2, step=0)
        batches = together(*(lambda rank=rank: rank.collect(timeout_s=90) for rank in ranks))
        for r, batch in enumerate(batches):
            assert_rewards(batch, [r] * 24, "OrderInGroup")


@pytest.mark.parametrize("group_size", [2, None])
def test_groups_that_fill_the_store_before_one_is_complete_get_the_rest_of_their_samples(
    redis_url, workers, group_size, monkeypatch
):
    monkeypatch.setattr("trainer_client.engine.room.STUCK_S", 1.0)
    settings = small_store(redis_url, 3)
    workers("gpu", settings=settings)
    with RewardClient.from_dict(config_of("OrderInGroup"), "test", settings=settings) as client:
        for half in range(2):
            samples = [Sample(image=image_of(half * 10 + g, 64, 64), group=g) for g in range(8)]
            client.submit(samples, group_size=group_size)
        assert_rewards(client.collect(timeout_s=60), [0] * 8 + [1] * 8, "OrderInGroup")


def test_a_full_store_is_not_exceeded_while_messages_wait(redis_url, redis_server, monkeypatch):
    monkeypatch.setattr("trainer_client.engine.room.STUCK_S", 0.2)
    settings = small_store(redis_url, 6)
    config = config_of("OrderInGroup", {"reward_model": "PixelCode", "batch_size": 1})
    with RewardClient.from_dict(config, "test", settings=settings) as client:
        client.submit([Sample(image=image_of(g, 64, 64), group=g) for g in range(16)], group_size=2)
        wait_until(lambda: client._engine.known_reasons() is not None)
        time.sleep(2)
        with connect(settings.payloads) as store:
            assert int(store.get(keys.PAYLOAD_BYTES)) <= settings.max_store_bytes + 10_000  # some requests


# --- queues that nobody serves -------------------------------------------------------------------


def test_an_eval_reward_whose_queue_nobody_serves_is_named_and_training_goes_on(settings, workers):
    workers("gpu")
    lonely = config_of({"reward_model": "PixelCode", "queue": "nobody"})["rewards"]
    with RewardClient.from_dict(config_of("Null") | {"eval_rewards": lonely}, "test", settings=settings) as client:
        client.submit(samples_of([1, 2]), split="eval")
        client.submit(samples_of([1, 2]))
        assert client.collect(timeout_s=60).valid["Null"].all()
        with pytest.raises(
            CollectTimeoutError, match="queue 'nobody' has no worker; start one: celery -A tasks worker -Q nobody"
        ):
            client.collect(timeout_s=1.5, split="eval")
