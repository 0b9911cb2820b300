"""`rewardq worker`: the documented worker, in a process of its own, also beside files of the user's with our names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.shadows import namesakes
from tests.cli.conftest import REWARDQ, command_of
from tests.reward_models import image_of
from tests.servers import ROOT, WorkerProcess, worker_env
from trainer_client import RewardClient, Sample

SHADOWS = {"tasks.py": "x = 1", "workers/__init__.py": "", "workers/mine.py": "", "trainer_client/__init__.py": ""}


class OurWorker(WorkerProcess):
    """As that of the other tests, started by our command."""

    @staticmethod
    def command(queue: str, concurrency: int | None) -> list[str]:
        threads = [] if concurrency is None else ["--concurrency", str(concurrency)]
        return [str(REWARDQ), "worker", "-Q", queue, *threads]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


@pytest.fixture
def start(settings, tmp_path):
    started = []

    def start(command: type[WorkerProcess], **env: str) -> WorkerProcess:
        started.append(command("gpu", settings, tmp_path, None, env))
        started[-1].wait_ready()
        return started[-1]

    yield start
    for worker in started:
        worker.stop()  # which asserts that SIGTERM ends it with status 0, and that it left nothing


@pytest.mark.parametrize("command", [OurWorker, WorkerProcess], ids=["rewardq worker", "celery -A tasks worker"])
def test_it_scores_beside_packages_of_our_names(start, settings, tmp_path, command):
    # Celery itself looks for `tasks` in the folder: only our command can be started beside a tasks.py.
    files = {n: t for n, t in SHADOWS.items() if command is OurWorker or n != "tasks.py"}
    write(tmp_path, files)
    worker = start(command, PYTHONPATH=f"{ROOT}:{tmp_path}" if command is WorkerProcess else f"{tmp_path}:{ROOT}")
    config = {"rewards": {"name": "code", "reward_model": "tests.reward_models.PixelCode"}}
    with RewardClient.from_dict(config, "beside", settings=settings) as client:
        client.submit([Sample(image=image_of(7))])
        assert client.collect(timeout_s=60).rewards["code"].tolist() == [7.0]
    if command is OurWorker:
        assert f"rewardq worker: {tmp_path / 'tasks.py'}, " in worker.log_text
        names = "`import tasks` and `import trainer_client` and `import workers`"
        assert f"In a worker {names} means rewardq's own package. " in worker.log_text


def test_it_is_the_process_that_was_started_and_named_after_its_queue(start):
    worker = start(OurWorker)
    assert worker.heartbeat().pid == worker.pid
    assert worker.heartbeat().node.startswith(f"gpu.{worker.pid}@")
    assert command_of(worker.pid)[-3:] == ["worker", "-Q", "gpu"]
    assert "rewardq worker:" not in worker.log_text


def run_worker(*options: str, folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "rewardq", "worker", *options]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_its_exit_status_is_the_workers(settings, private_redis, tmp_path):
    evicting = private_redis("--maxmemory-policy", "allkeys-lru", "--maxmemory", "64mb")
    env = {**worker_env(settings, {}), "REWARDQ_BROKER_URL": evicting.url}
    assert run_worker("-Q", "gpu", folder=tmp_path, env=env).returncode == os.EX_CONFIG
    done = run_worker("-Q", "gpu", "--no-such-option", folder=tmp_path, env=env)
    assert (done.returncode, "No such option" in done.stderr) == (2, True)


def test_a_wrong_variable_is_one_line(settings, tmp_path):
    done = run_worker("-Q", "gpu", folder=tmp_path, env=worker_env(settings, {"REWARDQ_BROKER": "redis://h"}))
    assert done.returncode != 0
    assert "unknown variable REWARDQ_BROKER (did you mean 'REWARDQ_BROKER_URL'?)" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_its_help_is_celerys_options(settings, tmp_path):
    done = run_worker("--help", folder=tmp_path, env=worker_env(settings, {}))
    assert done.returncode == 0
    assert "the same as celery -A tasks worker" in done.stdout
    assert "--concurrency" in done.stdout


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"tasks.py": ""}, ["tasks.py"]),
        ({"workers/a.py": ""}, ["workers"]),
        ({"workers/data.txt": "", "tasks/a.json": ""}, []),
        ({"my_tasks.py": ""}, []),
    ],
)
def test_only_python_under_our_names_shadows_us(tmp_path, files, found):
    write(tmp_path, files)
    assert namesakes(tmp_path) == [tmp_path / name for name in found]


def test_a_checkout_and_a_link_to_it_are_ours(tmp_path):
    for name in ("tasks", "workers", "trainer_client", "rewardq"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert namesakes(ROOT) == namesakes(tmp_path) == []
