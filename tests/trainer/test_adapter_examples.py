"""`examples/trl` and `examples/flow_factory`: they run where their frameworks are, and name nothing that is gone."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tasks.rewards import RewardConfig
from tasks.settings import Settings
from tests.servers import ROOT, WorkerProcess, run_python, worker_env
from tests.trainer.test_adapter_flow_factory import tensor_of
from trainer_client.adapters.flow_factory import QueuedRewardModel

TRL, FLOW_FACTORY = ROOT / "examples" / "trl", ROOT / "examples" / "flow_factory"


@pytest.mark.parametrize("folder", [TRL, FLOW_FACTORY], ids=lambda folder: folder.name)
def test_what_an_example_imports_of_ours_is_there(folder: Path) -> None:
    tree = ast.parse((folder / "train.py").read_text())
    ours = [n for n in tree.body if isinstance(n, ast.ImportFrom) and str(n.module).startswith("trainer_client")]
    assert len(ours) == 2
    for node in ours:
        assert [a.name for a in node.names if not hasattr(importlib.import_module(str(node.module)), a.name)] == []


@pytest.mark.parametrize("folder", [TRL, FLOW_FACTORY], ids=lambda folder: folder.name)
def test_the_workers_of_an_example_are_started_as_those_of_the_tests(folder: Path) -> None:
    text = "\n".join(re.findall(r"```sh\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL))
    commands = [shlex.split(line.replace("&", ""), comments=True) for line in text.splitlines()]
    started = [command for command in commands if command[:2] == ["rewardq", "worker"]]
    documented = len(["celery", "-A", "tasks", "worker"])
    assert started[0][2:] == WorkerProcess.command("gpu", None)[2 + documented :]
    assert [command[2:] for command in started[1:]] in ([], [WorkerProcess.command("vlm", 32)[2 + documented :]])
    for file in re.findall(r"examples/[\w./]+", text):
        assert (ROOT / file).exists(), file


def test_the_example_for_trl_trains(settings: Settings, workers: Callable[..., Any], tmp_path: Path) -> None:
    shutil.copytree(TRL, tmp_path / "trl")
    rewards = tmp_path / "trl" / "rewards.yaml"
    assert [spec.reward_model for spec in RewardConfig.from_yaml(rewards).rewards] == ["OCR", "jpeg_compressibility"]
    rewards.write_text(rewards.read_text().replace("OCR", "jpeg_incompressibility"))  # reading takes a second a picture
    workers("gpu")
    done = run_python("trl/train.py", "--steps", "5", cwd=tmp_path, env=worker_env(settings, {}))
    logged = ast.literal_eval(re.findall(r"^{.*}$", done.stdout, re.MULTILINE)[0])
    readable, plain = (float(logged[f"rewards/{name}/mean"]) for name in ("readable", "plain"))
    assert readable == pytest.approx(-plain, rel=1e-3)
    assert float(logged["reward"]) == pytest.approx(readable + 0.02 * plain, rel=1e-2)
    assert float(logged["rewards/plain/failure_rate"]) == 0.0


def test_the_block_for_the_unmodified_trainer_makes_reward_models(
    settings: Settings, in_env: Callable[..., Any]
) -> None:
    in_env(REWARDQ_BROKER_URL=settings.broker)
    entries = yaml.safe_load((FLOW_FACTORY / "rewards_block.yaml").read_text())["rewards"]
    own = ("name", "reward_model", "weight", "batch_size", "async_reward", "num_workers")  # fields of their arguments
    for entry in entries:
        module, _, name = entry["reward_model"].rpartition(".")
        assert getattr(importlib.import_module(module), name) is QueuedRewardModel
        options = {key: value for key, value in entry.items() if key not in own}
        config = SimpleNamespace(**entry, dtype=torch.bfloat16, device=torch.device("cuda"), extra_kwargs=options)
        QueuedRewardModel(config, SimpleNamespace()).client.close()
    assert [entry["model"] for entry in entries] == ["OCR", "vllm_evaluate"]


@pytest.mark.peer
def test_the_example_for_flow_factory_trains_and_evaluates(
    settings: Settings, workers: Callable[..., Any], tmp_path: Path
) -> None:
    workers("gpu")
    rewards = [
        {"name": "number", "reward_model": "tests.reward_models.PixelCode"},
        {"name": "rank", "reward_model": "jpeg_incompressibility_Rank"},
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"rewards": rewards}))
    code = "from tests.trainer.test_adapter_examples import train_as_theirs; train_as_theirs()"
    run_python("-c", code, tmp_path / "config.yaml", env=worker_env(settings, {}))


def train_as_theirs() -> None:
    """An evaluation and an epoch of the example's trainer: all of theirs but the model that is trained."""
    from accelerate import Accelerator
    from flow_factory.samples import T2ISample

    spec = importlib.util.spec_from_file_location("their_train", FLOW_FACTORY / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def painted(prompt: list[str]) -> list[Any]:
        return [T2ISample(prompt=p, image=tensor_of(i)) for i, p in enumerate(prompt)]

    logged: dict[str, Any] = {}
    trainer = object.__new__(module.QueuedGRPOTrainer)
    trainer.__dict__.update(
        accelerator=Accelerator(cpu=True),
        adapter=SimpleNamespace(eval=lambda: None, use_ema_parameters=contextlib.nullcontext, inference=painted),
        autocast=contextlib.nullcontext,
        config=SimpleNamespace(data_args=SimpleNamespace(sampler_type="group_contiguous")),
        eval_args={},
        log_args=SimpleNamespace(run_name="ff", verbose=False),
        log_data=lambda data, step: logged.update(data),
        step=0,
        test_dataloader=[{"prompt": ["a", "b"]}, {"prompt": ["a", "a"]}],
        training_args=SimpleNamespace(group_size=4, seed=1),
    )
    trainer._init_reward_model()
    trainer.evaluate()
    assert logged["eval/reward_number_mean"] == 0.5
    assert logged["eval/failure_rate"] == 0.0
    trainer.reward_buffer.clear()
    samples = painted(["a"] * 4)
    trainer.reward_buffer.add_samples(samples)
    trainer.prepare_feedback(samples)
    assert logged["train/reward_number_mean"] == 1.5
    assert logged["train_samples"] == samples
    advantages = np.array([float(sample.extra_kwargs["advantage"]) for sample in samples])
    assert advantages.std() > 0
    assert logged["train/adv_max"] == pytest.approx(advantages.max())
    trainer.client.close()
