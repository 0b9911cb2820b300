"""A class of the user's that is edited while its workers run: no reward is by other code than is asked for."""

from __future__ import annotations

import logging
import os
import pickle
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.source.code import code_of, digest_of
from tests.delivery.conftest import supervised  # noqa: F401  (a fixture)
from tests.servers import ROOT, WorkerProcess, wait_until
from trainer_client import CollectTimeoutError, ConfigError, RewardClient, Sample, TicketError
from workers.process.watchdog import EXIT_HUNG

CONSTANT = """
import time
from workers import PointwiseRewardModel, RewardModelOutput
{imports}

class Constant(PointwiseRewardModel):
    required_fields = ("prompt",)

    def __call__(self, prompt, **kwargs):
        {first}
        return RewardModelOutput([{value}] * len(prompt))
"""


def constant(value: Any, imports: str = "", first: str = "") -> str:
    """A class whose every reward is `value`."""
    return CONSTANT.format(value=value, imports=imports, first=first)


class Site:
    """A folder of the user's on the path of the workers, and clients for the classes in it."""

    def __init__(self, folder: Path, settings: Any) -> None:
        self.folder, self.settings = folder, settings
        folder.mkdir()

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def allow(self, *modules: str) -> dict[str, str]:
        path = os.pathsep.join([str(ROOT), str(self.folder)])
        return {"PYTHONPATH": path, "REWARDQ_MODULES": ",".join(modules)}

    def client(self, model: str = "my_rewards.Constant", version: str = "1", **options: Any) -> RewardClient:
        reward = {"name": "own", "reward_model": model, "version": version, "required_fields": ["prompt"]}
        reward["batch_size"] = options.pop("batch_size", 16)
        options.setdefault("max_failure_rate", 1.0)  # where a sample fails here, all do
        return RewardClient.from_dict({"rewards": reward}, "run", settings=self.settings, **options)

    def score(self, model: str = "my_rewards.Constant", version: str = "1", num: int = 2, **options: Any) -> Any:
        """A batch of a client of its own."""
        with self.client(model, version, **options) as client:
            client.submit([Sample(prompt=f"p{i}") for i in range(num)])
            return client.collect(timeout_s=60, on_failure="nan")


@pytest.fixture
def hidden(tmp_path, settings) -> Site:
    """A folder that only the workers see."""
    return Site(tmp_path / "site", settings)


@pytest.fixture
def site(hidden, monkeypatch) -> Site:
    """A folder that the trainer sees too."""
    monkeypatch.syspath_prepend(str(hidden.folder))
    return hidden


@pytest.fixture
def alone(site, workers) -> Callable[..., WorkerProcess]:
    """Starts a worker that nobody starts again."""

    def start(*modules: str) -> WorkerProcess:
        (worker,) = workers("gpu", env=site.allow(*modules))
        return worker

    return start


def assert_ended_to_be_started_again(worker: WorkerProcess) -> None:
    try:
        assert worker.process.wait(30) == EXIT_HUNG
    finally:
        worker.kill()  # nothing is left to be stopped


def rewards_of(batch: Any) -> list[float]:
    assert not batch.failures, batch.describe_failures()
    return batch.rewards["own"].tolist()


def test_an_edited_class_is_not_scored_by_the_old_code_under_a_new_version(site, alone):
    site.write("my_rewards.py", constant(1))
    worker = alone("my_rewards")
    assert rewards_of(site.score()) == [1.0, 1.0]
    site.write("my_rewards.py", constant(2))
    with site.client(version="2") as client:
        client.submit([Sample(prompt="p0")])
        assert_ended_to_be_started_again(worker)
        with pytest.raises(CollectTimeoutError) as caught:
            client.collect(timeout_s=4)
        words = f"gpu.{worker.pid}@{platform.node()} ended: my_rewards.py changed since this worker loaded it"
        assert words in str(caught.value)
        assert "start it again" in str(caught.value)
        alone("my_rewards")
        assert rewards_of(client.collect(timeout_s=60)) == [2.0]
    assert "status=75: my_rewards.py changed since this worker loaded it" in worker.log_text


