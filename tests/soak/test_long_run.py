"""A million samples: memory stays as it is, and nothing of them is left in Redis."""

from __future__ import annotations

import pytest

from tasks.settings import load_settings
from tests.soak.flatness import growths
from tests.soak.loads import LOADS
from tests.soak.long_run import LongRunner

MOST_KEYS_THAT_STAY = 16
"""Counters of the queue, the store's identity, and kombu's own. None of them is for a sample."""


@pytest.mark.soak
@pytest.mark.timeout(12 * 3600)
@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
def test_memory_stays_as_it_is_and_nothing_of_the_samples_is_left(load, private_redis, workers, trainers, rows):
    server = private_redis()
    settings = load_settings(broker_url=server.url)
    two = workers("gpu", "gpu", settings=settings, env=load.env)
    with LongRunner(settings, server, two, trainers) as runner:
        run = runner.run(load)
    for growth in growths(run):
        print(growth)

    assert (run.wrong, run.lost) == (0, 0)
    assert run.payload_keys == ()
    assert run.keys_left == ()
    assert len(run.keys_that_stay) <= MOST_KEYS_THAT_STAY, run.keys_that_stay
    assert [growth for growth in growths(run) if not growth.is_flat] == []
    rows.add("long_run", load.name, run.as_data())
