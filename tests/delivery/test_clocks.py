"""Trainer and workers whose clocks disagree: all that has an end has it on Redis's clock."""

from __future__ import annotations

import glob
import time

import pytest

from tasks.settings import load_settings
from tests.delivery.seen import Seen, reward_of, step
from tests.servers import ROOT

AHEAD_S = 300

LIFE_S = 60
"""Of rewards, messages and media: shorter than the clocks are apart."""

SLEEP = "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"
"""libfaketime fails at what Python sleeps with (clock_nanosleep) where it leaves the monotonic clock alone; where it
does not, waiting for a lock takes five minutes longer."""


@pytest.mark.system
def test_clocks_five_minutes_apart_expire_nothing_and_start_nothing_twice(bench, redis_url, tmp_path):
    settings = load_settings(
        broker_url=redis_url, claim_ttl_s=2, reconcile_s=0.5, result_ttl_s=LIFE_S, payload_ttl_s=LIFE_S
    )
    (library,) = glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")
    (tmp_path / "sitecustomize.py").write_text(SLEEP)
    for offset_s in (-AHEAD_S, AHEAD_S):
        bench.workers(
            "gpu",
            settings=settings,
            env={
                "REWARDQ_RESULT_TTL_S": f"{LIFE_S}",
                "REWARDQ_PAYLOAD_TTL_S": f"{LIFE_S}",
                "LD_PRELOAD": library,
                "FAKETIME": f"{offset_s:+d}s",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "PYTHONPATH": f"{tmp_path}:{ROOT}",
            },
        )
    reward = reward_of("Logged", calls=str(bench.calls.path), seconds=2.5, batch_size=4)
    client = bench.clients(reward, settings=settings)
    seen = Seen(tries=1)
    step(client, range(24), seen)
    step(client, range(24), seen)  # answered from what is there
    seen.assert_held()
    assert bench.calls.num_again == 0
    offsets_s = {round((t - time.time()) / AHEAD_S) for t in bench.calls.times}
    assert offsets_s == {-1, 1}, "the workers' clocks were not what this test is about"
