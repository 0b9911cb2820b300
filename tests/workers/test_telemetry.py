"""That nothing is sent to the makers of libraries: what is set, when, and what is left to whoever starts a process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT, clean_env
from workers.telemetry import TURNED_OFF

ASKED_WHILE_IMPORTED = """
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        variable = {"onnxruntime": "ORT_DISABLE_TELEMETRY", "huggingface_hub": "HF_HUB_DISABLE_TELEMETRY"}.get(fullname)
        if variable is not None:
            print(fullname, os.environ.get(variable))

sys.meta_path.insert(0, Watch())
"""
"""Prints how a library's telemetry is set when its import begins: onnxruntime reads the variable then and only then."""

TOO_EARLY = "import sys, types; sys.modules['onnxruntime'] = types.ModuleType('onnxruntime')\n"


def python(code: str, folder: Path | str = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in clean_env().items() if name not in TURNED_OFF}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**given, "PYTHONPATH": str(folder), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("module", "library"),
    [("workers.models.ocr", "onnxruntime"), ("workers, huggingface_hub", "huggingface_hub")],
)
def test_telemetry_is_off_before_a_reward_model_imports_its_libraries(module, library):
    assert f"{library} 1" in python(f"{ASKED_WHILE_IMPORTED}\nimport {module}").stdout.splitlines()


def test_what_is_set_where_the_process_is_started_stays():
    code = "import os, workers; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    assert python(code, ORT_DISABLE_TELEMETRY="0").stdout.split() == ["0", "1"]


def test_a_trainers_environment_is_left_alone():
    code = f"import os, trainer_client; print(sorted({set(TURNED_OFF)!r} & set(os.environ)))"
    assert python(code).stdout.strip() == "[]"


def test_a_reward_server_that_stands_alone_turns_it_off_too(tmp_path):
    shutil.copy(ROOT / "workers" / "server.py", tmp_path / "reward_server.py")
    code = f"{ASKED_WHILE_IMPORTED}\nimport reward_server, onnxruntime"
    assert "onnxruntime 1" in python(code, tmp_path).stdout.splitlines()


@pytest.mark.parametrize("module", ["workers", "workers.server"])
def test_a_process_that_imported_onnxruntime_before_us_is_told(module):
    assert "set ORT_DISABLE_TELEMETRY=1 where the process is started" in python(f"{TOO_EARLY}import {module}").stderr
    assert python(f"{TOO_EARLY}import {module}", ORT_DISABLE_TELEMETRY="1").stderr == ""


def test_images_and_the_judges_script_turn_it_off():
    image = (ROOT / "docker" / "Dockerfile").read_text().partition("\nFROM base AS source")[0]
    for name, value in TURNED_OFF.items():
        assert f"{name}={value}" in image
    assert "export VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}" in (ROOT / "docker/start_vllm_judge.sh").read_text()
