from __future__ import annotations

import re
import subprocess
import sys
import threading

import pytest
import yaml

from tasks.errors import ConfigError, ModelLoadError, SettingsError, UnknownRewardError
from tasks.rewards import RewardConfig
from tasks.settings import Settings
from tests.reward_models import image_of
from tests.servers import free_port, wait_until, worker_env
from trainer_client import RewardClient, Sample
from workers import PointwiseRewardModel
from workers.loading.cache import ModelCache
from workers.process.preloading import AskServers, preload, specs_to_preload

warmed: list[str] = []


class Mine(PointwiseRewardModel):
    def warm_up(self) -> None:
        if self.config.extra_kwargs.get("no_room"):
            raise RuntimeError("CUDA out of memory")
        warmed.append(self.config.name)


@pytest.fixture(autouse=True)
def nothing_warmed():
    warmed.clear()


def names(value: str, *queues: str) -> list[str]:
    return [s.reward_model for s in specs_to_preload(value, queues or ("gpu", "vlm"))]


def test_nothing_is_preloaded_unless_it_is_named():
    assert names("") == names("  ") == []


def test_names_are_built_ins_with_their_defaults():
    assert names("OCR, pickscore,OCR") == ["OCR", "PickScore"]
    (spec,) = specs_to_preload("PickScore", ["gpu"])
    (trainers,) = RewardConfig.from_dict({"rewards": {"reward_model": "PickScore", "name": "mine"}}).rewards
    assert spec.call.fingerprint == trainers.call.fingerprint


def test_a_yaml_file_preloads_its_rewards_once_and_the_parts_of_its_ranks(tmp_path):
    config = {
        "rewards": [
            {"reward_model": "PickScore", "weight": 2.0},
            {"reward_model": "PickScore", "name": "again", "batch_size": 4},
            {"reward_model": "PickScore_Rank"},
            {"reward_model": "jpeg_compressibility"},
        ],
        "eval_rewards": {"reward_model": "CLIP"},
    }
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump(config))
    assert names(str(tmp_path / "rewards.yaml")) == ["PickScore", "jpeg_compressibility", "CLIP"]


def test_models_of_other_queues_are_left_out():
    assert names("PickScore,vllm_evaluate", "gpu") == ["PickScore"]
    assert names("PickScore,vllm_evaluate", "vlm") == ["vllm_evaluate"]
    assert names("PickScore", "mine") == []


def test_a_class_without_a_version_is_left_out_since_each_launch_has_its_own(caplog):
    assert names("my_rewards.Mine") == []
    assert "tried and not kept reward=my_rewards.Mine: it has no version" in caplog.text


def test_what_is_wrong_is_said():
    with pytest.raises(UnknownRewardError, match="did you mean 'PickScore'"):
        names("PickScor")
    with pytest.raises(ConfigError, match="cannot read"):
        names("/no/such/rewards.yaml")


def test_preloaded_models_are_in_memory_and_warm(tmp_path):
    entry = {"reward_model": f"{__name__}.Mine", "version": "3", "name": "mine"}
    (tmp_path / "rewards.yml").write_text(yaml.safe_dump({"rewards": [entry]}))
    settings = Settings(device="cpu", modules=__name__, preload=str(tmp_path / "rewards.yml"))
    models = ModelCache(settings)
    preload(settings, ["gpu"], models)
    assert warmed == ["mine"]
    assert models.is_loaded(RewardConfig.from_dict({"rewards": entry}).rewards[0].call)


def test_more_models_than_may_be_kept_are_refused():
    settings = Settings(device="cpu", preload="jpeg_compressibility,jpeg_incompressibility", max_models=1)
    with pytest.raises(SettingsError, match="2 models, more than REWARDQ_MAX_MODELS=1"):
        preload(settings, ["gpu"], ModelCache(settings))
    settings = settings.model_copy(update={"max_models": 2})
    preload(settings, ["gpu"], ModelCache(settings))


def test_a_model_that_cannot_be_loaded_is_an_error(tmp_path):
    entry = {"reward_model": "my_rewards.Such", "version": "1"}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": entry}))
    settings = Settings(device="cpu", preload=str(tmp_path / "rewards.yaml"))
    with pytest.raises(ModelLoadError, match="REWARDQ_MODULES=my_rewards"):
        preload(settings, ["gpu"], ModelCache(settings))


def test_a_model_that_cannot_be_warmed_up_is_an_error(tmp_path):
    entry = {"reward_model": f"{__name__}.Mine", "version": "1", "no_room": True}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": entry}))
    settings = Settings(device="cpu", modules=__name__, preload=str(tmp_path / "rewards.yaml"))
    with pytest.raises(ModelLoadError, match=r"Mine cannot be warmed up: RuntimeError: CUDA out of memory"):
        preload(settings, ["gpu"], ModelCache(settings))


def test_a_class_without_a_version_is_tried_and_not_kept(tmp_path):
    entry = {"reward_model": f"{__name__}.Mine", "name": "mine"}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": entry}))
    settings = Settings(device="cpu", modules=__name__, preload=str(tmp_path / "rewards.yaml"))
    models = ModelCache(settings)
    preload(settings, ["gpu"], models)
    assert warmed == ["mine"]
    assert models.loaded == ()
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": {**entry, "no_room": True}}))
    with pytest.raises(ModelLoadError, match=r"reward 'mine' .*Mine cannot be warmed up: RuntimeError: CUDA out of"):
        preload(settings, ["gpu"], models)


class AskedOnce(PointwiseRewardModel):
    """Its server is away when it is first asked."""

    asks_servers = True
    num_asked = 0

    def warm_up(self) -> None:
        AskedOnce.num_asked += 1
        if AskedOnce.num_asked == 1:
            raise ConnectionError("nobody there")


