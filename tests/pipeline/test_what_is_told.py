"""What a trainer is told: forgotten groups, failures with their worker, how a step went, what a wait is for."""

from __future__ import annotations

import logging
import os
import pty
import re
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tasks.servers.connections import connect
from tests.pipeline.conftest import assert_rewards, config_of, samples_of, together
from tests.reward_models import image_of
from tests.servers import messages_in, run_python, wait_until, worker_env
from trainer_client import CollectTimeoutError, InvalidSampleError, RewardClient, Sample, ScoringError

HOST = re.escape(socket.gethostname())


def prompts_of(*prompts, first=0):
    """A sample for each prompt; `PixelCode` rewards them with `first`, `first + 1` and so on."""
    return [Sample(prompt=prompt, image=image_of(first + i)) for i, prompt in enumerate(prompts)]


def warnings_in(caplog):
    """The warnings, without the numbers of lines in the tests' reward models."""
    words = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [re.sub(r"(reward_models\.py):\d+", r"\1", one) for one in words]


def test_samples_without_a_group_are_compared_with_those_of_their_prompt(clients, workers, caplog):
    workers("gpu")
    client = clients("PixelCode", {"reward_model": "OrderInGroup", "weight": 0.0})
    client.submit(prompts_of("fox", "door", "fox", first=10))  # 10, 11, 12
    client.submit(prompts_of("door", "fox", "door", first=20))  # 20, 21, 22
    batch = client.collect(timeout_s=60)
    assert batch.groups == ("fox", "door", "fox", "door", "fox", "door")
    assert_rewards(batch, [0, 0, 1, 1, 2, 2], "OrderInGroup")
    fox, door = np.array([10.0, 12.0, 21.0]), np.array([11.0, 20.0, 22.0])
    by_group = {name: (values - values.mean()) / values.std() for name, values in {"fox": fox, "door": door}.items()}
    in_order = np.stack([by_group["fox"], by_group["door"]], axis=1).ravel()
    expected = (in_order - in_order.mean()) / in_order.std()
    np.testing.assert_allclose(client.advantages(batch), expected, rtol=1e-5)
    by_prompt = client.failure_rate_by_group(batch)
    assert by_prompt == {name: {"PixelCode": 0.0, "OrderInGroup": 0.0} for name in ("fox", "door")}
    assert warnings_in(caplog) == []


def test_ranks_agree_about_the_groups_of_samples_that_name_none(clients, workers):
    workers("gpu")
    ranks = [clients("OrderInGroup", rank=rank, world_size=2, launch="one") for rank in range(2)]
    source = image_of(99)
    for rank, client in enumerate(ranks):
        samples = prompts_of("edit", "edit", first=10 - rank)
        for sample in samples:
            sample.condition_images = [source.copy()]
        client.submit(samples, group_size=4, step=0)
    found = together(*(lambda c=client: c.collect(timeout_s=60) for client in ranks))
    assert_rewards(found[0], [1, 3], "OrderInGroup")  # 10 and 11, among 9, 10, 10, 11
    assert_rewards(found[1], [0, 1], "OrderInGroup")
    assert set(found[0].groups) == set(found[1].groups)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([(["fox"] * 5, 4)], "group 'fox' of step 0 would have 5 members, group_size=4; a prompt that comes twice"),
        ([(["fox"] * 2, 4), (["fox"] * 2, 3)], "group 'fox' has group_size=4, found group_size=3"),
        ([(["fox"] * 3, 4), (["fox"] * 2, None)], "group 'fox' of step 0 would have 5 members, group_size=4"),
        ([(["fox"], 0)], "group_size must be at least 1, found 0"),
        ([(["fox"], 2.5)], "group_size must be a whole number, found 2.5"),
        ([(["fox"], float("nan"))], "group_size must be a whole number, found nan"),
        ([(["fox"], "4")], "group_size must be a whole number, found '4'"),
    ],
)
def test_the_size_of_a_group_is_checked_for_pointwise_rewards_too(clients, settings, calls, message):
    client = clients("PixelCode")
    *fine, (prompts, group_size) = calls
    for given, size in fine:
        client.submit(prompts_of(*given), group_size=size)
    num_pending = client.pending()
    with pytest.raises(InvalidSampleError, match=message):
        client.submit(prompts_of(*prompts), group_size=group_size)
    assert client.pending() == num_pending


