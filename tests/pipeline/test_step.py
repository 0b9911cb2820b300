"""The main job: submit, score on workers of their own, collect."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tasks import keys
from tasks.servers.connections import connect
from tasks.settings import load_settings
from tests.pipeline.conftest import assert_rewards, config_of, samples_of
from tests.reward_models import image_of
from tests.servers import ROOT, clean_env, messages_in, run_python, wait_until, worker_env
from trainer_client import CollectTimeoutError, RewardClient, Sample, ScoringError, Ticket


def payload_keys(settings):
    with connect(settings.payloads) as client:
        return [k.decode() for k in client.keys(keys.payload("*"))]


def test_rewards_arrive_in_submit_order_across_calls_and_rewards(clients, workers):
    workers("gpu")
    client = clients("PixelCode", {"reward_model": "PixelCode", "name": "plus", "add": 1000, "batch_size": 3})
    client.submit(samples_of(range(10), group="a"))
    client.submit(samples_of(range(50, 55), group="b"))
    batch = client.collect(timeout_s=60)
    numbers = [*range(10), *range(50, 55)]
    assert_rewards(batch, numbers)
    assert_rewards(batch, [n + 1000 for n in numbers], "plus")
    assert batch.groups == ("a",) * 10 + ("b",) * 5
    assert batch.failures == ()
    assert batch.info["PixelCode"][12]["number"] == 52
    assert batch.info["PixelCode"][12]["origin"]["worker"].startswith("gpu.")


def test_each_of_200_submits_from_4_threads_and_2_processes_lands_at_its_own_sample(clients, workers, settings):
    workers("gpu")
    client = clients("PixelCode")

    def submit_and_collect(client, offset, results):
        tickets = {}

        def work(thread):
            for i in range(25):
                numbers = [offset + thread * 1000 + i * 4 + k for k in range(2)]
                tickets[thread, i] = (client.submit(samples_of(numbers)), numbers)

        threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for ticket, numbers in tickets.values():
            batch = client.collect(timeout_s=90, ticket=ticket)
            results.append(batch.rewards["PixelCode"].tolist() == [float(n) for n in numbers])

    def child(pipe):
        results = []
        submit_and_collect(client, 500_000, results)  # a fork of this client: its own connections and threads
        client.close()
        pipe.send(results)
        pipe.close()

    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    results: list[bool] = []
    submit_and_collect(client, 0, results)
    assert ours.poll(90), "the child gave no answer"
    results += ours.recv()
    process.join(30)
    assert process.exitcode == 0
    assert len(results) == 200
    assert all(results)


def test_a_child_forked_after_submits_works_and_leaves_the_parents_step_alone(clients, workers):
    workers("gpu")
    client = clients("PixelCode")
    client.submit(samples_of(range(8)))
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            client.submit(samples_of([91, 92]))
            batch = client.collect(timeout_s=60)
            status = 0 if batch.rewards["PixelCode"].tolist() == [91.0, 92.0] else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert_rewards(client.collect(timeout_s=60), range(8))


def test_messages_are_small_whatever_the_images_and_no_payload_is_left_after_collect(
    clients, settings, workers, never_idle
):
    client = clients("PixelCode", {"reward_model": "Null", "batch_size": 32})
    images = [image_of(n, 512, 512) for n in range(32)]
    client.submit([Sample(prompt="p" * 5000, image=image) for image in images])
    client.flush()
    with connect(settings.broker) as broker:
        messages = messages_in(broker, "gpu")
    assert len(messages) == 3
    assert max(map(len, messages)) < 64 * 1024
    body = json.loads(messages[0])
    assert "pppp" not in json.dumps(body)
    stored = payload_keys(settings)
    assert len(stored) == 32 + 3  # each image once, whatever the number of rewards, and the requests
    workers("gpu")
    assert_rewards(client.collect(timeout_s=60), range(32))
    wait_until(lambda: not payload_keys(settings))
    with connect(settings.payloads) as store:
        assert int(store.get(keys.PAYLOAD_BYTES) or 0) == 0


def test_payloads_travel_through_shared_memory_too(clients, redis_url, workers, tmp_path):
    settings = load_settings(
        broker_url=redis_url, payload_url=f"file://{tmp_path}/payloads", claim_ttl_s=2, reconcile_s=0.5
    )
    workers("gpu", settings=settings)
    client = clients("PixelCode", settings=settings)
    client.submit(samples_of(range(20)))
    assert_rewards(client.collect(timeout_s=60), range(20))
    wait_until(lambda: os.listdir(tmp_path / "payloads") == ["identity"])


def test_equal_samples_and_equal_rewards_are_scored_once(clients, workers, tmp_path):
    calls = tmp_path / "calls"
    counting = {"reward_model": "Counts", "file": str(calls), "version": "1"}
    workers("gpu")
    client = clients({**counting, "name": "one"}, {**counting, "name": "two", "batch_size": 5, "weight": 2.0})
    client.submit(samples_of([1, 2, 1, 3, 2, 1]))
    batch = client.collect(timeout_s=60)
    assert_rewards(batch, [1, 2, 1, 3, 2, 1], "one")
    assert_rewards(batch, [1, 2, 1, 3, 2, 1], "two")
    assert sorted(calls.read_text().split()) == ["1", "2", "3"]

    client.submit(samples_of([3, 4]))  # the next step: what is known is not scored again
    batch = client.collect(timeout_s=60)
    assert_rewards(batch, [3, 4], "one")
    assert sorted(calls.read_text().split()) == ["1", "2", "3", "4"]
    assert batch.num_hits == {"one": 1, "two": 1}


def test_a_failed_sample_is_nan_with_its_reason_and_its_neighbours_keep_their_rewards(clients, workers):
    workers("gpu")
    client = clients("RaisesOn")
    samples = samples_of(range(8))
    samples[5].metadata = {"raise": True}
    client.submit(samples)
    with pytest.raises(ScoringError, match=r"'RaisesOn': 1 of 8 samples \(1 failed\): sample 5") as caught:
        client.collect(timeout_s=60)
    batch = caught.value.batch
    assert np.isnan(batch.rewards["RaisesOn"][5])
    assert batch.valid["RaisesOn"].tolist() == [i != 5 for i in range(8)]
    assert [batch.rewards["RaisesOn"][i] for i in range(8) if i != 5] == [0, 1, 2, 3, 4, 6, 7]
    (failure,) = batch.failures
    assert (failure.sample, failure.reward, failure.kind, failure.attempts) == (5, "RaisesOn", "failed", 1)
    assert client.pending() == 0


def test_a_failed_sample_is_tried_again_when_it_is_submitted_again(clients, workers, tmp_path):
    switch = tmp_path / "broken"
    switch.touch()
    workers("gpu")
    client = clients({"reward_model": "FailsWhile", "file": str(switch), "version": "1"})
    client.submit(samples_of([7]))
    batch = client.collect(timeout_s=60, on_failure="nan")
    assert [(f.kind, f.attempts) for f in batch.failures] == [("failed", 1)]
    client.submit(samples_of([7]))
    batch = client.collect(timeout_s=60, on_failure="nan")
    assert [(f.kind, f.attempts) for f in batch.failures] == [("failed", 2)]
    switch.unlink()
    client.submit(samples_of([7]))
    assert_rewards(client.collect(timeout_s=60), [7], "FailsWhile")


def test_on_failure_of_a_reward_decides_before_that_of_collect(clients, workers):
    workers("gpu")
    client = clients(
        {"reward_model": "NaNModel", "on_failure": "nan"},
        {"reward_model": "WrongCount", "on_failure": {"value": -1.0}},
        "PixelCode",
    )
    client.submit(samples_of([1, 2]))
    batch = client.collect(timeout_s=60)
    assert np.isnan(batch.rewards["NaNModel"]).all()
    assert batch.rewards["WrongCount"].tolist() == [-1.0, -1.0]
    assert not batch.valid["WrongCount"].any()
    assert_rewards(batch, [1, 2])
    assert len(batch.failures) == 4


def test_a_run_stops_above_its_largest_failure_rate(clients, workers):
    workers("gpu")
    client = clients({"reward_model": "NaNModel"}, "PixelCode", max_failure_rate=0.4)
    client.submit(samples_of([1, 2]))
    with pytest.raises(ScoringError, match=r"50.0% failed, more than max_failure_rate=0.4"):
        client.collect(timeout_s=60, on_failure="nan")


def test_collect_raises_at_its_deadline_and_can_be_called_again(clients, workers):
    client = clients("PixelCode")
    client.submit(samples_of([1, 2, 3]))
    started = time.monotonic()
    with pytest.raises(CollectTimeoutError, match=r"queue 'gpu' has no worker; start one: celery -A tasks worker") as e:
        client.collect(timeout_s=1.5)
    assert 1.4 < time.monotonic() - started < 4
    assert {f.kind for f in e.value.batch.failures} == {"timeout"}
    assert client.pending() == 3
    workers("gpu")
    assert_rewards(client.collect(timeout_s=60), [1, 2, 3])


def test_collect_with_nan_returns_at_its_deadline_and_the_next_step_is_not_mixed_with_it(clients, workers):
    client = clients("PixelCode")
    client.submit(samples_of([1, 2, 3]))
    batch = client.collect(timeout_s=1, on_failure="nan")
    assert np.isnan(batch.rewards["PixelCode"]).all()
    assert {f.kind for f in batch.failures} == {"timeout"}
    workers("gpu")
    client.submit(samples_of([4, 5]))
    assert_rewards(client.collect(timeout_s=60), [4, 5])


def test_rewards_that_are_not_async_wait_for_collect(clients, settings, workers, never_idle):
    client = clients({"reward_model": "PixelCode", "async_reward": False}, "Null")
    client.submit(samples_of(range(20)))
    client.flush()
    with connect(settings.broker) as broker:
        assert len(messages_in(broker, "gpu")) == 2  # those of Null
    workers("gpu")
    assert_rewards(client.collect(timeout_s=60), range(20))


def test_senders_wait_while_the_store_is_full_and_go_on_when_there_is_room(clients, redis_url, workers):
    three_images = 3 * 64 * 64 * 3 + 1
    settings = load_settings(broker_url=redis_url, max_store_bytes=three_images, claim_ttl_s=2, reconcile_s=0.5)
    client = clients({"reward_model": "PixelCode", "batch_size": 1}, settings=settings)
    numbers = list(range(12))
    client.submit([Sample(prompt="", image=image_of(n, 64, 64)) for n in numbers])
    with pytest.raises(CollectTimeoutError, match="REWARDQ_MAX_STORE_BYTES"):
        client.flush(timeout_s=1)
    with connect(settings.payloads) as store:
        assert int(store.get(keys.PAYLOAD_BYTES)) <= three_images + 4000  # and a few requests
    workers("gpu", settings=settings)
    assert_rewards(client.collect(timeout_s=60), numbers)


def test_submit_waits_when_its_own_backlog_is_too_long(clients, redis_url, workers):
    settings = load_settings(
        broker_url=redis_url, max_store_bytes=20_000, max_backlog=4, claim_ttl_s=2, reconcile_s=0.5
    )
    client = clients({"reward_model": "PixelCode", "batch_size": 1}, settings=settings)
    client.submit([Sample(image=image_of(n, 64, 64)) for n in range(10)])
    held = threading.Event()

    def submit_more():
        client.submit([Sample(image=image_of(99, 64, 64))])
        held.set()

    threading.Thread(target=submit_more).start()
    assert not held.wait(1.0)
    workers("gpu", settings=settings)
    assert held.wait(30)
    assert_rewards(client.collect(timeout_s=60), [*range(10), 99])


def test_a_pickled_ticket_is_collected_by_another_process(clients, workers, settings, tmp_path):
    client = clients("PixelCode", launch="one")
    ticket = client.submit(samples_of(range(40)))
    client.flush()
    saved = pickle.dumps(ticket)
    assert len(saved) < 20_000
    copy = pickle.loads(saved)
    assert isinstance(copy, Ticket)
    assert copy.num_sent == 40
    client._engine._loop.close()  # as if this process were gone, its rank lock too
    client._process.rank_lock.release()
    script = tmp_path / "successor.py"
    script.write_text(
        "import pickle, sys, json\n"
        "from trainer_client import RewardClient\n"
        "from tasks.settings import load_settings\n"
        f"client = RewardClient.from_dict({config_of('PixelCode')!r}, 'test', launch='one', settings=load_settings("
        f"broker_url={settings.broker!r}, claim_ttl_s=2, reconcile_s=0.5))\n"
        "with client:\n"
        "    ticket = pickle.load(open(sys.argv[1], 'rb'))\n"
        "    print(json.dumps(client.collect(timeout_s=60, ticket=ticket).rewards['PixelCode'].tolist()))\n"
    )
    (tmp_path / "ticket").write_bytes(saved)
    workers("gpu")
    env = {**clean_env(), "PYTHONPATH": str(ROOT)}
    done = run_python("-W", "error", script, tmp_path / "ticket", env=env)
    assert json.loads(done.stdout) == [float(n) for n in range(40)]
    wait_until(lambda: not payload_keys(settings))


def test_a_whole_job_runs_with_warnings_as_errors_and_leaves_no_thread(workers, settings, tmp_path):
    workers("gpu")
    script = tmp_path / "trainer.py"
    script.write_text(
        "import threading, numpy as np\n"
        "from trainer_client import RewardClient, Sample\n"
        f"with RewardClient.from_dict({config_of('Null')!r}, 'test') as client:\n"
        "    client.submit([Sample(prompt='p', image=np.zeros((8, 8, 3), np.uint8))])\n"
        "    print(client.collect(timeout_s=60).rewards['Null'].tolist())\n"
        "print([t.name for t in threading.enumerate()])\n"
    )
    done = run_python("-W", "error", script, env=worker_env(settings, {}))
    (told,) = done.stderr.splitlines()
    assert "rewardq: step 0: 1 samples, Null 0.5; waited " in told
    assert done.stdout.splitlines() == ["[0.5]", "['MainThread']"]


def test_a_client_that_is_closed_leaves_no_connection(clients, settings, redis_server):
    with redis_server.client() as admin:
        num_before = len(admin.client_list())
        gc.disable()  # which would end them too, with a warning of each
        try:
            for rank in range(2):
                client = clients("PixelCode", rank=rank, world_size=2, launch="one")
                client.submit(samples_of(range(4)), step=0)
                with pytest.raises(CollectTimeoutError):
                    client.collect(timeout_s=0.5)
                assert len(admin.client_list()) > num_before
                client.close()
                wait_until(lambda: len(admin.client_list()) == num_before)
        finally:
            gc.enable()


def test_progress_bars_are_shown_when_asked_for_and_off_where_there_is_no_terminal(clients, workers, capsys):
    workers("gpu")
    client = clients("PixelCode")
    client.submit(samples_of(range(3)))
    client.collect(timeout_s=60)
    (told,) = capsys.readouterr().err.splitlines()
    assert "rewardq: step 0: 3 samples, PixelCode 1; waited " in told
    client.submit(samples_of(range(3)))
    client.collect(timeout_s=60, progress=False)
    assert capsys.readouterr().err == ""
    client.submit(samples_of(range(3, 9)))
    client.collect(timeout_s=60, progress=True)
    assert "PixelCode" in (shown := capsys.readouterr().err)
    assert "6/6" in shown


def test_the_two_documented_commands_run_on_one_host_and_serve_their_queues(clients, workers, settings):
    workers("gpu", "vlm")
    client = clients("PixelCode", {"reward_model": "PixelCode", "name": "on_vlm", "queue": "vlm", "add": 5})
    client.submit(samples_of(range(4)))
    batch = client.collect(timeout_s=60)
    assert_rewards(batch, range(4))
    assert_rewards(batch, range(5, 9), "on_vlm")
    assert {i["origin"]["worker"].split(".")[0] for i in batch.info["on_vlm"]} == {"vlm"}


def test_two_rewards_of_one_fingerprint_asked_for_at_once_share_one_model(clients, workers):
    """By the worker's log, and by its memory: the model weighs 200 MB."""
    (worker,) = workers("gpu", concurrency=4)
    bare_MB = worker.memory_MB
    large = {"reward_model": "Large", "seconds": 2, "version": "1", "batch_size": 1}
    client = clients(large, {**large, "name": "again"})
    other = clients({**large, "name": "third"}, run="other")
    client.submit(samples_of(range(4)))
    other.submit(samples_of(range(4, 8)))
    batch = client.collect(timeout_s=60)
    assert_rewards(batch, range(4), "Large")
    assert_rewards(batch, range(4), "again")
    assert_rewards(other.collect(timeout_s=60), range(4, 8), "third")
    assert worker.log_text.count("loaded reward=") == 1
    assert 200 < worker.memory_MB - bare_MB < 350


