from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tasks.settings import load_settings
from tests.cli.conftest import command_of, running, wait_until
from tests.delivery.conftest import MODULES
from tests.delivery.seen import reward_of
from tests.pipeline.conftest import assert_rewards, config_of, samples_of
from tests.servers import ROOT
from trainer_client import RewardClient
from trainer_client.cli.processes import SETTLED_S
from workers.watchdog import EXIT_HUNG

REWARDS = """
rewards:
  - reward_model: OCR
  - reward_model: vllm_evaluate
"""


def start_up(rewardq, tmp_path, *arguments):
    (tmp_path / "rewards.yaml").write_text(REWARDS)
    run = rewardq("up", "rewards.yaml", *arguments)
    run.wait_for("Ready.")
    return run


def worker_commands(run):
    commands = [command_of(pid) for pid in run.children()]
    return sorted(" ".join(c[1:]) for c in commands if "celery" in c)


def test_up_starts_a_redis_and_a_worker_for_each_queue_by_the_documented_commands(rewardq, tmp_path):
    run = start_up(rewardq, tmp_path)
    assert worker_commands(run) == [
        "-m celery -A tasks worker -Q gpu",
        "-m celery -A tasks worker -Q vlm --concurrency 32",
    ]
    assert len(run.children()) == 3
    assert re.search(r"^  export REWARDQ_BROKER_URL=redis://127\.0\.0\.1:\d+/0$", run.output, re.MULTILINE)


