from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docker" / "start_vllm_judge.sh"


@pytest.fixture
def fake_vllm(tmp_path):
    """A command that prints its arguments, one a line."""
    path = tmp_path / "bin with a space" / "fake-vllm"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    path.chmod(0o755)
    return path


def started(vllm: Path, *arguments: str, **env: str) -> dict[str, str]:
    """What the command was given: `serve` and the model, then values by option; the rest under ''."""
    run = subprocess.run(
        [SCRIPT, *arguments],
        env={"PATH": os.environ["PATH"], "VLLM_BIN": str(vllm), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    verb, model, *rest = run.stdout.splitlines()
    assert verb == "serve"
    options = dict(zip(rest[:12:2], rest[1:12:2], strict=True))
    return {"model": model, **options, "": " ".join(rest[12:])}


def test_by_default_it_serves_the_t2i_judge_on_one_gpu(fake_vllm):
    assert started(fake_vllm) == {
        "model": "TIGER-Lab/RationalRewards-8B-T2I",
        "--served-model-name": "RationalRewards-8B-T2I",
        "--host": "127.0.0.1",
        "--port": "8000",
        "--tensor-parallel-size": "1",
        "--data-parallel-size": "1",
        "--gpu-memory-utilization": "0.9",
        "": "",
    }


def test_every_variable_reaches_vllm(fake_vllm):
    found = started(
        fake_vllm,
        MODEL_PATH="/models/my judge/",
        SERVED_MODEL_NAME="strict",
        HOST="0.0.0.0",
        PORT="9001",
        TENSOR_PARALLEL_SIZE="2",
        DATA_PARALLEL_SIZE="3",
        GPU_MEMORY_UTILIZATION="0.5",
        CUDA_VISIBLE_DEVICES="0,1,2,3",
    )
    assert list(found.values()) == ["/models/my judge/", "strict", "0.0.0.0", "9001", "2", "3", "0.5", ""]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("TIGER-Lab/RationalRewards-8B-Edit", "RationalRewards-8B-Edit"),
        ("/data/judge/", "judge"),
        ("judge", "judge"),
    ],
)
def test_the_served_name_is_the_last_part_of_the_path(fake_vllm, path, name):
    assert started(fake_vllm, MODEL_PATH=path)["--served-model-name"] == name


@pytest.mark.parametrize(
    ("devices", "tensor_parallel", "copies"),
    [("0", "1", "1"), ("0,1", "1", "2"), ("2,3,5,7", "1", "4"), ("0,1,2,3", "2", "2"), ("0", "2", "1"), ("", "1", "1")],
)
def test_there_is_a_copy_for_each_visible_gpu(fake_vllm, devices, tensor_parallel, copies):
    found = started(fake_vllm, CUDA_VISIBLE_DEVICES=devices, TENSOR_PARALLEL_SIZE=tensor_parallel)
    assert found["--data-parallel-size"] == copies


def test_further_arguments_are_passed_on(fake_vllm):
    found = started(fake_vllm, "--max-model-len", "8192", "--chat-template", "a b.jinja")
    assert found[""] == "--max-model-len 8192 --chat-template a b.jinja"


def test_a_missing_vllm_is_said():
    env = {"PATH": os.environ["PATH"], "VLLM_BIN": "no-such-vllm"}
    run = subprocess.run([SCRIPT], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 127
    assert "no command no-such-vllm" in run.stderr
