"""A class of the user's that is edited while its workers run: no reward is by other code than is asked for."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.code import code_of, digest_of
from tasks.settings import load_settings
from tests.cli.conftest import rewardq  # noqa: F401  (a fixture)
from tests.delivery.conftest import supervised  # noqa: F401  (a fixture)
from tests.pipeline.conftest import together
from tests.servers import ROOT, WorkerProcess, wait_until
from trainer_client import CollectTimeoutError, RewardClient, Sample, TicketError
from workers.watchdog import EXIT_HUNG

CONSTANT = """
from workers import PointwiseRewardModel, RewardModelOutput


class Constant(PointwiseRewardModel):
    required_fields = ("prompt",)

    def __call__(self, prompt, **kwargs):
        return RewardModelOutput([{value}] * len(prompt))
"""

BY_HELPER = """
from workers import PointwiseRewardModel, RewardModelOutput
{imports}

class Constant(PointwiseRewardModel):
    required_fields = ("prompt",)

    def __call__(self, prompt, **kwargs):
        {lazily}
        return RewardModelOutput([VALUE] * len(prompt))
"""


class Site:
    """A folder of the user's that trainer and workers see, and clients for the class in it."""

    def __init__(self, folder: Path, settings: Any) -> None:
        self.folder, self.settings = folder, settings
        self.env = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        return path

    def allow(self, *modules: str) -> dict[str, str]:
        return {**self.env, "REWARDQ_MODULES": ",".join(modules)}

    def client(self, model: str = "my_rewards.Constant", run: str = "run", **reward: Any) -> RewardClient:
        reward = {"name": "own", "version": "1", **reward, "reward_model": model}
        return RewardClient.from_dict({"rewards": reward}, run, settings=self.settings)

    def score(self, model: str = "my_rewards.Constant", timeout_s: float = 60, num: int = 2, **reward: Any) -> Any:
        with self.client(model, **reward) as client:
            client.submit([Sample(prompt=f"p{i}") for i in range(num)])
            return client.collect(timeout_s=timeout_s, on_failure="nan")


@pytest.fixture
def site(tmp_path, settings, monkeypatch) -> Site:
    """The folder is on the path of this trainer too."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return Site(folder, settings)


@pytest.fixture
def worker_alone(site, workers) -> Callable[..., WorkerProcess]:
    """A worker that nobody starts again."""

    def start(*modules: str) -> WorkerProcess:
        (worker,) = workers("gpu", env=site.allow(*modules))
        return worker

    return start


def test_an_edited_class_is_not_scored_by_the_old_code_under_a_new_version(site, worker_alone):
    site.write("my_rewards.py", CONSTANT.format(value=1))
    worker = worker_alone("my_rewards")
    assert site.score().rewards["own"].tolist() == [1.0, 1.0]
    site.write("my_rewards.py", CONSTANT.format(value=2))
    with site.client(version="2") as client:
        client.submit([Sample(prompt="p0")])
        with pytest.raises(CollectTimeoutError, match="my_rewards.py changed since this worker loaded it") as caught:
            client.collect(timeout_s=12)
        assert f"gpu.{worker.pid}@" in str(caught.value)
    assert worker.process.wait(30) == EXIT_HUNG
    assert "my_rewards.py changed since this worker loaded it" in worker.log_text