def test_what_is_odd_about_groups_is_said_once_a_run(clients, workers, caplog):
    workers("gpu")
    client = clients("PixelCode")
    for step in range(2):
        client.submit(samples_of(range(4), group="all"), group_size=8)
        batch = client.collect(timeout_s=60)
        client.submit(samples_of(range(4)), split="eval")
        client.advantages(client.collect(timeout_s=60, split="eval"))
        assert len(warnings_in(caplog)) == 2, step
    mixed, size = warnings_in(caplog)
    assert "group 'all' has samples of several prompts" in mixed
    assert "step 0: 1 of 1 groups are not whole: one has 4 of group_size=8 samples" in size
    client.advantages(batch)
    assert len(warnings_in(caplog)) == 2
    for _ in range(2):
        client.submit(samples_of(range(4)))
        assert not client.advantages(client.collect(timeout_s=60)).any()
    (alone,) = warnings_in(caplog)[2:]
    assert "step 2: each of the 4 samples is a group of its own, so that every advantage is 0" in alone


def test_a_group_with_a_member_on_each_rank_is_no_sample_alone(clients, workers, caplog):
    workers("gpu")
    ranks = [clients("PixelCode", rank=rank, world_size=2, launch="one") for rank in range(2)]

    def step_of(client, first):
        client.submit(prompts_of("fox", first=first), group_size=2, step=0)
        return client.advantages(client.collect(timeout_s=60))

    low, high = together(lambda: step_of(ranks[0], 1), lambda: step_of(ranks[1], 5))
    np.testing.assert_allclose([low[0], high[0]], [-1.0, 1.0])
    assert warnings_in(caplog) == []


def test_group_ids_that_each_rank_counts_by_itself_are_told_once(clients, workers, caplog):
    workers("gpu")
    ranks = [clients("PixelCode", rank=rank, world_size=2, launch="one") for rank in range(2)]

    def step_of(rank, step, prompts):
        samples = prompts_of(*prompts)
        for i, sample in enumerate(samples):
            sample.group = i // 2
        ranks[rank].submit(samples, step=step)
        ranks[rank].collect(timeout_s=60)

    everywhere = ["fox", "fox", "door", "door"]
    for step, of_second in enumerate([everywhere, ["sea", "sea", "door", "door"], ["a", "b", "c", "d"]]):
        together(lambda n=step: step_of(0, n, everywhere), lambda n=step, p=of_second: step_of(1, n, p))
        if step == 0:
            assert warnings_in(caplog) == []
    (warned,) = warnings_in(caplog)
    assert "step 1: 1 of 2 groups, 0 for example, have samples of several prompts, over all ranks" in warned


def test_failures_are_one_warning_a_step_with_their_worker_whatever_on_failure_says(clients, workers, caplog):
    (worker,) = workers("gpu")
    client = clients({"reward_model": "RaisesOn", "on_failure": "nan"}, {"reward_model": "NaNModel"}, "PixelCode")
    samples = samples_of(range(8), group="g")
    samples[2].metadata = {"raise": True}
    client.submit(samples)
    batch = client.collect(timeout_s=60, on_failure="nan")
    node = f"gpu.{worker.pid}@{socket.gethostname()}"
    assert {failed.worker for failed in batch.failures} == {node}
    assert "8 x failed" in str(batch.failures)
    assert warnings_in(caplog)[1:] == [
        f"step 0: RaisesOn: 1 of 8 failed on {node}: ValueError: this sample is bad (reward_models.py in __call__); "
        f"NaNModel: 8 of 8 failed on {node}: the model returned nan"
    ]
    client.submit(samples)
    with pytest.raises(ScoringError, match=rf"8 x failed on {re.escape(node)}: the model returned nan: samples 0-7"):
        client.collect(timeout_s=60)
    assert [words[:7] for words in warnings_in(caplog)[1:]] == ["step 0:", "step 1:"]
    client.submit(samples_of(range(3), group="g"))
    client.collect(timeout_s=60, on_failure="nan")
    assert "step 2: NaNModel: 3 of 3 failed" in warnings_in(caplog)[-1]
    assert len(repr(client).splitlines()) <= 3
    assert len(repr(batch).splitlines()) <= 6


