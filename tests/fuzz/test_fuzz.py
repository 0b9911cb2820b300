"""The fuzzers for some seconds each, what they found once, and whether they would find it again."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.fuzz import __main__ as command
from tests.fuzz import bodies, counts, yaml_files
from tests.fuzz.bodies import JSON, Body
from tests.fuzz.counts import CORPUS, Counts, corpus_of
from tests.servers import ROOT, clean_env, run_python

SHORT_S = 4.0


@pytest.mark.parametrize("name", ["bodies", "yaml_files"])
def test_nothing_is_wrong_ended_or_stuck_in_some_seconds(name):
    found = command.run_apart(name, SHORT_S)
    assert found.held, found.found


@pytest.mark.parametrize("name", sorted(folder.name for folder in CORPUS.iterdir() if folder.is_dir()))
def test_what_was_found_once_holds(name):
    module = importlib.import_module(f"tests.fuzz.{name}")
    assert hasattr(module, "replay"), f"tests/fuzz/{name}.py has a corpus and no function replay(files) -> Counts"
    found = command.replay_apart(name)
    assert found.tried == len(corpus_of(name))
    assert found.held, found.found


def test_every_fuzzer_of_the_folder_is_run():
    assert {"bodies", "yaml_files"} <= set(command.names())
    assert not {"counts", "served", "test_fuzz", "__main__"} & set(command.names())


def test_the_command_prints_a_table_and_fails_if_one_thing_was_wrong(monkeypatch, capsys):
    seen = {"bodies": Counts(tried=1200, refused=3), "yaml_files": Counts(tried=5, wrong=1, found=["x.yaml: odd"])}
    monkeypatch.setattr(command, "run_apart", lambda name, seconds: seen[name])
    monkeypatch.setattr(sys, "argv", ["fuzz", "--only", "bodies"])
    assert command.main() == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["bodies", "1,200", "3", "0", "0", "0"]

    monkeypatch.setattr(sys, "argv", ["fuzz", "--only", "yaml_files"])
    assert command.main() == 1
    assert "yaml_files: x.yaml: odd" in capsys.readouterr().out


def test_a_fuzzer_that_ends_or_hangs_is_counted_as_such(monkeypatch):
    assert command.run_apart("no_such_fuzzer", 0.1).ended == 1
    monkeypatch.setattr(command, "MORE_S", 0.0)
    assert command.run_apart("yaml_files", 0.1).stuck == 1


def test_a_fuzzer_that_tried_nothing_did_not_hold():
    assert not Counts().held
    assert Counts(tried=1, refused=1).held
    assert not Counts(tried=1, stuck=1).held


def test_counts_of_other_fuzzers_are_read_by_name():
    assert command.counts_from({"tried": 3, "wrong": 1, "more": "x"}) == Counts(tried=3, wrong=1)


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (200, {"rewards": [2.0]}, "rewards [2.0], not [1.0]"),
        (200, {"rewards": [1.0, 1.0]}, "not [1.0]"),
        (500, {"error": "x"}, "a status for a fault of the server's"),
        (422, {"error": "x"}, "a valid request was refused"),
    ],
)
def test_a_wrong_answer_of_the_server_is_noticed(status, answer, words):
    body = Body(b'{"prompt": ["a"]}', JSON, [1.0])
    assert words in bodies._what_is_wrong_with(status, json.dumps(answer).encode(), body)


@pytest.mark.parametrize(("answer", "words"), [(b'{"rewards": [NaN]}', "no JSON"), (b'{"rewards": [7]}', "reward 7")])
def test_a_wrong_answer_to_a_body_of_unknown_rewards_is_noticed(answer, words):
    assert words in bodies._what_is_wrong_with(200, answer, Body(b'{"prompt": ["a"]}', JSON))


def test_an_exception_of_the_loader_that_nobody_expects_is_noticed(monkeypatch, tmp_path):
    def load(path: Path) -> None:
        raise KeyError("x")

    monkeypatch.setattr(yaml_files, "_load", load)
    monkeypatch.setattr(counts, "CORPUS", tmp_path)
    found = Counts()
    yaml_files._try(b"rewards:", found)
    assert found.wrong == 1
    assert found.found[0].endswith("raised KeyError: 'x'")
    assert [path.read_bytes() for path in corpus_of("yaml_files")] == [b"rewards:"]


def test_the_command_says_what_it_takes():
    done = run_python("-m", "tests.fuzz", "--help", env=clean_env(), cwd=ROOT)
    assert "--minutes" in done.stdout
