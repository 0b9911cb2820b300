"""Where the lines of a trainer's log go, and what they say of several ranks."""

from __future__ import annotations

import json
import logging

import msgpack
import pytest

from tests.servers import ROOT, clean_env, run_python
from tests.trainer.batches import NAN, batch_of
from trainer_client.failure_reasons import Failed
from trainer_client.steps import step_log as steplog
from trainer_client.steps.step_log import WaitLog, tell_step
from trainer_client.steps.step_summary import (
    StepSummary,
    failure_words,
    group_digest,
    group_size_words,
    joined,
    mixed_groups,
    summary_of,
)

SETUPS = {
    "nothing is set up": ("", 1),
    "handlers and no level": ("logging.basicConfig()", 1),
    "INFO is shown": ("logging.basicConfig(level=logging.INFO)", 1),
    "INFO of this package alone": ("logging.basicConfig(); logging.getLogger('trainer_client').setLevel('INFO')", 1),
    "this package is to be quiet": ("logging.getLogger('trainer_client').setLevel(logging.WARNING)", 0),
    "only errors are to be shown": ("logging.basicConfig(level=logging.ERROR)", 0),
    "there is no standard error": ("import sys; sys.stderr = None", 0),
    "standard error cannot be written": ("import os, sys; sys.stderr = open(os.devnull)", 0),
    "all is to be quiet": ("logging.disable(logging.INFO)", 0),
}


def test_a_line_is_shown_once_unless_somebody_said_otherwise():
    scripts = [setup for setup, _ in SETUPS.values()]
    program = (
        "import json, subprocess, sys\n"
        f"for setup in json.loads({json.dumps(json.dumps(scripts))}):\n"
        "    code = f'import logging\\n{setup}\\nfrom trainer_client.steps.step_log import tell\\ntell(\"a line\")'\n"
        "    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)\n"
        "    print((done.stdout + done.stderr).count('a line'))\n"
    )
    done = run_python("-c", program, env={**clean_env(), "PYTHONPATH": str(ROOT)})
    assert dict(zip(SETUPS, map(int, done.stdout.split()), strict=True)) == {name: n for name, (_, n) in SETUPS.items()}


def step_of_rank(rewards, failures=(), wait_s=1.0, hidden_s=2.0, prompts=None, **sizes):
    batch = batch_of(rewards, ["g"] * len(rewards["a"]), tuple(failures))
    batch.timings.update(wait_s=wait_s, hidden_s=hidden_s)
    return StepSummary.of_plain(msgpack.unpackb(msgpack.packb(summary_of(batch, sizes, prompts).to_plain())))


def failure(sample, message, worker, kind="failed"):
    return Failed(sample, "a", kind, message, 1, worker)


def test_a_step_of_several_ranks_is_told_as_one(caplog):
    first = step_of_rank({"a": [1.0, 2.0, 4.0], "b": [0.5] * 3}, wait_s=3.0, hidden_s=5.0)
    second = step_of_rank({"a": [NAN], "b": [1.5]}, [failure(0, "out\nof order", "vlm.3@b")], wait_s=1.0, hidden_s=9.0)
    third = step_of_rank({"a": [], "b": []})
    both = joined([first, second, third])
    assert both.failure_rate == 1 / 8
    assert failure_words(both) == "a: 1 of 4 failed on vlm.3@b: out of order"
    with caplog.at_level(logging.INFO, "trainer_client"):
        tell_step("step 12", both)
    (line,) = caplog.messages
    assert line == "step 12: 4 samples, a 2.333 (1 failed), b 0.75; waited 3.0 s, 2.0 s hidden"
    with caplog.at_level(logging.INFO, "trainer_client"):
        tell_step("step 12", both, ranks_s=4.0)
    assert caplog.messages[1] == f"{line}; 4.0 s for other ranks"


def test_the_reason_most_samples_have_is_told_with_its_kind_and_how_many_others_there_are():
    failures = [failure(0, "once", ""), *(failure(i, "sample 1: image: has NaN", "", "invalid") for i in (1, 2))]
    words = failure_words(step_of_rank({"a": [NAN] * 3}, failures))
    assert words == "a: 3 of 3 failed: invalid: image: has NaN (and 1 other reason)"


def test_reasons_are_counted_over_ranks():
    first = step_of_rank({"a": [NAN] * 3}, [failure(0, "y", "gpu.1@a"), *(failure(i, "x", "gpu.1@a") for i in (1, 2))])
    second = step_of_rank({"a": [NAN] * 2}, [failure(i, "y", "gpu.1@b") for i in (0, 1)])
    words = failure_words(joined([first, second]))
    assert words == "a: 5 of 5 failed on gpu.1@a, gpu.1@b: y (and 1 other reason)"
    many = [failure(i, f"reason {'abcdefghi'[i]}", "gpu.1@a") for i in range(9)]
    assert failure_words(joined([step_of_rank({"a": [NAN] * 9}, many), second])).endswith(": y (and 8 other reasons)")


def test_a_group_of_another_prompt_on_each_rank_is_mixed():
    def joined_of(*prompts):
        return joined([step_of_rank({"a": [1.0] * 2}, prompts={"g": one}) for one in prompts])

    assert mixed_groups(joined_of(["fox"], ["fox"])) == []
    assert mixed_groups(joined_of(["fox"], ["fox"], ["door"])) == [group_digest("g")]
    assert mixed_groups(joined_of(["fox", "door"], ["fox"])) == [group_digest("g")]
    assert group_size_words(joined_of(["fox"], ["door"])) == ""


def test_a_long_reason_is_cut_in_the_log():
    words = failure_words(step_of_rank({"a": [NAN]}, [failure(0, "x" * 5000, "gpu.1@h")]))
    assert len(words) < 400


def test_groups_that_are_not_whole_are_told_over_ranks():
    halves = [step_of_rank({"a": [1.0] * 2}, g=4), step_of_rank({"a": [1.0] * 2}, g=4)]
    assert group_size_words(joined(halves)) == ""
    assert "1 of 1 groups are not whole: one has 2 of group_size=4 samples" in group_size_words(halves[0])
    assert "one has 6 of group_size=4" in group_size_words(joined([*halves, halves[0]]))


@pytest.fixture
def short_pause(monkeypatch):
    monkeypatch.setattr(steplog, "SAY_EVERY_S", 0.0)


def test_a_wait_is_told_when_it_is_due_and_asks_only_then(caplog, short_pause, monkeypatch):
    asked = []

    def why():
        asked.append(1)
        return "a of 2 of 8 samples"

    with caplog.at_level(logging.INFO, "trainer_client"):
        WaitLog("step 3").tell(why)
        monkeypatch.setattr(steplog, "SAY_EVERY_S", 1000.0)
        WaitLog("step 4").tell(why)
    assert caplog.messages == ["step 3: collect() has waited 0 s for a of 2 of 8 samples"]
    assert len(asked) == 1
