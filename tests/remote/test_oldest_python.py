"""The server on the oldest Python at hand, installed and started by the documented commands."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.remote.conftest import ServerProcess, post
from tests.remote.test_one_file import EXAMPLE, SERVER
from tests.remote.test_server import picture, png
from tests.servers import ROOT, clean_env

OLDEST_MINOR, NEWEST_MINOR = 9, 13
SAY_WHO = "import ensurepip, sys, venv; print(sys.version_info[1], sys.executable)"


def said_by(command: list[str], **env: str) -> str:
    """What a command prints; nothing if there is none or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, env={**clean_env(), **env}, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def oldest_python() -> tuple[int, str]:
    """The minor version and the file of the oldest Python 3.9 or newer on the PATH, pyenv's versions included."""
    versions = said_by(["pyenv", "versions", "--bare"]).split()
    for minor in range(OLDEST_MINOR, NEWEST_MINOR + 1):
        shims = [{"PYENV_VERSION": version} for version in versions if version.startswith(f"3.{minor}.")]
        for env in ({}, *shims):  # a shim runs only versions that are chosen
            found, _, executable = said_by([f"python3.{minor}", "-c", SAY_WHO], **env).partition(" ")
            if found == str(minor):
                return minor, executable
    raise AssertionError("no Python is on the PATH under its name python3.N")


def documented_install() -> list[str]:
    """The words after `pip` with which docs/remote.md installs what the server needs."""
    (line,) = re.findall(r"^old_env/bin/pip (install .*)$", (ROOT / "docs" / "remote.md").read_text(), re.MULTILINE)
    return line.split()


@pytest.mark.system
@pytest.mark.timeout(400)
def test_the_server_runs_on_the_oldest_python_at_hand_with_what_the_page_installs(tmp_path: Path, capsys):
    minor, executable = oldest_python()
    with capsys.disabled():
        print(f"\nthe oldest Python at hand is 3.{minor}")
    subprocess.run([executable, "-m", "venv", "old_env"], cwd=tmp_path, check=True)
    python = tmp_path / "old_env" / "bin" / "python"
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *documented_install()], cwd=tmp_path, check=True, env=clean_env())
    shutil.copy(SERVER, tmp_path / "reward_server.py")
    shutil.copy(EXAMPLE, tmp_path)
    server = ServerProcess(tmp_path / "example_server.py", tmp_path, "", (), python=str(python))
    try:
        images = [picture(n) for n in range(2)]
        body = {"prompt": ["a red door", "a door"], "image": [png(one) for one in images]}
        status, answer, _ = post(f"{server.url}/compute", body)
        away = abs(images[0].astype(float) - (255, 0, 0)).mean()
        assert (status, answer["rewards"]) == (500, [pytest.approx(1 - away / 255, abs=1e-9), None])
        assert answer["errors"] == {"1": "ValueError: no colour is named in 'a door'"}
        assert post(f"{server.url}/compute", {"prompt": ["a red door"], "image": ["x"]})[0] == 422
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()
        assert server.log.read_text().rstrip().endswith("stopped")
    finally:
        server.kill()
        print(server.log.read_text())
