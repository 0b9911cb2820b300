"""A run of all faults."""

from __future__ import annotations

import pytest

from tests.soak.faults import FAULTS
from tests.soak.report import row_of_fault

IN_FLIGHT = 32
"""Samples that a worker has in hand: two chunks of 16 on the gpu queue, 32 questions on vlm."""

ADDED_BY_A_KILL_S = 15.0
"""The aim for every kill of a worker, against an undisturbed run."""


@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("fault", FAULTS)
def test_no_reward_is_wrong_or_lost(bench, rows, fault):
    seen = FAULTS[fault](bench)
    print(f"{fault}: {seen}")
    seen.assert_held()
    if fault.startswith("`kill -9` of the only"):
        assert max(seen.added_s) < ADDED_BY_A_KILL_S
        assert seen.again <= IN_FLIGHT * seen.tries
    rows.add("faults", fault, row_of_fault(fault, seen))
