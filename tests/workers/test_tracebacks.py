"""What a class of the user's raises: the place in their own code, and a traceback in the log, once in a while."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap

import pytest

from tasks.errors import ModelLoadError
from tasks.settings import load_settings
from tests.servers import ROOT
from tests.workers.requests import Requests, call_of, iter_run
from workers.loading import tracebacks as module
from workers.loading.cache import ModelCache
from workers.loading.tracebacks import REPEAT_S, TracebackLog

REWARDS = """\
import json
from workers import PointwiseRewardModel, RewardModelOutput


class Base(PointwiseRewardModel):
    required_fields = ("prompt",)

    def __call__(self, prompt, **kwargs):
        return [self.one(text) for text in prompt]


def helper(text):
    return 1 / (len(text) - 1)


class Divides(Base):
    def one(self, text):
        return helper(text)


class Parses(Base):
    def one(self, text):
        return json.loads(text)


class Unspeakable(Base):
    def one(self, text):
        class Odd(Exception):
            def __str__(self):
                raise RuntimeError("no words")

        raise Odd


class Wordless(Base):
    def one(self, text):
        assert not text


class Callless(PointwiseRewardModel):
    required_fields = ("prompt",)


class Long(Base):
    def one(self, text):
        raise ValueError("x" * 100_000)


class CannotStart(Base):
    def __init__(self, config, accelerator):
        super().__init__(config, accelerator)
        self.weights = open(config.path)
"""


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    """A module of the user's, importable; removed at the end."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "tracebacks", TracebackLog())
    for name in ("workers.scoring.batches", "workers.loading.cache"):
        monkeypatch.setattr(sys.modules[name], "tracebacks", module.tracebacks)
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("my_")]:
        del sys.modules[name]


def line_of(words: str) -> int:
    """The first line of the module that has these words."""
    return next(i for i, line in enumerate(REWARDS.splitlines(), 1) if words in line)


def reasons_of(name: str, *prompts: str) -> list[str]:
    requests = Requests()
    samples = [requests.sample(prompt=prompt) for prompt in prompts]
    call = call_of(reward_model=f"my_rewards.{name}")
    models = ModelCache(load_settings(modules="my_rewards"))
    with models.lend(call) as model:
        found = {a: o for outcomes in iter_run(model, call, samples, {}) for a, o in outcomes.items()}
    return [found[s.address].failure.message for s in samples if found[s.address].failure is not None]


def load_error_of(model: str, **options) -> str:
    models = ModelCache(load_settings(modules=model.partition(".")[0]))
    with pytest.raises(ModelLoadError) as caught, models.lend(call_of(reward_model=model, **options)):
        pass
    return str(caught.value)


def logged(caplog) -> list[str]:
    """What the worker's log shows at Celery's default level."""
    return [r.getMessage() for r in caplog.records if r.name == module.__name__ and r.levelno >= logging.WARNING]


def test_a_reason_names_the_line_of_the_users_that_raised(my_rewards):
    (reason,) = reasons_of("Divides", "a")
    assert reason == f"ZeroDivisionError: division by zero (my_rewards.py:{line_of('1 / (len')} in helper)"


def test_where_a_library_raised_the_reason_names_the_line_that_led_there(my_rewards):
    (reason,) = reasons_of("Parses", "not json")
    assert reason.startswith("JSONDecodeError: Expecting value: line 1 column 1 (char 0)")
    assert reason.endswith(f"(my_rewards.py:{line_of('json.loads')} in one)")