def test_what_cannot_be_loaded_and_what_the_trainer_finds_are_told_apart(clients, workers):
    (worker,) = workers("gpu")
    client = clients({"reward_model": "FailsToLoad"}, {"reward_model": "jpeg_incompressibility_Rank", "name": "rank"})
    unfit = Sample(prompt="number 1", image=np.full((3, 8, 8), 7.0, np.float32))
    client.submit([*samples_of([1]), unfit])
    batch = client.collect(timeout_s=60, on_failure="nan")
    found = {(failed.sample, failed.reward): failed for failed in batch.failures}
    assert f"gpu.{worker.pid}@" in found[0, "FailsToLoad"].worker
    assert "no weights in /nowhere" in found[0, "FailsToLoad"].message
    assert found[1, "FailsToLoad"].worker == ""
    assert found[1, "rank"].worker == ""
    assert batch.valid["rank"].tolist() == [True, False]


def test_more_than_half_without_a_reward_stop_a_run_unless_told_otherwise(settings, workers):
    workers("gpu")
    config = config_of({"reward_model": "RaisesOn", "on_failure": "nan"})

    def step_with(client, num_bad):
        samples = samples_of(range(4), group="g")
        for sample in samples[:num_bad]:
            sample.metadata = {"raise": True}
        client.submit(samples)
        return client.collect(timeout_s=60)

    with RewardClient.from_dict(config, "half", settings=settings) as client:
        assert np.isnan(step_with(client, 2).rewards["RaisesOn"]).sum() == 2
        with pytest.raises(ScoringError, match=r"75.0% failed, more than max_failure_rate=0.5"):
            step_with(client, 3)
    with RewardClient.from_dict(config, "all", settings=settings, max_failure_rate=1.0) as client:
        assert np.isnan(step_with(client, 4).rewards["RaisesOn"]).all()


def test_who_asks_for_nan_in_the_call_is_given_all_failures_unless_a_share_was_named(settings, workers):
    workers("gpu")
    config = config_of("RaisesOn")

    def collect(client, **options):
        samples = samples_of(range(4), group="g")
        for sample in samples:
            sample.metadata = {"raise": True}
        client.submit(samples)
        return client.collect(timeout_s=60, on_failure="nan", **options)

    with RewardClient.from_dict(config, "asked", settings=settings) as client:
        assert collect(client).failure_rate == 1.0
        with pytest.raises(ScoringError, match=r"100.0% failed, more than max_failure_rate=0.9"):
            collect(client, max_failure_rate=0.9)
    with RewardClient.from_dict(config, "named", settings=settings, max_failure_rate=0.5) as client:
        with pytest.raises(ScoringError, match=r"100.0% failed, more than max_failure_rate=0.5"):
            collect(client)
        assert collect(client, max_failure_rate=1.0).failure_rate == 1.0


