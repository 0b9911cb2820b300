"""Failures as people read them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from tasks.errors import MissingExtraError
from tasks.messages import Failure
from tests.trainer.batches import NAN, batch_of
from trainer_client.failure_reasons import Failed, ranges, reasons_of
from trainer_client.ranks.verdict import error_for
from trainer_client.results import Failures


def failed(sample, message, worker="gpu.7@host", kind="failed", reward="text"):
    return Failed(sample, reward, kind, message, 1, worker)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([5], "5"),
        (range(16), "0-15"),
        ([3, 0, 1, 7], "0-1, 3, 7"),
        (range(0, 40, 2), "0, 2, 4, 6, 8, 10, 12, 14, ..."),
    ],
)
def test_samples_are_named_as_ranges(numbers, words):
    assert ranges(list(numbers)) == words


def test_equal_reasons_are_one_with_its_samples_and_workers():
    batch = batch_of(
        {"text": [NAN] * 17},
        list(range(17)),
        (*(failed(i, "no module x", f"gpu.{i % 2}@host") for i in range(16)), failed(16, "black", "")),
    )
    words = batch.describe_failures()
    assert "reward 'text': 17 of 17 samples (17 failed): " in words
    assert "16 x failed on gpu.0@host, gpu.1@host: no module x: samples 0-15" in words
    assert "sample 16: failed: black" in words  # by the trainer itself: no worker


def test_the_same_words_of_another_kind_are_another_reason():
    reasons = reasons_of([failed(0, "late"), failed(1, "late", kind="timeout"), failed(2, "late")])
    assert [(reason.kind, reason.samples) for reason in reasons] == [("failed", [0, 2]), ("timeout", [1])]


def test_a_reason_that_names_its_own_sample_is_equal_to_the_others():
    reasons = reasons_of(failed(i, f"sample {i}: image: has NaN", "", "invalid") for i in range(4))
    assert [str(reason) for reason in reasons] == ["4 x invalid: image: has NaN: samples 0-3"]


def test_a_deadline_is_told_once_and_each_reward_with_its_samples():
    late = Failure(kind="timeout", message="2 of 3 samples had no answer after 4 s: queue 'gpu' has no worker")
    failures = [failed(i, late.message, "", "timeout", name) for name in ("a", "b") for i in (0, 1)]
    batch = batch_of({"a": [NAN] * 3, "b": [NAN, NAN, 1.0]}, ["g"] * 3, (*failures, failed(2, "black", reward="a")))
    error = error_for(batch, late, "raise", {})
    assert str(error).splitlines() == [
        late.message,
        "reward 'a': 3 of 3 samples (2 timeout, 1 failed): 2 x timeout: samples 0-1; "
        "sample 2: failed on gpu.7@host: black",
        "reward 'b': 2 of 3 samples (2 timeout): 2 x timeout: samples 0-1",
    ]
    assert late.message in batch.describe_failures()


def test_many_reasons_that_differ_in_their_numbers_are_one():
    found = [failed(i, f"found values in [-0.{i}, 1.{i}e-05]", f"gpu.{i % 2}@host", "invalid") for i in range(9)]
    (reason,) = reasons_of([*found, failed(9, "found values in [-0.3, 1.3e-05]", "gpu.1@host", "invalid")])
    assert str(reason) == (
        "10 x invalid on gpu.0@host, gpu.1@host: found values in [-0.3, 1.3e-05] (and with other numbers): samples 0-9"
    )
    few = [failed(i, f"status {code}") for i, code in enumerate([429, 500, 429])]
    assert [reason.words for reason in reasons_of(few)] == ["status 429", "status 500"]


def test_many_different_reasons_are_counted_beyond_the_first():
    batch = batch_of(
        {"text": [NAN] * 9}, list(range(9)), tuple(failed(i, f"reason {'abcdefghi'[i]}") for i in range(9))
    )
    assert batch.describe_failures().endswith("; and 4 more reasons of 4 samples")


def test_the_failures_of_a_batch_are_a_tuple_that_is_shown_in_a_few_lines():
    failures = Failures([failed(i, "broken", reward=name) for name in ("text", "looks") for i in range(2000)])
    assert failures[3].sample == 3
    assert failures == tuple(failures)
    assert pickle.loads(pickle.dumps(failures)) == failures
    assert repr(failures).splitlines() == [
        "<4000 failures>",
        "text: 2000 x failed on gpu.7@host: broken: samples 0-1999",
        "looks: 2000 x failed on gpu.7@host: broken: samples 0-1999",
    ]
    assert repr(Failures()) == "<0 failures>"


def test_a_batch_is_shown_in_a_few_lines_whatever_is_in_it():
    rewards = {"text": [1.0] * 3000 + [NAN] * 1000, "looks": [NAN] * 4000}
    shown = repr(batch_of(rewards, [i // 8 for i in range(4000)], split="eval", step=3))
    assert shown.splitlines() == [
        "RewardBatch(eval step 3: 4000 samples in 500 groups",
        "  text: mean 1, 3000 of 4000, 1000 failed",
        "  looks: 0 of 4000, 4000 failed)",
    ]
    assert repr(batch_of({"text": []}, [])).startswith("RewardBatch(step 0: 0 samples in 0 groups")


def test_what_a_worker_lacks_is_said_with_its_host_and_a_restart():
    here, there = MissingExtraError("OCR", "rapidocr", "ocr"), MissingExtraError("OCR", "rapidocr", "ocr", "node-3")
    assert "is not installed here: " in str(here)
    assert "restart" not in str(here)
    assert "is not installed in the worker's environment on node-3: " in str(there)
    assert str(there).endswith("then restart the worker")
    assert str(pickle.loads(pickle.dumps(there))) == str(there)


def test_a_constant_is_no_reward_in_what_is_shown():
    batch = batch_of({"text": [1.0, -1.0]}, ["g", "g"])
    batch.valid["text"][1] = np.False_
    assert "text: mean 1, 1 of 2, 1 failed" in repr(batch)
