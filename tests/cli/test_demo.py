from __future__ import annotations

import signal
import sys

import pytest

from tests.cli.conftest import running, wait_until


def test_the_demo_scores_every_poster_and_leaves_nothing_running(rewardq):
    run = rewardq("demo", "--steps", "1")
    run.wait_for("step 1: sampling")
    children = run.children()
    assert len(children) == 4
    assert run.exit_status(150) == 0, run.output
    assert "stand-in" in run.output
    assert "Failures: 0 of 48 outcomes" in run.output
    assert running(children) == []


def test_ctrl_c_in_the_demo_leaves_nothing_running(rewardq):
    run = rewardq("demo")
    run.wait_for("step 1: sampling")
    children = run.children()
    run.process.send_signal(signal.SIGINT)
    assert run.exit_status(30) == 130, run.output
    assert running(children) == []
    assert "Traceback" not in run.output


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_a_killed_demo_takes_its_children_with_it(rewardq):
    run = rewardq("demo")
    run.wait_for("step 1: sampling")
    children = run.children()
    run.process.kill()
    wait_until(lambda: not running(children), 10)
