"""The server's one file by itself: it runs on Python 3.9 and where nothing else of rewardq is."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from tests.remote.conftest import post
from tests.remote.test_server import picture, png
from tests.servers import ROOT
from tests.test_imports import imported_by, run_python

SERVER = ROOT / "workers" / "server.py"
EXAMPLE = ROOT / "examples" / "remote_server" / "example_server.py"

NEWER = {
    "a match": "match 1:\n    case 1:\n        pass\n",
    "a union at run time": "isinstance(1, int | str)\n",
    "zip strict": "print(list(zip([1], [2], strict=True)))\n",
    "a later module": "import tomllib\n",
    "a later function": "import asyncio\nasyncio.timeout(1)\n",
}


def run_tool(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def too_new_for_39(file: Path) -> list[str]:
    """What Python 3.9 has not in a file: its syntax, what it uses of the library, a union where it is evaluated."""
    said = run_tool("-m", "ruff", "check", "--isolated", "--target-version=py39", "--select=F,FA102", str(file))
    found = [] if said == "All checks passed!\n" else [said]
    said = run_tool("-c", "import vermin; vermin.main()", "--no-tips", "-v", str(file))
    oldest = re.search(r"Minimum required versions:.*?3\.(\d+)|~3", said)
    found += [] if oldest and int(oldest[1] or 0) <= 9 else [said]
    tree = ast.parse(file.read_text())
    hints = [getattr(node, name, None) for node in ast.walk(tree) for name in ("annotation", "returns")]
    in_hints = {part for hint in hints if hint is not None for part in ast.walk(hint)}
    evaluated = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and node not in in_hints]
    return found + [f"line {node.lineno}: |" for node in evaluated if isinstance(node.op, ast.BitOr)]


@pytest.mark.parametrize("file", [SERVER, EXAMPLE], ids=lambda file: file.name)
def test_nothing_in_it_is_newer_than_python_39(file):
    assert too_new_for_39(file) == []


@pytest.mark.parametrize("what", NEWER)
def test_the_check_finds_what_is_newer(tmp_path, what):
    (tmp_path / "newer.py").write_text(NEWER[what])
    assert len(too_new_for_39(tmp_path / "newer.py")) > 0


def test_it_imports_five_packages_at_most():
    outside = {name.partition(".")[0] for name in imported_by(SERVER)} - sys.stdlib_module_names
    assert outside <= {"fastapi", "uvicorn", "PIL", "numpy", "msgpack"}


def test_its_import_loads_nothing_heavy(tmp_path):
    shutil.copy(SERVER, tmp_path / "reward_server.py")
    code = "import reward_server, sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & {"torch", "celery", "redis", "tasks", "workers", "openai", "httpx2"} == set()


def test_a_copy_beside_the_example_serves_where_rewardq_is_not(server_process, tmp_path):
    shutil.copy(SERVER, tmp_path / "reward_server.py")
    shutil.copy(EXAMPLE, tmp_path)
    packages = sysconfig.get_path("purelib")
    # without `site`, so that the editable install of rewardq is not found
    code = "import importlib.util as u; print([u.find_spec(n) for n in ('tasks', 'workers', 'trainer_client')])"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": packages}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[None, None, None]"
    server = server_process(tmp_path / "example_server.py", python_path=packages, flags=("-S",))
    images = [picture(n) for n in range(3)]
    prompts = ["a red door", "a Blue door", "a white wall, red"]
    status, answer, _ = post(f"{server.url}/compute", {"prompt": prompts, "image": [png(one) for one in images]})
    assert status == 200
    for found, pixels, colour in zip(
        answer["rewards"], images, ((255, 0, 0), (0, 0, 255), (255, 255, 255)), strict=True
    ):
        assert found == pytest.approx(1 - np.abs(pixels.astype(float) - colour).mean() / 255, abs=1e-9)
    status, answer, _ = post(f"{server.url}/compute", {"prompt": ["a door"], "image": [png(images[0])]})
    assert (status, answer["errors"]) == (500, {"0": "ValueError: no colour is named in 'a door'"})
    assert server.stop() == 0
