"""The benchmark runs to its end, at a size that measures nothing, and each stage takes time."""

from __future__ import annotations

from benchmarks.pipeline import STAGES
from tests.servers import ROOT, clean_env, run_python


def test_the_benchmark_compares_both_payload_stores_with_the_pattern_in_use_today():
    small = ("--size", "256", "--num-images", "48", "--num-http-images", "16", "--rounds", "1", "--no-ray")
    lines = run_python("-m", "benchmarks.throughput", *small, cwd=ROOT, env=clean_env()).stdout.splitlines()
    rows = {words[0]: words[1:] for words in map(str.split, lines) if words}
    assert {"HTTP", "rewardq,", "/dev/shm"} <= rows.keys()
    for stage in STAGES:
        assert len(rows[stage]) == 4
        assert min(float(ms) for ms in rows[stage][::2]) > 0, rows