def test_an_emptied_redis_in_the_midst_of_a_step_costs_no_reward(clients, workers, redis_server):
    workers("gpu")
    client = clients({"reward_model": "Slow", "seconds": 0.5, "batch_size": 2})
    client.submit(samples_of(range(24)))
    client.flush()
    wait_until(lambda: client.pending() < 24)
    with redis_server.client() as redis:
        redis.flushall()
    assert_rewards(client.collect(timeout_s=60), range(24), "Slow")


def test_a_client_of_one_run_leaves_another_alone(clients, workers, settings):
    workers("gpu")
    first, second = clients("PixelCode", run="first"), clients("PixelCode", run="second")
    first.submit(samples_of([1, 2]))
    second.submit(samples_of([3]))
    assert_rewards(second.collect(timeout_s=60), [3])
    assert_rewards(first.collect(timeout_s=60), [1, 2])


def test_a_config_in_a_yaml_file_is_read(settings, workers, tmp_path):
    path = Path(tmp_path / "rewards.yaml")
    path.write_text("rewards:\n  name: size\n  reward_model: jpeg_incompressibility\n")
    workers("gpu")
    from PIL import Image

    image = Image.fromarray(image_of(5, 64, 64))
    image.save(tmp_path / "image.jpg", quality=95)
    with RewardClient.from_yaml(path, "yaml", settings=settings) as client:
        client.submit([Sample(image=image)])
        reward = client.collect(timeout_s=60).rewards["size"]
    assert reward == np.float32((tmp_path / "image.jpg").stat().st_size / 1000)
