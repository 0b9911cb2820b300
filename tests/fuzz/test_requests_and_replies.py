"""A few seconds of the fuzzers of requests and replies, from a seed of their own, and what they have found."""

from __future__ import annotations

import pytest

from tests.fuzz import replies, requests
from workers.base import Unscored
from workers.judges.aspects import read_judgement
from workers.judges.pairwise import read_verdict


@pytest.mark.parametrize("fuzzer", [requests, replies])
def test_no_mutated_input_gives_a_wrong_reward_or_ends_a_task(fuzzer):
    found = fuzzer.run(4.0, seed=1)
    assert found.tried >= 20
    assert found.refused > 0
    assert found.held, found.found


@pytest.mark.parametrize(
    "text",
    [
        "Verdict: first" + "|" * 100_000,
        "\n" * 100_000,
        "aspect" + "*" * 100_000,
        "_" * 50_000 + "aspect" + "_" * 50_000,
    ],
)
def test_a_reply_that_repeats_a_mark_for_ever_is_read_in_one_pass(text):
    """In time that grew with the square of the length it would take minutes."""
    read_judgement(text)
    assert verdict_or_reason(text) in ("first", "unparsable")


def verdict_or_reason(text: str) -> str:
    try:
        return read_verdict(text)
    except Unscored as reason:
        return reason.kind