def test_whatever_file_of_a_classs_code_is_edited_its_rewards_are_those_of_the_new_code(site, supervised):  # noqa: F811
    site.write("my_rewards.py", constant("VALUE", "from my_helpers import VALUE"))
    site.write("my_helpers.py", "VALUE = 1.0\n")
    site.write("my_package/__init__.py", "")
    site.write("my_package/rewards.py", constant("levels.VALUE", "from . import levels"))
    site.write("my_package/levels.py", "from .deeper import VALUE\n")
    site.write("my_package/deeper.py", "VALUE = 10.0\n")
    supervisor = supervised("gpu", env=site.allow("my_rewards", "my_package"))

    def both(num: int) -> list[float]:
        by_module, by_package = site.score(num=num), site.score("my_package.rewards.Constant", num=num)
        return rewards_of(by_module) + rewards_of(by_package)

    assert both(1) == [1.0, 10.0]
    site.write("my_helpers.py", "VALUE = 2.0\n")
    assert both(2) == [2.0] * 2 + [10.0] * 2  # one of the latter is an answer of before
    site.write("my_package/deeper.py", "VALUE = 20.0\n")
    assert both(2) == [2.0] * 2 + [20.0] * 2
    site.write("my_helpers.py", "VALUE = 1.0\n")  # the first code again, whose rewards are still there
    batch = site.score(num=1)
    assert (rewards_of(batch), batch.num_hits["own"]) == ([1.0], 1)
    assert supervisor.statuses == [EXIT_HUNG] * 2
    assert "my_helpers.py changed since this worker loaded it" in supervisor.log_text
    assert "my_package/deeper.py changed since this worker loaded it" in supervisor.log_text


def test_a_stale_worker_ends_and_another_scores_what_it_was_sent(site, alone):
    site.write("my_rewards.py", constant(1))
    stale = alone("my_rewards")
    assert rewards_of(site.score()) == [1.0, 1.0]
    site.write("my_rewards.py", constant(2))
    fresh = alone("my_rewards")
    with site.client(batch_size=1) as client:
        submitted = 0
        while stale.process.poll() is None and submitted < 600:
            client.submit([Sample(prompt=f"p{submitted + i}") for i in range(20)])
            submitted += 20
            client.flush()
        assert rewards_of(client.collect(timeout_s=60)) == [2.0] * submitted
    assert_ended_to_be_started_again(stale)
    assert fresh.process.poll() is None


def test_what_a_stale_worker_has_in_hand_is_finished_by_the_code_that_it_was_asked_for(site, alone, tmp_path):
    begun = tmp_path / "begun"
    site.write("my_rewards.py", constant(1, first=f"open({str(begun)!r}, 'a').close(); time.sleep(2)"))
    worker = alone("my_rewards")
    with site.client(launch="old") as old:
        old.submit([Sample(prompt="p0")])
        old.flush()
        wait_until(begun.exists)
        site.write("my_rewards.py", constant(2))
        with site.client(launch="new") as new:
            new.submit([Sample(prompt="p0")])
            new.flush()
            assert rewards_of(old.collect(timeout_s=30)) == [1.0]
            assert_ended_to_be_started_again(worker)
            alone("my_rewards")
            assert rewards_of(new.collect(timeout_s=60)) == [2.0]


def test_where_the_workers_files_are_not_the_trainers_each_sample_says_which_file_on_which_host(site, alone):
    site.write("my_rewards.py", constant("VALUE", "from my_helpers import VALUE"))
    site.write("my_helpers.py", "VALUE = 1.0\n")
    with site.client(max_failure_rate=1.0) as client:
        site.write("my_helpers.py", "VALUE = 2.0\n")
        worker = alone("my_rewards")
        client.submit([Sample(prompt="p0"), Sample(prompt="p1")])
        batch = client.collect(timeout_s=60, on_failure="nan")
        assert [f.kind for f in batch.failures] == ["failed", "failed"]
        differs = f"{site.folder / 'my_helpers.py'} on {platform.node()} is not what the trainer read when it started"
        assert differs in batch.failures[0].message
    assert rewards_of(site.score()) == [2.0, 2.0]
    assert worker.process.poll() is None, "to start it again would not help"


