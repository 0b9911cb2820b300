"""The simulation is not blind: each planted bug is found by a schedule that passes without it."""

from __future__ import annotations

import pytest

from tests.simulation.planted import BUGS, FOUND, find_near, seed_passes


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found_without_the_invariants_of_the_engine(bug):
    failure = find_near(bug)
    assert failure is not None, f"python -m tests.simulation.planted --bug {bug.name} --seeds 1..3000"
    assert seed_passes(failure.seed), "the schedule fails without the bug too"


def test_each_bug_has_a_name_of_its_own_and_a_recorded_seed():
    names = [bug.name for bug in BUGS]
    assert sorted(set(names)) == sorted(names) == sorted(FOUND)


def test_a_bug_is_gone_afterwards():
    for bug in BUGS:
        right = bug.function.__code__
        with bug.planted():
            assert bug.function.__code__ is not right
        assert bug.function.__code__ is right