def test_a_class_of_ones_own_that_asks_a_server_is_asked_again_until_it_answers(tmp_path, monkeypatch):
    monkeypatch.setattr("workers.process.preloading.ASK_AGAIN_S", 0.01)
    entry = {"reward_model": f"{__name__}.AskedOnce", "name": "asked", "version": "1"}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": entry}))
    settings = Settings(device="cpu", modules=__name__, preload=str(tmp_path / "rewards.yaml"))
    said: list[tuple[str, ...]] = []
    servers = AskServers(preload(settings, ["gpu"], ModelCache(settings)), said.append)
    servers.ask_all()
    assert said == [(f"reward 'asked' ({__name__}.AskedOnce): ConnectionError: nobody there",)]
    servers.start()
    servers.join(10)
    assert said[1:] == [()]


together = threading.Barrier(3, timeout=30)


class AskedTogether(PointwiseRewardModel):
    """Its server answers once those of two others are asked as well."""

    asks_servers = True

    def warm_up(self) -> None:
        together.wait()


def test_servers_are_asked_at_the_same_time_so_that_those_that_hang_hold_a_worker_up_no_longer_than_one(tmp_path):
    entries = [
        {"reward_model": f"{__name__}.AskedTogether", "name": name, "version": "1", "number": i}
        for i, name in enumerate("abc")
    ]
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": entries}))
    settings = Settings(device="cpu", modules=__name__, preload=str(tmp_path / "rewards.yaml"))
    said: list[tuple[str, ...]] = []
    AskServers(preload(settings, ["gpu"], ModelCache(settings)), said.append).ask_all()
    assert said == [()]


def test_a_class_that_imports_a_module_of_the_users_under_our_name_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tasks.py").write_text("def helper(): ...")
    (tmp_path / "needs_its_own.py").write_text("from tasks import helper\nclass Mine: ...")
    entry = {"reward_model": "needs_its_own.Mine", "version": "1"}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": entry}))
    settings = Settings(device="cpu", modules="needs_its_own", preload=str(tmp_path / "rewards.yaml"))
    with pytest.raises(ModelLoadError, match=r"cannot import name 'helper'.*tasks\.py: no worker imports what"):
        preload(settings, ["gpu"], ModelCache(settings))


def test_each_reward_that_cannot_be_loaded_is_named(tmp_path):
    names = {"a": "my_rewards.Such", "b": "other_rewards.Such"}
    rewards = [{"name": name, "reward_model": model, "version": "1"} for name, model in names.items()]
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": rewards}))
    settings = Settings(device="cpu", preload=str(tmp_path / "rewards.yaml"))
    with pytest.raises(ModelLoadError) as error:
        preload(settings, ["gpu"], ModelCache(settings))
    for name, model in names.items():
        assert f"reward '{name}' ({model}): reward model {model}: this worker may not import" in str(error.value)


def test_a_server_that_does_not_answer_keeps_no_worker_from_other_rewards_and_is_told_until_it_does(
    workers, settings, tmp_path
):
    port = free_port()
    remote = {"name": "asked", "reward_model": "RemotePointwiseRewardModel", "server_url": f"http://127.0.0.1:{port}"}
    config = {"rewards": [{**remote, "queue": "gpu"}, {"reward_model": "jpeg_compressibility"}]}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump(config))
    (worker,) = workers("gpu", env={"REWARDQ_PRELOAD": str(tmp_path / "rewards.yaml")})
    beat = wait_until(lambda: (beat := worker.heartbeat()) and beat.state == "ready" and beat, timeout_s=60)
    assert beat.models == ("jpeg_compressibility",)
    (why,) = beat.unanswered
    assert why.startswith(f"reward 'asked' (RemotePointwiseRewardModel): no answer from http://127.0.0.1:{port}")


def test_a_worker_preloads_before_it_takes_tasks(workers, settings, tmp_path):
    config = {"rewards": [{"reward_model": "OCR"}, {"reward_model": "jpeg_compressibility", "queue": "other"}]}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump(config))
    (worker,) = workers("gpu", env={"REWARDQ_PRELOAD": str(tmp_path / "rewards.yaml")})
    wait_until(lambda: (beat := worker.heartbeat()) and (beat.models, beat.state) == (("OCR",), "ready"), timeout_s=60)


def test_what_is_preloaded_is_in_memory_before_the_first_task_is_taken(workers, settings, tmp_path):
    slow = {"reward_model": "tests.reward_models.SlowToLoad", "seconds": 3.0, "version": "1"}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": slow}))
    quick = {"name": "quick", "reward_model": "tests.reward_models.PixelCode"}
    with RewardClient.from_dict({"rewards": quick}, "early", settings=settings) as client:
        client.submit([Sample(image=image_of(7))])
        client.flush()
        (worker,) = workers("gpu", env={"REWARDQ_PRELOAD": str(tmp_path / "rewards.yaml")})
        assert client.collect(timeout_s=60).rewards["quick"].tolist() == [7.0]
    loaded = re.findall(r"loaded reward=tests\.reward_models\.(\w+)", worker.log_text)
    assert loaded == ["SlowToLoad", "PixelCode"], "the task waited in the queue while a slow model was loaded"


def test_a_worker_that_cannot_preload_ends_and_says_why(settings, tmp_path):
    env = worker_env(settings, {"REWARDQ_PRELOAD": "jpeg_compressibilty"})
    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", "gpu"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "REWARDQ_PRELOAD=jpeg_compressibilty" in ended.stderr
    assert "did you mean 'jpeg_compressibility'" in ended.stderr