def test_a_library_outside_of_the_usual_folders_is_not_taken_for_the_users(my_rewards, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("other")
    (elsewhere / "my_library.py").write_text("def parse(text):\n    raise ValueError(text[0])\n")
    monkeypatch.syspath_prepend(elsewhere)
    (my_rewards / "my_rewards.py").write_text(REWARDS.replace("json.loads", "__import__('my_library').parse"))
    (reason,) = reasons_of("Parses", "not json")
    assert reason == f"ValueError: n (my_rewards.py:{line_of('json.loads')} in one)"


def test_an_error_whose_text_cannot_be_made_is_a_reason_all_the_same(my_rewards, caplog):
    (reason,) = reasons_of("Unspeakable", "a")
    assert reason.startswith("Odd: (its text cannot be made: RuntimeError) (my_rewards.py:")
    assert "in one" in logged(caplog)[0]


def test_an_error_without_words_is_its_type_and_a_class_without_a_call_says_so(my_rewards):
    (reason,) = reasons_of("Wordless", "a")
    assert reason == f"AssertionError (my_rewards.py:{line_of('assert not text')} in one)"
    (reason,) = reasons_of("Callless", "a")
    assert reason == "NotImplementedError: Callless has no __call__ of its own"


def test_the_place_stays_where_the_text_is_cut_and_the_log_is_bounded(my_rewards, caplog):
    (reason,) = reasons_of("Long", "a")
    assert len(reason) <= 2000
    assert reason.endswith("in one)")
    assert len(logged(caplog)[0]) < 21_000


def test_each_error_is_logged_with_its_traceback_once_however_many_samples_raise_it(my_rewards, caplog):
    assert len(reasons_of("Divides", *("a" * 1 for _ in range(5)), "two")) == 5
    (text,) = logged(caplog)
    assert text.startswith(
        "raised reward=my_rewards.Divides error=ZeroDivisionError\nTraceback (most recent call last)"
    )
    assert "return 1 / (len(text) - 1)" in text
    assert "workers/scoring/runner.py" not in text
    reasons_of("Parses", "not json")
    assert len(logged(caplog)) == 2


def test_an_error_that_goes_on_is_logged_again_after_a_while_with_how_often_it_came(my_rewards, caplog, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    for seconds in (0.0, REPEAT_S / 2, REPEAT_S / 2 - 1, 2.0):
        clock[0] += seconds
        reasons_of("Divides", "a")
    first, second = logged(caplog)
    assert "num_since_last_logged" not in first
    assert "num_since_last_logged=2\n" in second


def test_no_prompt_is_logged(my_rewards, caplog):
    reasons_of("Divides", "s")
    reasons_of("Parses", "a secret of the user's")
    assert not [text for text in logged(caplog) if "secret" in text]


def test_what_a_constructor_raises_is_told_with_its_place_and_logged(my_rewards, caplog):
    reason = load_error_of("my_rewards.CannotStart", path="/nowhere/weights")
    assert "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/weights'" in reason
    assert f"(my_rewards.py:{line_of('open(')} in __init__)" in reason
    (text,) = logged(caplog)
    assert text.startswith("load failed reward=my_rewards.CannotStart error=FileNotFoundError\nTraceback")
    assert "self.weights = open(config.path)" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\nclass Mine(:\n", ("SyntaxError", "my_module.py, line 2")),
        ("def f():\nreturn 1\n", ("IndentationError", "my_module.py, line 2")),
        ("import os\nimport no_such_library\n", ("No module named 'no_such_library'", "(my_module.py:2 in <module>)")),
        ("def f():\n    return {}['k']\n\n\nf()\n", ("KeyError: 'k'", "(my_module.py:2 in f)")),
        ("import my_other\n", ("ValueError: in another", "(my_other.py:1 in <module>)")),
    ],
)
def test_a_module_that_cannot_be_imported_says_where(my_rewards, caplog, text, words):
    (my_rewards / "my_module.py").write_text(textwrap.dedent(text))
    (my_rewards / "my_other.py").write_text("raise ValueError('in another')\n")
    reason = load_error_of("my_module.Mine")
    assert all(word in reason for word in words)
    assert len(logged(caplog)) == 1
    assert "importlib" not in logged(caplog)[0].partition("my_module.py")[0]


def test_what_says_all_that_there_is_to_say_has_no_traceback(my_rewards, caplog):
    assert "has no 'Absent'" in load_error_of("my_rewards.Absent")
    assert not logged(caplog)


def test_in_an_editable_install_whose_modules_are_found_by_links_no_place_is_in_this_package(tmp_path):
    (tmp_path / "links").mkdir()
    for package in ("tasks", "workers"):
        (tmp_path / "links" / package).symlink_to(ROOT / package)
    (tmp_path / "my_rewards.py").write_text("def half(:\n")
    code = """
from tasks.rewards import RewardConfig
from tasks.settings import load_settings
from workers.loading.cache import ModelCache

entry = {"reward_model": "my_rewards.Mine", "queue": "gpu", "kind": "pointwise", "required_fields": ["prompt"]}
(spec,) = RewardConfig.from_dict({"rewards": entry}).rewards
try:
    with ModelCache(load_settings(modules="my_rewards")).lend(spec.call):
        pass
except Exception as error:
    print(error)
"""
    path = os.pathsep.join([str(tmp_path / "links"), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "SyntaxError: invalid syntax (my_rewards.py, line 1)" in done.stdout
    assert "get_code" not in done.stdout + done.stderr
    assert "_class_in" not in done.stdout + done.stderr