def test_more_gpu_workers_serve_the_same_queue_on_a_gpu_each(rewardq, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    run = start_up(rewardq, tmp_path, "--gpu-workers", "3")
    assert worker_commands(run).count("-m celery -A tasks worker -Q gpu") == 3
    gpus = [gpu_of(pid) for pid in run.children() if command_of(pid)[-1] == "gpu"]
    assert sorted(gpus) == ["2", "2", "5"]


def gpu_of(pid):
    variables = (Path("/proc") / str(pid) / "environ").read_text().split("\0")
    return dict(v.split("=", 1) for v in variables if v)["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_up_stops_everything_it_started(rewardq, tmp_path, number):
    run = start_up(rewardq, tmp_path)
    children = run.children()
    run.process.send_signal(number)
    assert run.exit_status(30) == 0, run.output
    assert running(children) == []


def test_ctrl_c_while_the_workers_still_start_stops_everything(rewardq, tmp_path):
    (tmp_path / "rewards.yaml").write_text(REWARDS)
    run = rewardq("up", "rewards.yaml")
    wait_until(lambda: len(run.children()) == 3, 30, lambda: run.output)
    children = run.children()
    run.process.send_signal(signal.SIGINT)
    assert run.exit_status(30) == 0, run.output
    assert running(children) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_a_killed_up_takes_its_children_with_it(rewardq, tmp_path):
    run = start_up(rewardq, tmp_path)
    children = run.children()
    run.process.kill()
    wait_until(lambda: not running(children), 10)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_a_worker_that_was_started_again_dies_with_a_killed_up_as_well(rewardq, tmp_path):
    run = start_up(rewardq, tmp_path)
    before = run.children()
    killed = next(pid for pid in before if command_of(pid)[-1] == "gpu")
    os.kill(killed, signal.SIGKILL)
    run.wait_for("worker-gpu ended by itself (SIGKILL); starting it again")
    wait_until(lambda: len(worker_commands(run)) == 2, 20, lambda: run.output)
    after = run.children()
    assert killed not in after
    run.process.kill()
    wait_until(lambda: not running(after), 10)


def test_a_worker_whose_model_hangs_is_replaced_and_the_next_step_is_scored(rewardq, tmp_path):
    reward = reward_of("Logged", calls=str(tmp_path / "calls"), batch_size=1, how="hang", on=[2], timeout_s=3)
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump(config_of(reward)))
    times = {"REWARDQ_CLAIM_TTL_S": "2", "REWARDQ_RECONCILE_S": "0.5"}
    run = rewardq("up", "rewards.yaml", env={**times, **MODULES, "PYTHONPATH": str(ROOT)})
    run.wait_for("Ready.")
    url = re.search(r"REWARDQ_BROKER_URL=(\S+)", run.output)[1]
    settings = load_settings(broker_url=url, claim_ttl_s=2, reconcile_s=0.5)
    with RewardClient.from_yaml(tmp_path / "rewards.yaml", "up", settings=settings) as client:
        client.submit(samples_of(range(6)))
        batch = client.collect(timeout_s=60, on_failure="nan")
        assert [(f.sample, f.kind) for f in batch.failures] == [(2, "timeout")]
        assert np.delete(batch.rewards["reward"], 2).tolist() == [0, 1, 3, 4, 5]
        run.wait_for(f"worker-gpu ended by itself (exit status {EXIT_HUNG}); starting it again")
        client.submit(samples_of(range(10, 14)))
        assert_rewards(client.collect(timeout_s=60), range(10, 14), "reward")


BRIGHT = """
from workers import PointwiseRewardModel


class Bright(PointwiseRewardModel):
    required_fields = ("prompt",)

    def __call__(self, prompt, **kwargs):
        return [{}] * len(prompt)
"""


def test_an_edited_class_is_scored_anew_by_a_worker_that_is_started_again_at_once(rewardq, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rewards.yaml").write_text("rewards: {reward_model: bright.Bright, name: bright, version: '1'}")
    (tmp_path / "bright.py").write_text(BRIGHT.format(1.0))
    run = rewardq("up", "rewards.yaml", env={"REWARDQ_MODULES": "bright", "PYTHONPATH": str(ROOT)})
    run.wait_for("Ready.")
    settings = load_settings(broker_url=re.search(r"REWARDQ_BROKER_URL=(\S+)", run.output)[1])
    time.sleep(SETTLED_S)
    for value in (1.0, 2.0):
        (tmp_path / "bright.py").write_text(BRIGHT.format(value))
        with RewardClient.from_yaml(tmp_path / "rewards.yaml", "up", settings=settings) as client:
            client.submit(samples_of(range(3)))
            assert client.collect(timeout_s=60).rewards["bright"].tolist() == [value] * 3
    assert f"worker-gpu ended by itself (exit status {EXIT_HUNG}); starting it again at once" in run.output
    assert "bright.py changed since this worker loaded it" in run.output


def test_a_redis_that_is_given_is_used_and_outlives_up(rewardq, tmp_path):
    first = start_up(rewardq, tmp_path)
    url = re.search(r"REWARDQ_BROKER_URL=(\S+)", first.output)[1]
    others = first.children()
    (tmp_path / "second").mkdir()
    shutil.move(tmp_path / "output.txt", tmp_path / "first.txt")
    second = start_up(rewardq, tmp_path, "--redis", url)
    assert len(second.children()) == 2
    second.process.send_signal(signal.SIGINT)
    assert second.exit_status(30) == 0, second.output
    assert running(others) == others


@pytest.mark.parametrize(
    ("rewards", "says"),
    [
        (None, "cannot read the rewards file rewards.yaml: No such file or directory"),
        ("rewards: [", "rewards.yaml is no YAML"),
        ("rewards:\n  - reward_model: OCRR\n", "did you mean 'OCR'?"),
    ],
)
def test_a_wrong_rewards_file_is_one_line_without_a_traceback(rewardq, tmp_path, rewards, says):
    if rewards is not None:
        (tmp_path / "rewards.yaml").write_text(rewards)
    run = rewardq("up", "rewards.yaml")
    assert run.exit_status(30) == 2, run.output
    assert says in run.output
    assert len(run.output.splitlines()) == 1


def test_a_redis_that_does_not_answer_is_one_line_without_its_password(rewardq, tmp_path):
    (tmp_path / "rewards.yaml").write_text(REWARDS)
    run = rewardq("up", "rewards.yaml", "--redis", "redis://:secret@127.0.0.1:1/0")
    assert run.exit_status(30) == 2, run.output
    assert "redis://:***@127.0.0.1:1/0" in run.output
    assert "secret" not in run.output
    assert len(run.output.splitlines()) == 1


def test_a_worker_that_cannot_start_is_one_line_that_names_its_log(rewardq, tmp_path):
    (tmp_path / "rewards.yaml").write_text(REWARDS)
    (tmp_path / "tasks.py").write_text("")
    run = rewardq("up", "rewards.yaml")
    assert run.exit_status(60) == 2, run.output
    assert re.search(r"worker-gpu did not start \(exit status \d+\); its log \S+worker-gpu.log ends with", run.output)
    assert "Traceback" not in run.output
    assert run.children() == []
