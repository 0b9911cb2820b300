"""What code a dotted path is: which files count, and what of them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.rewards import RewardConfig
from tasks.source.code import code_of, digest_of
from tests.servers import ROOT, clean_env


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def modules(path: str) -> list[str]:
    return [module for module, _ in code_of(path)]


@pytest.mark.parametrize(
    "statement",
    [
        "import helper",
        "import helper as other, os",
        "from helper import *",
        "from helper import one, two as three",
        "def later():\n    import helper",
        "if True:\n    import helper",
        "try:\n    import helper\nexcept ImportError:\n    helper = None",
        "class Mine:\n    from helper import one",
        "import importlib\nhelper = importlib.import_module('helper')",
        "helper = __import__('helper')",
        "import helper; match = 1",
        "print 'a Python that this one cannot parse'\nimport helper",
        "print 'a Python that this one cannot parse'\nfrom helper import one",
    ],
)
def test_a_module_beside_a_users_counts_however_it_is_imported(folder, statement):
    (folder / "my_rewards.py").write_text(statement)
    (folder / "helper.py").write_text("one = two = 1\n")
    (folder / "not_imported.py").write_text("")
    assert modules("my_rewards.Mine") == ["helper", "my_rewards"]


@pytest.mark.parametrize(
    "statement",
    [
        "from . import levels",
        "from .levels import VALUE",
        "from ..rewards import levels",
        "from ..rewards.levels import VALUE",
        "import pack.rewards.levels",
        "from pack.rewards import levels as other",
        "from pack.rewards.levels import *",
        "import importlib\nlevels = importlib.import_module('.levels', __package__)",
    ],
)
def test_a_module_of_the_same_package_counts_with_the_packages_on_the_way(folder, statement):
    (folder / "pack" / "rewards").mkdir(parents=True)
    (folder / "pack" / "other").mkdir()
    for name in ("pack/__init__.py", "pack/rewards/__init__.py", "pack/other/__init__.py"):
        (folder / name).write_text("")
    (folder / "pack" / "rewards" / "mine.py").write_text(statement)
    (folder / "pack" / "rewards" / "levels.py").write_text("VALUE = 1\n")
    assert modules("pack.rewards.mine.Mine") == ["pack", "pack.rewards", "pack.rewards.levels", "pack.rewards.mine"]


def test_what_is_imported_counts_with_what_it_imports_in_turn_around_a_circle_too(folder):
    (folder / "my_rewards.py").write_text("import first")
    (folder / "first.py").write_text("import second")
    (folder / "second.py").write_text("import first, my_rewards, third.part")
    (folder / "third").mkdir()
    (folder / "third" / "__init__.py").write_text("from .more import one")
    (folder / "third" / "part.py").write_text("")
    (folder / "third" / "more.py").write_text("one = 1")
    found = ["first", "my_rewards", "second", "third", "third.more", "third.part"]
    assert modules("my_rewards.Mine") == found


def test_a_class_that_a_package_passes_on_counts_with_the_module_that_has_it(folder):
    (folder / "pack").mkdir()
    (folder / "pack" / "__init__.py").write_text("from pack.bright import Bright\n__all__ = ['Bright', 'listed']\n")
    (folder / "pack" / "bright.py").write_text("class Bright: ...\n")
    (folder / "pack" / "listed.py").write_text("")
    assert modules("pack.Bright") == ["pack", "pack.bright", "pack.listed"]


def test_a_package_without_an_init_is_one_too(folder):
    (folder / "loose" / "deep").mkdir(parents=True)
    (folder / "loose" / "deep" / "mine.py").write_text("from . import beside\nfrom loose import other\n")
    (folder / "loose" / "deep" / "beside.py").write_text("")
    (folder / "loose" / "other.py").write_text("")
    assert modules("loose.deep.mine.Mine") == ["loose.deep.beside", "loose.deep.mine", "loose.other"]


def test_libraries_and_this_package_do_not_count(folder):
    (folder / "my_rewards.py").write_text("import numpy, json, torch\nfrom workers import PointwiseRewardModel\n")
    assert modules("my_rewards.Mine") == ["my_rewards"]
    beside_the_rest = code_of("tests.reward_models.PixelCode")
    assert [m for m, _ in beside_the_rest if m.partition(".")[0] != "tests"] == []


def test_an_installed_package_is_its_own_modules_and_none_beside_it(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    (site / "installed").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(site))
    (site / "installed" / "__init__.py").write_text("import another, installed.part")
    (site / "installed" / "part.py").write_text("")
    (site / "another.py").write_text("")
    assert modules("installed.Mine") == ["installed", "installed.part"]


def test_the_hash_is_that_of_the_bytes_and_the_ends_of_lines_do_not_count(folder):
    file = folder / "my_rewards.py"
    file.write_bytes(b"one = 1\ntwo = 2\n")
    assert code_of("my_rewards.Mine") == (("my_rewards", hashlib.sha256(b"one = 1\ntwo = 2\n").hexdigest()[:16]),)
    before = code_of("my_rewards.Mine")
    file.write_bytes(b"one = 1\r\ntwo = 2\r\n")
    assert code_of("my_rewards.Mine") == before
    file.write_bytes(b"one = 1\ntwo = 3\n")
    assert code_of("my_rewards.Mine") != before


def test_a_source_that_is_not_there_is_unknown(folder):
    (folder / "empty").mkdir()
    for path in ("nowhere.Mine", "my.nowhere.Mine", "empty.Mine", "empty.part.Mine", "../my.Mine", "", "Mine"):
        assert code_of(path) == (), path
    assert digest_of(()) == ""


def test_another_process_reads_the_same_code_from_another_folder(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for place in (folder, elsewhere):
        (place / "my_rewards.py").write_text("import helper")
        (place / "helper.py").write_text("")
    command = [sys.executable, "-c", "from tasks.source.code import *; print(digest_of(code_of('my_rewards.Mine')))"]
    env = {**clean_env(), "PYTHONPATH": os.pathsep.join([str(ROOT), str(elsewhere)])}
    said = subprocess.run(command, env=env, cwd=elsewhere, capture_output=True, text=True, check=True).stdout
    assert said.strip() == digest_of(code_of("my_rewards.Mine"))


def spec_of(**entry):
    return RewardConfig.from_dict({"rewards": {"reward_model": "my_rewards.Mine", **entry}}).rewards[0]


def test_edited_code_is_another_computation_whatever_its_version_says(folder):
    (folder / "my_rewards.py").write_text("import helper")
    (folder / "helper.py").write_text("one = 1")
    before, raised = spec_of(version="1"), spec_of(version="2")
    assert spec_of(version="1").fingerprint == before.fingerprint
    (folder / "helper.py").write_text("one = 2")
    after = spec_of(version="1")
    assert len({before.fingerprint, raised.fingerprint, after.fingerprint}) == 3
    assert after.instance == before.instance, "a worker's process has one code: it keeps one model"
    assert raised.instance != before.instance
    assert before.for_launch("x") == before
    assert spec_of().for_launch("a").fingerprint != spec_of().for_launch("b").fingerprint


def test_built_ins_and_judges_and_servers_have_no_code_of_the_users():
    rewards = [
        {"reward_model": "OCR"},
        {"reward_model": "PickScore_Rank"},
        {"reward_model": "RemotePointwiseRewardModel", "server_url": "http://127.0.0.1:1"},
    ]
    for spec in RewardConfig.from_dict({"rewards": rewards}).rewards:
        assert (spec.code, spec.instance) == ((), spec.fingerprint)
