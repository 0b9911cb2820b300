from __future__ import annotations

import numpy as np
import pytest

from tasks.errors import ConfigError, UnknownRewardError
from trainer_client import RewardClient, Sample

CONFIG = {"rewards": [{"reward_model": "jpeg_compressibility"}]}


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def launch_of(settings, **options):
    with RewardClient.from_dict(CONFIG, "run", settings=settings, **options) as client:
        return client.launch


def test_a_named_torchrun_job_is_its_launch_and_a_restart_is_another(settings, in_env):
    in_env(TORCHELASTIC_RUN_ID="job-7")
    assert launch_of(settings, rank=1, world_size=2) == launch_of(settings, rank=0, world_size=2) == "job-7.0"
    in_env(TORCHELASTIC_RESTART_COUNT="2")
    assert launch_of(settings) == "job-7.2"
    assert launch_of(settings, launch="mine") == "mine"


def test_a_torchrun_job_without_a_name_does_not_share_its_launch_with_the_next_start(settings, in_env):
    in_env(TORCHELASTIC_RUN_ID="none", TORCHELASTIC_RESTART_COUNT="0")
    with pytest.raises(
        ConfigError, match=r"give launch=.*torchrun calls every start .none. unless it is given --rdzv-id"
    ):
        launch_of(settings, rank=0, world_size=2)
    assert launch_of(settings) != launch_of(settings)


def test_several_ranks_need_a_launch(settings):
    with pytest.raises(ConfigError, match=r"give launch=, .* the same on all ranks$"):
        launch_of(settings, rank=0, world_size=2)


def test_a_training_reward_that_is_not_built_here_is_refused_before_the_first_step(settings):
    config = {"rewards": {"name": "audio", "reward_model": "clap"}}
    with pytest.raises(UnknownRewardError, match="reward 'audio': clap is not built here"):
        RewardClient.from_dict(config, "run", settings=settings)


@pytest.mark.parametrize("model", ["clap", "GenEval", "qwen_image_bench", "some_forks_own"])
def test_a_reward_of_evaluation_that_is_not_built_here_is_said_and_keeps_nobody_from_training(settings, caplog, model):
    config = {**CONFIG, "eval_rewards": [{"reward_model": "OCR"}, {"name": "later", "reward_model": model}]}
    with RewardClient.from_dict(config, "run", settings=settings) as client:
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "evaluation cannot run" in caplog.text
        assert "reward 'later'" in caplog.text
        assert "my_rewards.MyReward" in caplog.text
        client.submit([Sample(image=np.zeros((8, 8, 3), np.uint8))])
        assert client.pending() == 1
        with pytest.raises(UnknownRewardError, match=r"reward 'later': .* is not built here"):
            client.submit([Sample(prompt="p", image=np.zeros((8, 8, 3), np.uint8))], split="eval")
        assert client.pending("eval") == 0
