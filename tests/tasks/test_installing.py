from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT, clean_env

METADATA = """Metadata-Version: 2.4
Name: rewardq
Version: 9.9
Requires-Dist: numpy>=1
Provides-Extra: judge
Requires-Dist: openai>=1.60; extra == "judge"
Provides-Extra: server
Requires-Dist: fastapi>=0.115; extra == "server"
Requires-Dist: uvicorn>=0.30; extra == "server"
Provides-Extra: demo
Requires-Dist: rewardq[judge,server]; extra == "demo"
"""


@pytest.fixture
def command_of(tmp_path):
    """The command that is named for an extra where the package was installed as its direct_url.json says (PEP 610)."""

    def words(origin: dict | None, extra: str = "judge") -> list[str]:
        info = tmp_path / "site" / "rewardq-9.9.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(METADATA)
        if origin is not None:
            (info / "direct_url.json").write_text(json.dumps(origin))
        code = f"from tasks.errors import MissingExtraError as E; print(str(E('it', 'm', {extra!r})).split(': ', 1)[1])"
        path = f"{tmp_path / 'site'}:{ROOT}"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**clean_env(), "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        return shlex.split(done.stdout)

    return words


def test_the_command_is_for_the_environment_of_this_interpreter_and_the_checkout_that_it_has(command_of):
    words = command_of({"url": ROOT.as_uri(), "dir_info": {"editable": True}})
    assert words == [sys.executable, "-m", "pip", "install", "-e", f"{ROOT}[judge]"]


def test_a_folder_with_a_space_is_one_word_of_the_command(command_of, tmp_path):
    folder = tmp_path / "my checkout"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    words = command_of({"url": folder.as_uri(), "dir_info": {"editable": True}})
    assert words[4:] == ["-e", f"{folder}[judge]"]
    assert command_of({"url": folder.as_uri(), "dir_info": {}})[4:] == [f"{folder}[judge]"]


@pytest.mark.parametrize(
    ("origin", "requirement"),
    [
        (
            {"url": "https://git.example/r.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "rewardq[judge] @ git+https://git.example/r.git@abc",
        ),
        (
            {"url": "https://git.example/r.git", "subdirectory": "q", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "rewardq[judge] @ git+https://git.example/r.git@abc#subdirectory=q",
        ),
        (
            {"url": "https://files.example/rewardq-9.9.whl", "archive_info": {}},
            "rewardq[judge] @ https://files.example/rewardq-9.9.whl",
        ),
    ],
)
def test_a_repository_or_an_archive_is_named_as_it_was_installed(command_of, origin, requirement):
    assert command_of(origin)[4:] == [requirement]


def test_a_repository_on_this_disk_is_no_requirement_for_older_pips(command_of):
    origin = {"url": "file:///my/clone", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    assert command_of(origin)[4:] == ["openai>=1.60"]


def test_a_wheel_that_is_still_there_is_named(command_of, tmp_path):
    wheel = tmp_path / "rewardq-9.9-py3-none-any.whl"
    wheel.touch()
    assert command_of({"url": wheel.as_uri(), "archive_info": {}})[4:] == [f"{wheel}[judge]"]


@pytest.mark.parametrize("kind", [{"dir_info": {"editable": True}}, {"dir_info": {}}, {"archive_info": {}}])
def test_where_the_source_is_gone_the_packages_of_the_extra_are_named(command_of, kind):
    # So it is in a container: what the image was built from is not in it.
    origin = {"url": "file:///src/gone", **kind}
    assert command_of(origin)[4:] == ["openai>=1.60"]
    assert sorted(command_of(origin, "demo")[4:]) == ["fastapi>=0.115", "openai>=1.60", "uvicorn>=0.30"]


def test_a_checkout_that_is_only_on_the_path_names_itself(tmp_path):
    # Without site-packages `tasks` itself cannot be imported, so its module is loaded alone.
    code = (
        "import importlib.util as u; "
        f"s = u.spec_from_file_location('installing', {str(ROOT / 'tasks' / 'installing.py')!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.install_command('ocr'))"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shlex.split(done.stdout)[-2:] == ["-e", f"{ROOT}[ocr]"]


def test_no_page_and_no_message_names_the_package_of_an_index_that_it_is_not_on():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]
    sources = [f for p in ("tasks", "workers", "trainer_client") for f in (ROOT / p).rglob("*.py")]
    for file in (*pages, *(ROOT / "docker").glob("*.md"), *sources):
        for line in Path(file).read_text().splitlines():
            assert "pip install 'rewardq[" not in line, f"{file}: {line}"
            assert "pip install rewardq" not in line, f"{file}: {line}"
