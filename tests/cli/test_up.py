from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import redis
import yaml

from tasks.settings import load_settings
from tests.cli.conftest import command_of, running, wait_until
from tests.delivery.conftest import MODULES
from tests.delivery.seen import reward_of
from tests.judges.scripted import MODEL, JudgeServer, says_yes
from tests.pipeline.conftest import assert_rewards, config_of, samples_of
from tests.servers import ROOT, free_port
from trainer_client import RewardClient, Sample
from trainer_client.cli.fleet import SETTLED_S
from trainer_client.cli.up import _plan
from workers.process.watchdog import EXIT_HUNG

REWARDS = """
rewards:
  - reward_model: jpeg_compressibility
  - {{reward_model: vllm_evaluate, api_base_url: {url}, vlm_model: {model}}}
"""


@pytest.fixture(scope="module")
def judge():
    server = JudgeServer(lambda _: says_yes(0.75))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def rewards_yaml(tmp_path, judge):
    """The file that tests start with, unless they write their own."""
    path = tmp_path / "rewards.yaml"
    path.write_text(REWARDS.format(url=judge.url, model=MODEL))
    return path


def start_up(rewardq, tmp_path, *arguments):
    run = rewardq("up", "rewards.yaml", *arguments)
    run.wait_for("Ready.")
    return run


def worker_commands(run):
    commands = [command_of(pid) for pid in run.children()]
    return sorted(" ".join(c[1:]) for c in commands if "worker" in c)


def test_up_starts_a_redis_and_a_worker_for_each_queue_by_the_documented_commands(rewardq, tmp_path):
    run = start_up(rewardq, tmp_path)
    assert worker_commands(run) == [
        "-P -m rewardq worker -Q gpu",
        "-P -m rewardq worker -Q vlm --concurrency 32",
    ]
    assert len(run.children()) == 3
    exported = r"^  export REWARDQ_BROKER_URL=redis://:[\w-]{32}@127\.0\.0\.1:\d+/0$"
    assert re.search(exported, run.output, re.MULTILINE)


