"""An editable install as a user makes it: mypy finds the types from any folder, and our tests are not on the path."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT, clean_env

SCRIPT = """
from rewardq import PointwiseRewardModel, RewardClient, Sample
from trainer_client import RewardClient as Same

reveal_type(Sample)
reveal_type(RewardClient.collect)
wrong: Same = 3
"""


@pytest.mark.system  # pip fetches setuptools for the build
@pytest.mark.timeout(300)
def test_mypy_finds_an_editable_install_from_any_folder(tmp_path):
    checkout, folder = tmp_path / "checkout", tmp_path / "empty"
    ignored = shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache", "*.egg-info", "build")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=ignored)
    folder.mkdir()
    env = {name: value for name, value in clean_env().items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-e", checkout]
    subprocess.run(install, check=True, env=env, cwd=folder)
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--python-executable", python, "script.py"]
    found = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False).stdout
    assert "tasks.samples.Sample" in found
    assert "trainer_client.results.RewardBatch" in found
    assert 'variable has type "RewardClient"' in found
    assert "Found 1 error in 1 file" in found, found
    for name in ("tests", "benchmarks", "examples"):
        code = f"import importlib.util as u; print(u.find_spec({name!r}))"
        done = subprocess.run([python, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "None"
    assert Path(checkout / "src" / "tasks").is_symlink()
