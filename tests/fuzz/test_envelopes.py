"""The short form of the fuzzer of envelopes."""

from __future__ import annotations

from tests.fuzz import envelopes


def test_mutated_envelopes_end_no_worker_cost_no_slot_and_are_not_told():
    counts = envelopes.run(seconds=15, most=1500)
    assert counts.tried >= 250
    assert counts.refused > 0, "they were all right, and this test tests nothing"
    assert counts.held, counts.found