def test_the_redis_that_up_starts_has_a_password_that_no_command_line_and_no_log_shows(rewardq, tmp_path):
    run = start_up(rewardq, tmp_path)
    url = re.search(r"REWARDQ_BROKER_URL=(\S+)", run.output)[1]
    parts = urlsplit(url)
    with redis.Redis(port=parts.port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    with redis.Redis.from_url(url) as client:
        assert client.ping()
    assert run.output.count(parts.password) == 1, "where it is exported"
    assert parts.password not in "".join(" ".join(command_of(pid)) for pid in run.children())
    (logs,) = tmp_path.glob("rewardq-up-*")
    assert all(parts.password not in log.read_text(errors="replace") for log in logs.glob("*.log"))
    (file,) = (path for path in logs.rglob("*") if path.is_file() and parts.password in path.read_text())
    assert (file.stat().st_mode & 0o777, logs.stat().st_mode & 0o777) == (0o600, 0o700)
    server = next(pid for pid in run.children() if f":{parts.port}" in " ".join(command_of(pid)))
    os.kill(server, signal.SIGKILL)
    run.wait_for("redis ended by itself (SIGKILL); starting it again")
    wait_until(lambda: answers(url), 20, lambda: run.output)
    with redis.Redis(port=parts.port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    run.process.send_signal(signal.SIGINT)
    assert run.exit_status(30) == 0, run.output
    assert not file.exists()


def answers(url):
    try:
        with redis.Redis.from_url(url) as client:
            return client.ping()
    except redis.ConnectionError:
        return False


def test_more_gpu_workers_serve_the_same_queue_on_a_gpu_each(rewardq, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    run = start_up(rewardq, tmp_path, "--gpu-workers", "3")
    assert worker_commands(run).count("-P -m rewardq worker -Q gpu") == 3
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
    run.wait_for("worker-gpu is ready again (pid ")
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


VALUED = """
from workers import PointwiseRewardModel


class Bright(PointwiseRewardModel):
    required_fields = ("prompt",)

    def __call__(self, prompt, **kwargs):
        return [{}] * len(prompt)
"""


def test_an_edited_class_is_scored_anew_by_a_worker_that_is_started_again_at_once(rewardq, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rewards.yaml").write_text("rewards: {reward_model: bright.Bright, name: bright, version: '1'}")
    (tmp_path / "bright.py").write_text(VALUED.format(1.0))
    run = rewardq("up", "rewards.yaml", env={"REWARDQ_MODULES": "bright", "PYTHONPATH": str(ROOT)})
    run.wait_for("Ready.")
    settings = load_settings(broker_url=re.search(r"REWARDQ_BROKER_URL=(\S+)", run.output)[1])
    time.sleep(SETTLED_S)
    for value in (1.0, 2.0):
        (tmp_path / "bright.py").write_text(VALUED.format(value))
        with RewardClient.from_yaml(tmp_path / "rewards.yaml", "up", settings=settings) as client:
            client.submit(samples_of(range(3)))
            assert client.collect(timeout_s=60).rewards["bright"].tolist() == [value] * 3
    assert f"worker-gpu ended by itself (exit status {EXIT_HUNG}); starting it again at once" in run.output
    assert "bright.py changed since this worker loaded it" in run.output


def test_a_class_that_is_broken_by_an_edit_keeps_its_worker_from_nothing_else(rewardq, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rewards.yaml").write_text(
        "rewards: [{reward_model: bright.Bright, name: bright, version: '1', queue: gpu}, "
        "{reward_model: jpeg_compressibility, name: size}]"
    )
    (tmp_path / "bright.py").write_text(VALUED.format(1.0))
    run = rewardq("up", "rewards.yaml", env={"PYTHONPATH": str(ROOT)})
    run.wait_for("Ready.")
    settings = load_settings(broker_url=re.search(r"REWARDQ_BROKER_URL=(\S+)", run.output)[1])
    time.sleep(SETTLED_S)

    def collect():
        with RewardClient.from_yaml(tmp_path / "rewards.yaml", "up", settings=settings) as client:
            client.submit(samples_of(range(3)))
            return client.collect(timeout_s=90, on_failure="nan")

    (tmp_path / "bright.py").write_text(VALUED.format("1.0 +"))
    broken = collect()
    assert broken.valid["size"].all()
    assert not broken.valid["bright"].any()
    assert all("SyntaxError" in failed.message and "bright.py" in failed.message for failed in broken.failures)
    assert "without REWARDQ_PRELOAD" in run.output

    (tmp_path / "bright.py").write_text(VALUED.format(3.0))
    assert collect().rewards["bright"].tolist() == [3.0] * 3


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
    else:
        (tmp_path / "rewards.yaml").unlink()
    run = rewardq("up", "rewards.yaml")
    assert run.exit_status(30) == 2, run.output
    assert says in run.output
    assert len(run.output.splitlines()) == 1


def test_a_redis_that_does_not_answer_is_one_line_without_its_password(rewardq, tmp_path):
    run = rewardq("up", "rewards.yaml", "--redis", "redis://:secret@127.0.0.1:1/0")
    assert run.exit_status(30) == 2, run.output
    assert "redis://:***@127.0.0.1:1/0" in run.output
    assert "secret" not in run.output
    assert len(run.output.splitlines()) == 1


BRIGHT = """
from rewardq import PointwiseRewardModel


class Bright(PointwiseRewardModel):
    required_fields = ("prompt",)

    def __call__(self, prompt, **kwargs):
        return [7.0] * len(prompt)


class WithoutWeights(PointwiseRewardModel):
    required_fields = ("prompt",)

    def __init__(self, *arguments):
        super().__init__(*arguments)
        raise OSError("no weights at /models/bright")
"""


def test_a_worker_that_cannot_score_a_reward_ends_it_and_is_one_line_that_names_each_and_the_log(rewardq, tmp_path):
    (tmp_path / "own.py").write_text(BRIGHT)
    rewards = [{"name": n, "reward_model": "own.WithoutWeights", "n": n} for n in ("first", "second")]
    rewards[1]["version"] = "1"
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": [*rewards, {"reward_model": "own.Bright"}]}))
    run = rewardq("up", "rewards.yaml")
    assert run.exit_status(90) == 2, run.output
    assert re.search(r"worker-gpu did not start \(exit status \d+\); its log \S+worker-gpu.log ends with", run.output)
    last = run.output.splitlines()[-1]
    for name in ("first", "second"):
        assert (
            f"reward '{name}' (own.WithoutWeights): reward model own.WithoutWeights cannot be loaded: OSError" in last
        )
    assert "own.Bright" not in last
    assert "Traceback" not in run.output
    assert run.children() == []


def test_a_class_of_the_folder_is_scored_though_the_folder_has_modules_of_our_names(rewardq, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("workers", "trainer_client"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "tasks.py").write_text("raise RuntimeError('this is not what a worker imports')")
    (tmp_path / "own.py").write_text(BRIGHT)
    (tmp_path / "rewards.yaml").write_text("rewards: {reward_model: own.Bright, name: bright}")
    run = rewardq("up", "rewards.yaml", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    run.wait_for("Ready.")
    assert "REWARDQ_MODULES=own (own as rewards.yaml names it)" in run.output
    assert f"{tmp_path / 'trainer_client'}, {tmp_path / 'workers'}: no worker imports what lies there" in run.output
    settings = load_settings(broker_url=re.search(r"REWARDQ_BROKER_URL=(\S+)", run.output)[1])
    with RewardClient.from_yaml(tmp_path / "rewards.yaml", "up", settings=settings) as client:
        client.submit([Sample(prompt="a")])
        assert client.collect(timeout_s=60).rewards["bright"].tolist() == [7.0]


def test_modules_and_rewards_of_the_file_come_beside_those_of_the_environment(tmp_path, in_env, monkeypatch):
    monkeypatch.chdir(tmp_path)
    classes = ("own.Bright", "own.Dark", "pack.sub.Bright", "known.deep.Bright")
    rewards = [{"name": name, "reward_model": name} for name in classes]
    config = {"rewards": rewards[:2], "eval_rewards": rewards[2:]}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump(config))
    in_env(REWARDQ_MODULES="known", REWARDQ_PRELOAD="OCR")
    plan = _plan(Path("rewards.yaml"), load_settings(), 1)
    assert plan.env["REWARDQ_MODULES"] == "known,own,pack.sub"
    assert plan.env["REWARDQ_PRELOAD"] == str(tmp_path / "rewards.yaml")
    assert "REWARDQ_PRELOAD=OCR is not used: the rewards file is preloaded" in plan.notes


def test_more_models_than_a_worker_may_keep_are_not_preloaded_and_that_is_said(tmp_path, in_env):
    names = ("jpeg_compressibility", "jpeg_incompressibility")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"rewards": [{"reward_model": name} for name in names]}))
    in_env(REWARDQ_MAX_MODELS="1")
    plan = _plan(tmp_path / "two.yaml", load_settings(), 1)
    assert "REWARDQ_PRELOAD" not in plan.env
    assert plan.notes == ["not preloaded, and so not tried: queue gpu has 2 models, more than REWARDQ_MAX_MODELS=1"]


class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


def test_ready_is_said_once_a_reward_server_that_starts_later_answers(rewardq, tmp_path):
    port = free_port()
    reward = {"name": "remote", "reward_model": "RemotePointwiseRewardModel", "server_url": f"http://127.0.0.1:{port}"}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": reward}))
    run = rewardq("up", "rewards.yaml")
    run.wait_for(f"worker-vlm: reward 'remote' (RemotePointwiseRewardModel): no answer from http://127.0.0.1:{port}")
    assert "Ready" not in run.output
    with ThreadingHTTPServer(("127.0.0.1", port), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run.wait_for("Ready.")
        server.shutdown()


@pytest.mark.parametrize(
    ("arguments", "says", "status"),
    [(("--wait", "1"), "not ready within 1 s: ", 2), (("--no-wait",), "Ready but for what is above.", None)],
)
def test_a_server_that_never_answers_ends_it_or_is_told(rewardq, tmp_path, arguments, says, status):
    reward = {"name": "remote", "reward_model": "RemotePointwiseRewardModel", "server_url": "http://127.0.0.1:9"}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": reward}))
    run = rewardq("up", "rewards.yaml", *arguments)
    run.wait_for(says)
    if status is None:
        assert "not ready: worker-vlm: reward 'remote' (RemotePointwiseRewardModel): no answer from" in run.output
    else:
        assert run.exit_status(60) == status, run.output
