"""The README's snippets and commands are run as they stand."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tasks.rewards import RewardConfig
from tests.servers import ROOT, WorkerProcess, clean_env, run_python
from trainer_client import RewardClient, Sample

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_snippet_runs_against_a_worker_started_from_another_directory(workers, settings, tmp_path):
    workers("gpu")
    snippet = blocks("python")[0]
    assert len(snippet.strip().splitlines()) <= 12
    env = {**clean_env(), "PYTHONPATH": str(ROOT), "REWARDQ_BROKER_URL": settings.broker}
    done = run_python("-W", "error", "-c", snippet, cwd=tmp_path, env=env)
    told = [f"rewardq: step {step}: 16 samples, jpeg_compressibility -" for step in range(3)]
    assert [words in line for words, line in zip(told, done.stderr.splitlines(), strict=True)] == [True] * 3
    numbers = re.findall(r"-?\d+\.\d*(?:e-?\d+)?", done.stdout)
    assert len(numbers) == 3 * (16 + 16)
    assert all(float(n) < 0 for n in numbers[:16])


def test_the_rewards_file_of_the_first_commands_is_the_snippets_config():
    line = next(line for line in blocks("sh")[1].splitlines() if line.startswith("echo "))
    written = yaml.safe_load(shlex.split(line)[1])
    assert f"config = {written}".replace("'", '"') in blocks("python")[0]


def test_the_worker_commands_are_those_the_tests_start():
    commands = [shlex.split(line, comments=True) for line in blocks("sh")[2].splitlines()]
    assert commands[0] == ["celery", "-A", "tasks", "worker", "-Q", "gpu"]
    assert commands[1] == ["celery", "-A", "tasks", "worker", "-Q", "vlm", "--concurrency", "32"]
    assert WorkerProcess.command("gpu", None)[2:] == commands[0]
    assert WorkerProcess.command("vlm", 32)[2:] == commands[1]


def test_the_yaml_loads(tmp_path):
    config = RewardConfig.from_dict(yaml.safe_load(blocks("yaml")[0]))
    assert [(r.name, r.reward_model, r.queue) for r in config.rewards] == [
        ("text", "OCR", "gpu"),
        ("looks_good", "vllm_evaluate", "vlm"),
    ]


def test_the_reward_class_runs_in_a_worker_that_may_import_it(workers, settings, tmp_path):
    (tmp_path / "my_rewards.py").write_text(blocks("python")[1])
    workers("gpu", env={"REWARDQ_MODULES": "my_rewards", "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])})
    gray, black = Image.new("RGB", (4, 4), (51, 51, 51)), Image.new("RGB", (4, 4))
    config = yaml.safe_load(blocks("yaml")[1])
    config["rewards"][0]["required_fields"] = ["image"]  # the class is not beside this trainer
    with RewardClient.from_dict(config, "readme", settings=settings) as client:
        client.submit([Sample(image=gray), Sample(image=black)])
        batch = client.collect(timeout_s=60, on_failure="nan")
    np.testing.assert_allclose(batch.rewards["my_rewards.Brightness"], np.float32([0.2, np.nan]))
    assert [(f.sample, f.kind, f.message) for f in batch.failures] == [(1, "invalid", "a black image")]


def test_every_file_that_the_readme_links_to_is_there():
    for link in re.findall(r"\]\(([\w./\-]+)\)", README):
        assert Path(ROOT / link).exists(), link
