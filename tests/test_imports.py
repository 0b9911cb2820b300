"""What imports what, and what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT, clean_env

HEAVY = {
    "torch",
    "torchvision",
    "transformers",
    "open_clip",
    "openai",
    "onnxruntime",
    "rapidocr",
    "cv2",
    "fastapi",
    "httpx2",
}


def imported_by(file: Path) -> set[str]:
    """Names of the modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found.add(node.module)
    return found


def packages_imported_by(package: str) -> dict[str, set[str]]:
    """For each file of a package, the top-level names that it imports."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return {str(f.relative_to(ROOT)): {name.partition(".")[0] for name in imported_by(f)} for f in files}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("tasks", {"workers", "trainer_client"}), ("workers", {"trainer_client"}), ("trainer_client", {"workers"})],
)
def test_the_arrows_point_to_tasks(package, forbidden):
    wrong = {file: names & forbidden for file, names in packages_imported_by(package).items() if names & forbidden}
    assert wrong == {}


def test_the_contract_imports_nothing_heavy_even_within_functions():
    allowed = {"tasks/media.py": {"torch"}}  # gives workers tensors, where torch is there by necessity
    wrong = {file: names & HEAVY - allowed.get(file, set()) for file, names in packages_imported_by("tasks").items()}
    assert {file: names for file, names in wrong.items() if names} == {}


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**clean_env(), "PYTHONPATH": f"{cwd}:{ROOT}"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["trainer_client", "tasks", "trainer_client.cli"])
def test_a_trainer_loads_nothing_heavy(package, tmp_path):
    done = run_python("-X", "importtime", "-c", f"import {package}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, flags=re.MULTILINE))
    assert "tasks.settings" in loaded
    assert {name for name in loaded if name.partition(".")[0] in HEAVY} == set()


@pytest.mark.parametrize("package", ["trainer_client", "workers"])
def test_an_import_raises_no_warning(package, tmp_path):
    done = run_python("-W", "error", "-c", f"import {package}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("package", ["trainer_client", "workers"])
@pytest.mark.parametrize("shadow", ["tasks.py", "tasks/__init__.py"])
def test_a_module_of_the_users_under_our_name_is_named(package, shadow, tmp_path):
    file = tmp_path / shadow
    file.parent.mkdir(exist_ok=True)
    file.write_text("def my_own_tasks():\n    return []\n")
    done = run_python("-c", f"import {package}", cwd=tmp_path)
    assert done.returncode != 0
    assert "ImportError" in done.stderr.splitlines()[-1]
    assert str(file) in done.stderr.splitlines()[-1]
    assert "rename" in done.stderr.splitlines()[-1]


def test_a_checkout_behind_a_link_shadows_nothing(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(ROOT)
    code = f"import sys; sys.path.insert(0, {str(link / '.')!r}); import tasks; sys.path.pop(0); import workers"
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_wrong_variable_is_said_at_import_in_one_line(tmp_path):
    env = {**clean_env(), "PYTHONPATH": str(ROOT), "REWARDQ_BROKER": "redis://localhost"}
    command = [sys.executable, "-c", "import trainer_client"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "unknown variable REWARDQ_BROKER (did you mean 'REWARDQ_BROKER_URL'?)" in done.stderr.splitlines()[-1]


def test_worker_modules_load_heavy_libraries_only_where_a_model_needs_them(tmp_path):
    code = "import workers.serving, tasks.score, sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & HEAVY == set()
