"""The benchmark runs to its end, at a size that measures nothing."""

from __future__ import annotations

from tests.servers import ROOT, clean_env, run_python


def test_the_benchmark_compares_both_payload_stores_with_the_pattern_in_use_today():
    small = ("--size", "32", "--num-images", "32", "--num-http-images", "16", "--rounds", "1")
    words = run_python("-m", "benchmarks.throughput", *small, cwd=ROOT, env=clean_env()).stdout.split()
    assert {"HTTP", "Redis", "/dev/shm", "encode", "store", "queue", "fetch", "decode", "result"} <= set(words)