def test_the_failure_rate_that_stops_a_run_is_that_of_all_ranks(settings, workers, caplog):
    (worker,) = workers("gpu")
    config = config_of({"reward_model": "RaisesOn", "on_failure": "nan"})
    options = {"world_size": 2, "launch": "one", "settings": settings}
    ranks = [RewardClient.from_dict(config, "ranks", rank=rank, **options) for rank in range(2)]

    def step_of(client, numbers, num_bad, step):
        samples = samples_of(numbers, group="g")
        for sample in samples[:num_bad]:
            sample.metadata = {"raise": True}
        client.submit(samples, step=step)
        return client.collect(timeout_s=60)

    try:
        few = together(lambda: step_of(ranks[0], range(6), 0, 0), lambda: step_of(ranks[1], [7], 1, 0))
        many = together(lambda: step_of(ranks[0], range(2), 1, 1), lambda: step_of(ranks[1], [8, 9], 2, 1))
    finally:
        for client in ranks:
            client.close()
    assert np.isnan(few[1].rewards["RaisesOn"]).all()
    assert [type(error) for error in many] == [ScoringError, ScoringError]
    assert all("75.0% failed of all ranks' 4 samples" in str(error) for error in many)
    of_steps = [words for words in warnings_in(caplog) if words.startswith("step")]
    node = f"gpu.{worker.pid}@{socket.gethostname()}"
    assert of_steps == [
        f"step {i}: RaisesOn: {n} failed on {node}: ValueError: this sample is bad (reward_models.py in __call__)"
        for i, n in [(0, "1 of 7"), (1, "3 of 4")]
    ]


def test_what_was_sent_again_is_counted_apart_from_what_was_there(clients, workers, tmp_path):
    switch = tmp_path / "broken"
    switch.touch()
    workers("gpu")
    client = clients({"reward_model": "FailsWhile", "file": str(switch), "version": "1"})
    client.submit(samples_of([7]))
    assert client.collect(timeout_s=60, on_failure="nan").num_rescored == {"FailsWhile": 0}
    switch.unlink()
    client.submit(samples_of([7, 8]))
    batch = client.collect(timeout_s=60)
    assert (batch.num_rescored, batch.num_hits) == ({"FailsWhile": 1}, {"FailsWhile": 0})
    client.submit(samples_of([7, 8]))
    batch = client.collect(timeout_s=60)
    assert (batch.num_rescored, batch.num_hits) == ({"FailsWhile": 0}, {"FailsWhile": 2})
    assert client.metrics(batch, detail="brief")["train/cache_hits"] == 2.0


TRAINER = """
import numpy as np
from trainer_client import RewardClient, Sample
from trainer_client.steps import step_log as steplog
steplog.SAY_EVERY_S = {say_every_s}
config = {config}
with RewardClient.from_dict(config, "told", max_failure_rate=1.0) as client:
    for step in range(2):
        client.submit([Sample(prompt="p", image=np.full((8, 8, 3), step, np.uint8)) for _ in range(4)], group_size=4)
        client.collect(timeout_s={timeout_s}, on_failure="nan")
"""


def test_a_trainer_without_a_terminal_says_how_each_step_went(settings, workers, tmp_path):
    workers("gpu")
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER.format(config=config_of("Null", "NaNModel"), timeout_s=60, say_every_s=60))
    lines = run_python("-W", "error", script, env=worker_env(settings, {})).stderr.splitlines()
    told = [line for line in lines if "rewardq: step" in line]
    assert len(told) == 2
    for step, line in enumerate(told):
        assert f"rewardq: step {step}: 4 samples, Null 0.5, NaNModel nan (4 failed); waited " in line
    warned = [line for line in lines if re.match(r"step \d: NaNModel: 4 of 4 failed on gpu\.\d+@", line)]
    assert len(lines) == len(told) + len(warned) == 4


def test_a_trainer_without_a_terminal_says_what_it_waits_for(settings, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER.format(config=config_of("Null"), timeout_s=1.5, say_every_s=0.2))
    lines = run_python("-W", "error", script, env=worker_env(settings, {})).stderr.splitlines()
    waits = [line for line in lines if "collect() has waited" in line]
    assert len(waits) >= 4
    assert "step 0: collect() has waited" in waits[0]
    assert "for Null (4 of 4 samples): queue 'gpu' has no worker; start one: " in waits[0]