def test_a_module_that_a_call_imports_after_an_edit_gives_no_reward_to_who_asked_before(site, alone):
    site.write("my_rewards.py", constant("VALUE", first="from my_helpers import VALUE"))
    site.write("my_helpers.py", "VALUE = 1.0\n")
    alone("my_rewards")
    with site.client(max_failure_rate=1.0) as client:
        site.write("my_helpers.py", "VALUE = 2.0\n")
        client.submit([Sample(prompt="p0")])
        (failed,) = client.collect(timeout_s=60, on_failure="nan").failures
    assert "my_helpers.py" in failed.message
    assert rewards_of(site.score()) == [2.0, 2.0]


def test_the_origin_has_the_code_that_the_trainer_reads(site, alone):
    site.write("my_rewards.py", constant("VALUE", "from my_helpers import VALUE"))
    site.write("my_helpers.py", "VALUE = 1.0\n")
    alone("my_rewards")
    code = code_of("my_rewards.Constant")
    assert [module for module, _ in code] == ["my_helpers", "my_rewards"]
    assert [info["origin"]["code"] for info in site.score().info["own"]] == [digest_of(code)] * 2


def test_a_class_that_only_the_worker_has_is_its_new_code_under_a_new_version(hidden, supervised, caplog):  # noqa: F811
    hidden.write("my_rewards.py", constant("VALUE", "from my_helpers import VALUE"))
    hidden.write("my_helpers.py", "VALUE = 1.0\n")
    assert code_of("my_rewards.Constant") == ()
    supervisor = supervised("gpu", env=hidden.allow("my_rewards"))
    assert rewards_of(hidden.score()) == [1.0, 1.0]
    hidden.write("my_helpers.py", "VALUE = 2.0\n")
    assert rewards_of(hidden.score(version="2")) == [2.0, 2.0]
    assert supervisor.statuses == [EXIT_HUNG]
    assert "answered by two codes" not in caplog.text


def test_two_codes_that_answer_one_reward_of_a_run_are_said_once(hidden, workers, caplog):
    caplog.set_level(logging.WARNING)
    hidden.write("my_rewards.py", constant(1))
    (first,) = workers("gpu", env=hidden.allow("my_rewards"))
    before = hidden.score()
    first.stop()
    hidden.write("my_rewards.py", constant(2))
    workers("gpu", env=hidden.allow("my_rewards"))
    with hidden.client() as client:  # as after a restart of the trainer: what was answered before is in Redis
        client.submit([Sample(prompt=f"new {i}") for i in range(2)])
        after = client.collect(timeout_s=60)
        client.submit([Sample(prompt=f"newer {i}") for i in range(2)])
        client.collect(timeout_s=60)
        wait_until(lambda: "answered by two codes" in caplog.text, timeout_s=10)
    codes = [batch.info["own"][0]["origin"]["code"] for batch in (before, after)]
    assert codes[0] != codes[1]
    (said,) = [r.getMessage() for r in caplog.records if "answered by two codes" in r.getMessage()]
    assert all(code in said for code in codes)
    assert f"gpu.{first.pid}@" in said
    assert "rewardq clean --run run --reward own" in said


def test_a_ticket_of_other_code_is_refused_by_the_name_of_the_file(site):
    site.write("my_rewards.py", constant(1))
    with site.client(launch="one") as client:
        ticket = pickle.dumps(client.submit([Sample(prompt="p0")]))
    site.write("my_rewards.py", constant(2))
    with (
        site.client(launch="one") as successor,
        pytest.raises(TicketError, match=r"my_rewards\.py changed since this ticket was made"),
    ):
        successor.collect(ticket=pickle.loads(ticket))


def test_ranks_whose_hosts_have_different_files_are_told_so_at_the_start(site):
    site.write("my_rewards.py", constant(1))
    with site.client(launch="one", rank=0, world_size=2):
        site.write("my_rewards.py", constant(2))
        with pytest.raises(ConfigError, match=r"rank 1 on .* and rank 0 on .* different code .*: my_rewards\.py"):
            site.client(launch="one", rank=1, world_size=2)
        site.write("my_rewards.py", constant(1))
        site.client(launch="one", rank=1, world_size=2).close()
    site.write("my_rewards.py", constant(2))  # both are gone: the job starts again with what is there now
    site.client(launch="one", rank=1, world_size=2).close()
