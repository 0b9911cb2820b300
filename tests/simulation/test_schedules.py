"""Thousands of schedules in which things go wrong: whatever happens, each sample ends with what an oracle says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.servers import ROOT, clean_env
from tests.simulation import run
from tests.simulation.schedules import draw

RANGES = [range(at, at + 250) for at in range(0, 2000, 250)]

FOUND_BUGS = (
    265, 561, 591, 836, 3251, 3307, 3748, 4258, 4291,
    11974, 17214, 35901, 102781, 104367, 106499, 202281, 236848, 2001033,
    2048914, 2057735, 2079452,
)  # fmt: skip
"""Seeds of other ranges that have found a bug, of the product or of the oracle."""

NUM_TRACED = 25


@pytest.mark.parametrize("seeds", RANGES, ids=lambda seeds: f"{seeds.start}..{seeds.stop}")
def test_whatever_goes_wrong_each_sample_ends_with_its_own_answer(seeds):
    failures = run.run_seeds(seeds)
    assert not failures, "\n".join(map(str, failures)) + (
        f"\nread one by: python -m tests.simulation.run --shrink {failures[0].seed}"
    )


def test_what_was_found_once_stays_mended():
    assert not run.run_seeds(FOUND_BUGS)


def traces_in_a_process(hash_seed: str) -> str:
    code = f"""
from tests.simulation import run
from tests.simulation.schedules import draw
for seed in range({NUM_TRACED}):
    print(*run.trace(draw(seed)), sep="\\n")
"""
    env = {**clean_env(), "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_seed_is_one_schedule_in_every_process():
    first, second = (traces_in_a_process(hash_seed) for hash_seed in ("1", "2"))
    assert first.count("all properties hold") == NUM_TRACED
    for one, other in zip(first.splitlines(), second.splitlines(), strict=True):
        assert one == other


def test_a_seed_is_one_schedule_each_time_it_is_run():
    for seed in range(5):
        assert list(run.trace(draw(seed))) == list(run.trace(draw(seed)))


def test_the_same_seed_draws_the_same():
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
