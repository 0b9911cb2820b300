"""`rewardq clean`: drops what it was told to, says what, and nothing else."""

from __future__ import annotations

import re
import subprocess

import pytest

from tasks import keys
from tasks.messages import Outcome
from tasks.outcomes import address
from tests.cli.conftest import REWARDQ
from tests.pipeline.conftest import assert_rewards, clients, samples_of  # noqa: F401  (a fixture among them)
from tests.servers import clean_env, wait_until

TWO = ({"reward_model": "PixelCode"}, {"reward_model": "PixelCode", "name": "more", "add": 100})


def clean(settings, *arguments, says=""):
    """What it prints, and its exit status."""
    env = {**clean_env(), "REWARDQ_BROKER_URL": settings.broker}
    done = subprocess.run(
        [str(REWARDQ), "clean", *arguments],
        env=env,
        input=says,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr, done.returncode


def addresses(outcomes, run):
    prefix = keys.outcome(f"{run}:")
    return sorted(key.decode() for key in outcomes.redis.scan_iter(f"{prefix}*"))


@pytest.fixture
def scored(clients, workers, outcomes):  # noqa: F811
    """Two runs whose two rewards are scored for five samples each; their clients are closed."""
    workers("gpu")
    for run in ("first", "first-2"):
        client = clients(*TWO, run=run, launch="one")
        client.submit(samples_of(range(5)))
        batch = client.collect(timeout_s=60)
        assert_rewards(batch, range(5))
        client.close()
    assert len(addresses(outcomes, "first")) == 10
    return outcomes


def test_one_reward_of_one_run_is_dropped_by_its_name_and_scored_anew(scored, settings, clients):  # noqa: F811
    said, status = clean(settings, "--run", "first", "--reward", "more", "--yes")
    assert (status, "dropped 5 outcomes of reward 'more' of run 'first'" in said) == (0, True), said
    assert len(addresses(scored, "first")) == 5
    assert len(addresses(scored, "first-2")) == 10
    client = clients(*TWO, run="first", launch="one")
    client.submit(samples_of(range(5)))
    batch = client.collect(timeout_s=60)
    assert_rewards(batch, range(100, 105), "more")
    assert batch.num_hits == {"PixelCode": 5, "more": 0}


def test_it_counts_and_asks_and_drops_nothing_without_an_answer(scored, settings):
    for answer in ("n\n", ""):
        said, status = clean(settings, "--run", "first", says=answer)
        assert status == 2
        assert "more (tests.reward_models.PixelCode): 5 outcomes" in said
        assert "drop 10 outcomes of run 'first'?" in said
        assert "nothing was dropped; --yes drops without asking" in said
    assert len(addresses(scored, "first")) == 10
    said, status = clean(settings, "--run", "first", says="y\n")
    assert (status, "dropped 10 outcomes of run 'first'" in said) == (0, True), said
    assert addresses(scored, "first") == []
    assert len(addresses(scored, "first-2")) == 10
    said, status = clean(settings, "--run", "first", "--yes")
    assert (status, "nothing to drop" in said) == (0, True), said


def test_what_is_not_there_is_refused_by_the_names_of_what_is(scored, settings):
    said, status = clean(settings, "--run", "frist", "--yes")
    assert status == 2
    assert "no run 'frist' in redis://127.0.0.1" in said
    assert "(did you mean 'first'" in said
    assert "first (10 outcomes)" in said
    said, status = clean(settings, "--run", "first", "--reward", "moer", "--yes")
    assert status == 2
    assert "has no reward 'moer' (did you mean 'more'?); it has: PixelCode, more" in said
    said, status = clean(settings, "--run", "f*", "--yes")
    assert (status, "found 'f*'" in said) == (2, True)
    assert len(addresses(scored, "first")) == 10


def test_an_empty_redis_and_one_that_is_away_are_said_in_a_line(settings):
    said, status = clean(settings, "--run", "first", "--yes")
    assert (status, "which has no outcomes of any run" in said) == (2, True), said
    said, status = clean(settings, "--run", "first", "--yes", "--redis", "redis://:secret@127.0.0.1:1/0")
    assert (status, len(said.splitlines())) == (2, 1), said
    assert "redis://:***@127.0.0.1:1/0" in said


def test_a_run_that_is_alive_is_said_and_goes_on(scored, settings, clients):  # noqa: F811
    client = clients({"reward_model": "Slow", "seconds": 3, "batch_size": 1}, *TWO, run="first", launch="one")
    client.submit(samples_of(range(10, 12)))
    client.flush()
    wait_until(lambda: len(addresses(scored, "first")) >= 14)
    said, status = clean(settings, "--run", "first", "--yes")
    assert status == 0
    assert re.search(r"process \d+ on \S+, rank 0 of run 'first' is alive", said)
    batch = client.collect(timeout_s=60)
    assert_rewards(batch, range(10, 12))
    assert_rewards(batch, range(10, 12), "Slow")


def test_a_rank_is_dropped_with_the_scores_that_it_ranks(settings, clients, workers, outcomes):  # noqa: F811
    workers("gpu")
    client = clients({"reward_model": "jpeg_compressibility_Rank", "name": "small"}, run="ranked", launch="one")
    client.submit(samples_of(range(3), group="g"), group_size=3)
    client.collect(timeout_s=60)
    client.close()
    assert len(addresses(outcomes, "ranked")) == 4
    said, status = clean(settings, "--run", "ranked", "--reward", "small", "--yes")
    assert (status, "dropped 4 outcomes" in said) == (0, True), said
    assert addresses(outcomes, "ranked") == []


def test_thousands_are_counted_and_dropped_to_the_last(settings, outcomes):
    many = {address("large", f"{i % 3:016x}", f"k{i}"): Outcome(reward=1.0) for i in range(4321)}
    outcomes.write(many, "t")
    said, status = clean(settings, "--run", "large", "--yes")
    assert (status, "dropped 4,321 outcomes of run 'large'" in said) == (0, True), said
    assert addresses(outcomes, "large") == []
