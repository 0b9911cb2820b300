"""What imports what, and what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rewardq
import tasks
import tasks.errors
import tasks.rewards
import trainer_client
import workers
from tasks.errors import RewardError
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
    [
        ("tasks", {"workers", "trainer_client", "rewardq"}),
        ("workers", {"trainer_client", "rewardq"}),
        ("trainer_client", {"workers", "rewardq"}),
    ],
)
def test_the_arrows_point_to_tasks(package, forbidden):
    wrong = {file: names & forbidden for file, names in packages_imported_by(package).items() if names & forbidden}
    assert wrong == {}


def test_the_contract_imports_nothing_heavy_even_within_functions():
    allowed = {"tasks/media/decode.py": {"torch"}}  # gives workers tensors, where torch is there by necessity
    wrong = {file: names & HEAVY - allowed.get(file, set()) for file, names in packages_imported_by("tasks").items()}
    assert {file: names for file, names in wrong.items() if names} == {}


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**clean_env(), "PYTHONPATH": f"{cwd}:{ROOT}"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["trainer_client", "tasks.celery_app", "trainer_client.cli"])
def test_a_trainer_loads_nothing_heavy(package, tmp_path):
    done = run_python("-X", "importtime", "-c", f"import {package}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, flags=re.MULTILINE))
    assert "tasks.settings" in loaded
    assert {name for name in loaded if name.partition(".")[0] in HEAVY} == set()


def test_the_facade_has_each_name_of_the_package_that_owns_it():
    owners = {
        trainer_client: ("RewardClient", "RewardBatch", "Ticket", "Failed", "Sample"),
        workers: ("PointwiseRewardModel", "GroupwiseRewardModel", "RewardModelOutput", "Unscored", "RewardArguments"),
        tasks: ("__version__",),
        tasks.errors: [n for n, v in vars(tasks.errors).items() if isinstance(v, type) and issubclass(v, RewardError)],
        tasks.rewards: ("RewardConfig",),
    }
    for owner, names in owners.items():
        for name in names:
            assert name in rewardq.__all__, f"add {name} to rewardq/__init__.py"
            assert getattr(rewardq, name) is getattr(owner, name)
    assert [name for name in rewardq.__all__ if not hasattr(rewardq, name)] == []
    assert dir(rewardq) == sorted(rewardq.__all__)
    with pytest.raises(AttributeError, match="'rewardq' has no attribute 'RewardClints'"):
        _ = rewardq.RewardClints


@pytest.mark.parametrize(
    ("names", "not_loaded"),
    [
        ("RewardClient, Sample, RewardBatch, ScoringError, __version__", {"workers"}),
        ("PointwiseRewardModel, RewardModelOutput, Unscored", {"trainer_client"}),
    ],
)
def test_the_facade_loads_only_the_side_that_is_asked_for(names, not_loaded, tmp_path):
    code = f"from rewardq import {names}; import sys; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = run_python("-W", "error", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & (HEAVY | not_loaded) == set()


@pytest.mark.parametrize("name", ["RewardClient", "Sample", "PointwiseRewardModel", "ScoringError"])
@pytest.mark.parametrize("shadow", ["tasks.py", "tasks/__init__.py"])
def test_the_facade_names_a_module_of_the_users_under_our_name(name, shadow, tmp_path):
    file = tmp_path / shadow
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    done = run_python("-c", f"from rewardq import {name}", cwd=tmp_path)
    assert done.returncode != 0
    assert "ImportError" in done.stderr.splitlines()[-1]
    assert str(file) in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("name", "package"), [("RewardClient", "trainer_client"), ("Unscored", "workers")])
def test_the_facade_does_not_run_what_it_finds_under_our_name(name, package, tmp_path):
    file = tmp_path / f"{package}.py"
    file.write_text("raise RuntimeError('a script of mine')")
    done = run_python("-c", f"from rewardq import {name}", cwd=tmp_path)
    assert f"ImportError: the module `{package}` imported here is {file}, " in done.stderr
    assert "a script of mine" not in done.stderr


def test_an_editable_install_puts_the_packages_on_the_path_and_nothing_else():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tops = {name for name in config["packages"] if "." not in name}
    links = {path.name: path.resolve() for path in (ROOT / "src").iterdir() if not path.name.endswith(".egg-info")}
    assert links == {name: ROOT / name for name in tops}
    assert config["package-dir"] == {"": "src"}
    assert all((ROOT / name / "py.typed").exists() for name in tops)
    found = {".".join(f.parent.relative_to(ROOT).parts) for name in tops for f in (ROOT / name).rglob("__init__.py")}
    assert found == set(config["packages"])


@pytest.mark.parametrize("package", ["trainer_client", "workers", "rewardq"])
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


def test_an_error_class_is_had_without_the_app_and_whatever_the_variables_say(tmp_path):
    env = {**clean_env(), "PYTHONPATH": str(ROOT), "REWARDQ_BROKER": "redis://localhost"}
    command = [sys.executable, "-c", "from tasks.errors import RewardError; import sys; print(*sorted(sys.modules))"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"celery", "pydantic", "tasks.celery_app", "tasks.settings"}.isdisjoint(done.stdout.split())


def test_the_app_is_an_attribute_of_tasks_that_is_built_at_its_first_use(tmp_path):
    code = "import sys, tasks; print('celery' in sys.modules, tasks.app.main, tasks.app is tasks.celery_app.app)"
    done = run_python("-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("False rewardq True\n", "")
    with pytest.raises(AttributeError, match="module 'tasks' has no attribute 'apps'"):
        _ = tasks.apps


def test_worker_modules_load_heavy_libraries_only_where_a_model_needs_them(tmp_path):
    modules = "workers.process.startup, workers.scoring.chunk, sys"
    code = f"import {modules}; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & HEAVY == set()