def on_a_terminal(*command, env):
    """What a command shows on a terminal."""
    ours, theirs = pty.openpty()
    shown = []

    def read():
        try:
            while data := os.read(ours, 65536):
                shown.append(data)
        except OSError:  # the other end is closed
            pass

    with subprocess.Popen(list(map(str, command)), env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        reader = threading.Thread(target=read)
        reader.start()
        status = process.wait(60)
    reader.join(10)
    os.close(ours)
    return status, b"".join(shown).decode()


def test_a_terminal_shows_bars_that_are_red_where_samples_fail(settings, workers, tmp_path):
    workers("gpu")
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER.format(config=config_of("Null", "NaNModel"), timeout_s=60, say_every_s=60))
    env = {**worker_env(settings, {}), "TERM": "xterm", "COLUMNS": "120"}
    status, shown = on_a_terminal(sys.executable, script, env=env)
    assert status == 0, shown
    assert "rewardq: step" not in shown
    assert re.search(r"\x1b\[1;31m4/4, 4 failed", shown)
    assert re.search(r"Null .*[^;]4/4 ", shown)


def test_a_client_is_shown_without_its_password(private_redis, settings):
    from tasks.settings import load_settings

    server = private_redis("--requirepass", "secret")
    with RewardClient.from_dict(
        config_of("Null"), "shown", settings=load_settings(broker_url=f"redis://:secret@127.0.0.1:{server.port}/0")
    ) as client:
        shown = repr(client)
    assert "secret" not in shown
    assert "run='shown'" in shown
    assert "Null" in shown
    assert len(shown.splitlines()) == 2


def test_nothing_of_a_refused_group_is_sent(clients, settings):
    client = clients("PixelCode")
    with pytest.raises(InvalidSampleError):
        client.submit(prompts_of(*["fox"] * 3), group_size=2)
    client.flush()
    with connect(settings.broker) as broker:
        assert messages_in(broker, "gpu") == []


def test_a_rank_that_is_done_says_for_which_it_waits(clients, workers, capsys, monkeypatch):
    workers("gpu")
    client = clients("PixelCode", rank=0, world_size=3, launch="one")
    client.submit(samples_of([1]), step=5)
    monkeypatch.setattr("trainer_client.steps.step_log.SAY_EVERY_S", 0.3)
    with pytest.raises(CollectTimeoutError):
        client.collect(timeout_s=6)
    assert "step 5: collect() has waited" in (told := capsys.readouterr().err)
    assert "for rank 1, 2; this rank has its rewards" in told


def test_the_wait_for_other_ranks_is_no_wait_for_rewards(clients, workers):
    workers("gpu")
    ranks = [clients("PixelCode", rank=rank, world_size=2, launch="one") for rank in range(2)]
    for rank, client in enumerate(ranks):
        client.submit(samples_of([rank]), step=0)

    def first():
        wait_until(lambda: ranks[0].pending() == 0)
        return ranks[0].collect(timeout_s=60)

    def second():
        wait_until(lambda: ranks[0].pending() == 0)
        time.sleep(1.5)
        return ranks[1].collect(timeout_s=60)

    early, _ = together(first, second)
    assert early.timings["ranks_s"] > early.timings["wait_s"]
    assert ranks[0].metrics(early, gather=lambda mine: [mine])["train/ranks_s"] == early.timings["ranks_s"]


def test_tickets_are_few_warnings_that_count_all_failures(clients, workers, caplog):
    workers("gpu")
    client = clients({"reward_model": "NaNModel", "on_failure": "nan"})
    for n in range(6):
        client.collect(timeout_s=60, ticket=client.submit(samples_of([n, n + 100])))
    client.close()
    assert [re.sub(" on gpu.*", "", words) for words in warnings_in(caplog)] == [
        "step 0: NaNModel: 2 of 2 failed",
        "step 1 to step 5: NaNModel: 10 of 10 failed",
    ]
