"""What the Dockerfile's images hold: its install lines, run or resolved in plain virtual environments."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.conftest import DOCKER
from tests.servers import ROOT

HEAVY = {"torch", "transformers", "open-clip-torch", "open_clip_torch", "onnxruntime"}


def test_images_are_pinned_and_not_root():
    text = (DOCKER / "Dockerfile").read_text()
    bases = [line.split()[1] for line in text.splitlines() if line.startswith("FROM")]
    stages = set(re.findall(r"AS (\S+)", text))
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in bases if base not in stages)
    for role in ("gpu", "vlm", "flower"):
        stage = text.split(f" AS {role}\n")[1].split("\nFROM")[0]
        assert "USER rewardq" in stage


def install_lines(role: str) -> list[list[str]]:
    """The words of each `pip install` in the stage that builds a role's environment: its packages, then rewardq."""
    stage = (DOCKER / "Dockerfile").read_text().split(f" AS {role}-build\n")[1].split("\nFROM")[0]
    locked, ours = (shlex.split(line) for line in re.findall(r"RUN (pip install .*)", stage))
    assert {"--require-hashes", f"docker/locks/{role}.txt"} <= set(locked)
    assert {"--no-deps", "--no-build-isolation"} <= set(ours), "nothing is installed beside the lock"
    return [locked, ours]


ENV = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What the Dockerfile copies."""
    for name in ("src", "rewardq", "tasks", "workers", "trainer_client"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tmp_path / "src" / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "src" / name)
    shutil.copytree(DOCKER / "locks", tmp_path / "src" / "docker" / "locks")
    return tmp_path / "src"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an empty environment."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    return tmp_path / "env" / "bin" / "python"


@pytest.mark.system
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("role", "needs"),
    [("vlm", "import openai, workers.judges.judge, workers.remote.models, tasks"), ("flower", "import flower, tasks")],
)
def test_the_images_of_those_who_compute_nothing_hold_no_torch(role, needs, source, python, tmp_path):
    for line in install_lines(role):
        words = ["-m", *line, "--quiet", "--disable-pip-version-check"]
        subprocess.run([python, *words], cwd=source, check=True, env=ENV)
    subprocess.run([python, "-c", needs], cwd=tmp_path, check=True, env=ENV)
    listed = json.loads(subprocess.check_output([python, "-m", "pip", "list", "--format=json"], env=ENV))
    assert not HEAVY & {p["name"].lower() for p in listed}
    subprocess.run([python, "-m", "pip", "check"], check=True, env=ENV)
    assert (python.parent / "celery").exists()
    assert (python.parent / "rewardq").exists()


@pytest.mark.system
@pytest.mark.timeout(600)
def test_what_the_gpu_image_installs_can_be_found(source, python, tmp_path):
    report = tmp_path / "report.json"
    locked, _ = install_lines("gpu")
    words = [w for w in locked if w != "--no-cache-dir"]  # of the image; here wheels are needed again
    words = ["-m", *words, "--dry-run", "--quiet", "--disable-pip-version-check", "--report", report]
    subprocess.run([python, *words], cwd=source, check=True, env=ENV)
    found = {p["metadata"]["name"].lower() for p in json.loads(report.read_text())["install"]}
    assert {"torch", "torchvision", "transformers", "open_clip_torch", "rapidocr", "onnxruntime"} <= found
    assert {"celery", "redis", "pillow"} <= found
