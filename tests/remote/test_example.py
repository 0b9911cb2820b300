"""`examples/remote_server`, as its README says: the server, a worker, a step."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml

from tasks.rewards import RewardConfig
from tests.remote.conftest import post
from tests.remote.test_server import picture, png
from tests.servers import ROOT, run_python, worker_env

FOLDER = ROOT / "examples" / "remote_server"
PORT = "127.0.0.1:8000"


def test_the_step_prints_the_rewards_and_what_the_server_said(settings, workers, server_process, tmp_path):
    server = server_process(FOLDER / "example_server.py")
    rewards = (FOLDER / "rewards.yaml").read_text()
    assert rewards.count(PORT) == 1
    (tmp_path / "rewards.yaml").write_text(rewards.replace(PORT, f"127.0.0.1:{server.port}"))
    (tmp_path / "score.py").write_text((FOLDER / "score.py").read_text())
    workers("vlm")
    done = run_python("score.py", cwd=tmp_path, env=worker_env(settings, {}))
    lines = re.findall(r"^(a .*?door) +\((\d+), (\d+), (\d+)\) +(.*)$", done.stdout, re.MULTILINE)
    assert len(lines) == 12
    colours = {"a red door": (255, 0, 0), "a blue door": (0, 0, 255)}
    for prompt, red, green, blue, said in lines:
        if prompt == "a door":
            assert said == f"{server.url}: ValueError: no colour is named in 'a door'"
        else:
            away = np.abs(np.subtract((int(red), int(green), int(blue)), colours[prompt])).mean()
            assert float(said) == pytest.approx(1 - away / 255, abs=1e-4)


def test_its_commented_keys_are_right_too(tmp_path):
    text = (FOLDER / "rewards.yaml").read_text()
    (tmp_path / "rewards.yaml").write_text(re.sub(r"^    # (\w+:)", r"    \1", text, flags=re.MULTILINE))
    plain, full = (RewardConfig.from_yaml(path) for path in (FOLDER / "rewards.yaml", tmp_path / "rewards.yaml"))
    assert (plain.rewards[0].version, full.rewards[0].version) == ("", "1")
    assert full.rewards[0].fields == ("prompt", "image", "condition_images", "metadata")


def blocks(language: str) -> list[str]:
    """The code of a language in the page about remote rewards."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / "docs" / "remote.md").read_text(), re.MULTILINE | re.DOTALL
    )


def test_the_pages_rewards_load_and_its_server_runs(server_process, tmp_path):
    queued, served = (RewardConfig.from_dict(yaml.safe_load(block)).rewards[0] for block in blocks("yaml"))
    assert (queued.reward_model, queued.queue) == ("old_ocr.Signs", "old_ocr")
    assert (served.queue, served.fields) == ("vlm", ("prompt", "image", "metadata"))

    copy, _ = next(b for b in blocks("sh") if b.startswith("cp ")).splitlines()
    (python,) = re.findall(r"python -c '(.*?)'", copy)
    found = subprocess.run([sys.executable, "-c", python], cwd=tmp_path, capture_output=True, text=True, check=True)
    shutil.copy(found.stdout.strip(), tmp_path / "reward_server.py")
    (server,) = blocks("python")
    model = "class Model:\n    def score(self, text, image):\n        return len(text)\n\n\nload_my_model = Model\n"
    port = "import sys\nport = int(sys.argv[2])\n"
    (tmp_path / "my_server.py").write_text(port + model + server.replace("port=8000", "port=port"))
    url = server_process(tmp_path / "my_server.py").url
    assert post(f"{url}/compute", {"prompt": ["ab"], "image": [png(picture(0))]})[1] == {"rewards": [2.0]}
