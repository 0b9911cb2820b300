"""`examples/environments`: two environments whose packages conflict, a worker in each, one run that uses both."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageColor

from tests.servers import ROOT, clean_env

FOLDER = ROOT / "examples" / "environments"
OF_OTHER_REWARDS = {
    "torch",
    "transformers",
    "openai",
    "httpx2",
    "httpx",
    "fastapi",
    "uvicorn",
    "rapidocr",
    "onnxruntime",
}

COLOURS = [(255, 0, 0), (0, 0, 128), (200, 180, 60)]
NAMED = {"a red door": (255, 0, 0), "a navy door": (0, 0, 128)}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """rewardq as it is installed, built from a copy: a build leaves files behind."""
    source = tmp_path / "source"
    for name in ("src", "rewardq", "tasks", "workers", "trainer_client"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, env=clean_env(), check=True, capture_output=True)
    (built,) = tmp_path.glob("rewardq-*.whl")
    return built


def run_in(folder: Path, *command: str, **env: str) -> str:
    """What a command prints. At its time limit whatever it started ends with it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env={**clean_env(), **env}, start_new_session=True, **pipes)
    try:
        said, problems = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said + problems
    return said


def closeness(prompt: str, colour: tuple[int, ...]) -> float:
    return 1 - float(np.abs(np.subtract(colour, NAMED[prompt])).mean()) / 255


def nearness(prompt: str, colour: tuple[int, ...]) -> float:
    """By Pillow's table of colours, which has one of CSS 4 besides those of CSS 3."""
    known = np.array([ImageColor.getrgb(name) for name in ImageColor.colormap if name != "rebeccapurple"])
    distances = ((known - np.array(colour)) ** 2).sum(1)
    return 1 / (1 + int((distances < ((np.subtract(NAMED[prompt], colour)) ** 2).sum()).sum()))


@pytest.mark.timeout(400)  # two environments are made and filled by pip
def test_one_run_uses_two_environments_whose_packages_conflict(redis_url, wheel, tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "example", ignore=shutil.ignore_patterns(".venvs", "__pycache__"))
    said = run_in(folder, "./run.sh", str(wheel), PYTHON=sys.executable, REWARDQ_BROKER_URL=redis_url)
    lines = re.findall(r"^(\w+) +(a \w+ door) +\[(.*?)\] +([\d.]+)  webcolors (\d+)\.", said, re.MULTILINE)
    found = {(n, p, tuple(map(int, c.split()))): (float(r), int(v)) for n, p, c, r, v in lines}
    assert len(lines) == len(found) == 12, said
    for (name, prompt, colour), (reward, webcolors) in found.items():
        assert (webcolors < 24) == (name == "closeness")
        expected = closeness(prompt, colour) if name == "closeness" else nearness(prompt, colour)
        assert reward == pytest.approx(expected, abs=1e-4)
    assert {colour for _, _, colour in found} == set(COLOURS)

    for name, own, other in (("old", "old_colours", "new_colours"), ("new", "new_colours", "old_colours")):
        python = f".venvs/{name}/bin/python"
        installed = run_in(folder, python, "-m", "pip", "list", "--format=freeze", PIP_DISABLE_PIP_VERSION_CHECK="1")
        packages = {line.partition("==")[0].lower() for line in installed.split()}
        assert {"rewardq", "webcolors"} <= packages
        assert packages & OF_OTHER_REWARDS == set()
        run_in(folder, python, "-c", f"import {own}")
        with pytest.raises(AssertionError, match="cannot import name"):
            run_in(folder, python, "-c", f"import {other}")
