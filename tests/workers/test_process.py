"""Real worker processes, started by the two documented commands."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from celery.worker import state

from tasks import keys
from tasks.celery_app import make_app
from tasks.errors import StaleCodeError
from tests.servers import ROOT, clean_env, wait_until, worker_env
from workers.process.lifetime import end_to_start_anew
from workers.process.watchdog import EXIT_HUNG


@pytest.fixture
def app(settings):
    app = make_app(settings)
    yield app
    app.close()


def test_the_two_commands_on_one_host_give_two_workers_with_names_threads_and_our_tasks_alone(workers, outcomes, app):
    gpu, vlm = workers("gpu", "vlm")
    nodes = {w.pid: w for w in outcomes.workers()}
    names = {pid: w.node for pid, w in nodes.items()}
    host = socket.gethostname()
    assert names == {gpu.pid: f"gpu.{gpu.pid}@{host}", vlm.pid: f"vlm.{vlm.pid}@{host}"}
    assert {w.queues for w in nodes.values()} == {("gpu",), ("vlm",)}
    inspect = app.control.inspect(timeout=1)
    stats = wait_until(lambda: (s := inspect.stats()) and len(s) == 2 and s, 20)
    threads = {node: (s["pool"]["implementation"], s["pool"]["max-concurrency"]) for node, s in stats.items()}
    pool = "workers.process.pool:ThreadsPool"
    assert threads == {names[gpu.pid]: (pool, 2), names[vlm.pid]: (pool, 32)}
    answers = wait_until(lambda: (r := inspect.registered()) and len(r) == 2 and r, 20)
    registered = {task.partition(" ")[0] for tasks in answers.values() for task in tasks}
    assert "rewardq.score" in registered
    assert all(name.startswith("rewardq.") for name in registered)

    gpu.stop()
    assert {w.pid for w in outcomes.workers()} == {vlm.pid}
    vlm.kill()
    wait_until(lambda: outcomes.workers() == [])
    assert outcomes.redis.exists(keys.worker(names[vlm.pid])) == 0


def test_a_worker_with_a_wrong_variable_says_so_and_does_not_start(tmp_path):
    env = {**clean_env(), "PYTHONPATH": str(ROOT), "REWARDQ_DEVISE": "cpu"}
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", "gpu"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "did you mean 'REWARDQ_DEVICE'" in done.stderr


def test_a_worker_that_cannot_be_made_ready_ends_and_takes_no_message(settings, tmp_path):
    (tmp_path / "file").touch()
    env = worker_env(settings, {"REWARDQ_PAYLOAD_URL": f"file://{tmp_path}/file/rewardq"})
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", "gpu"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == os.EX_CONFIG
    assert "worker cannot start: REWARDQ_PAYLOAD_URL: cannot make the folder" in done.stderr


@pytest.mark.parametrize(("before", "after"), [(None, EXIT_HUNG), (False, EXIT_HUNG), (0, 0)])
def test_outdated_code_ends_a_worker_to_be_started_again_unless_it_was_asked_to_stop(monkeypatch, before, after):
    monkeypatch.setattr(state, "should_stop", before)
    end_to_start_anew(StaleCodeError(["my_rewards.py"]))
    assert state.should_stop == after
